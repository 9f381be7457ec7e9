"""What `router.json` holds, kind by kind: frozen values that `storage` writes and reads strictly."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RouteOption:
    """One route to choose from.

    name: what is answered. description: what it is for, in a sentence or two. examples: queries for it; five different
    ones do much.
    """

    name: str
    description: str = ""
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fitted on held-out predictions, which also gave the figures (auroc is None without rows of `other`)."""

    temperature: float
    threshold: float
    accuracy: float
    ece: float
    auroc: float | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """What it was trained on (SHA-256 of the data file, rows of every domain), with what, and when (UTC)."""

    data_sha256: str
    rows: dict[str, int]
    meswitch: str
    torch: str
    transformers: str
    created: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The causal LM that an LLM router asks.

    path: a checkpoint directory (a relative one is relative to the router's directory) or a hub id. fingerprint: its
    content, which decides; the path only says where to look.
    """

    path: str
    fingerprint: str
    parameters: int


@dataclass(frozen=True, slots=True)
class LlmSettings:
    """How an LLM router asks, and how it was trained.

    weights: `reference` (the model as it is), `lora` or `full`: what training changed, and so what is stored.
    max_tokens: of a query. permutations: orders of the options that are averaged. max_options: of one question.
    steps, batch, learning_rate, warmup (share of the steps), weight_decay: AdamW, cosine. question: rows that share one
    order of the options. drop: share of the questions that leave experts out, whose queries then belong to "none of
    these". settle: share of the steps during which the options pass from the family's order to random ones.
    reword: share of the options that are described by a part of their description, or by a request of theirs, so that
    what a description says counts and not which one it is. disguise: share of the drawn rows that are shown without
    their source's habits (a label, case, final marks), where they have any.
    balance: 0 draws rows as they come, 1 all domains and sources alike. average: share of the steps, the last ones,
    over which the weights are averaged. rank, alpha: LoRA's. top: the share of the
    blocks, from the last one down, that LoRA adapts. holdout: share of the rows kept for the calibration.
    """

    weights: str = "lora"
    max_tokens: int = 192
    permutations: int = 1
    max_options: int = 26
    steps: int = 300
    batch: int = 16
    question: int = 4
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    drop: float = 0.5
    settle: float = 0.25
    reword: float = 0.5
    disguise: float = 0.5
    balance: float = 1.0
    average: float = 0.4
    rank: int = 16
    alpha: int = 32
    top: float = 0.5
    holdout: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LlmFile:
    """`router.json` of an LLM router without its head (format, version) and the checksum of the tensors."""

    kind: str
    experts: tuple[str, ...]
    descriptions: dict[str, str]
    model: ModelInfo
    settings: LlmSettings
    calibration: Calibration
    provenance: Provenance
    tensors_sha256: str = ""


@dataclass(frozen=True, slots=True)
class CascadeFile:
    """`router.json` of a cascade; its two routers are the directories `first` and `second`.

    margin: below which lead of the first router's best label the second is asked too; None asks both always. weight:
    of the second router's log-probabilities, 0 to 1. members: SHA-256 of each router's `router.json`.
    """

    kind: str
    experts: tuple[str, ...]
    margin: float | None
    weight: float
    calibration: Calibration
    members: dict[str, str]
    tensors_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. choose: an expert's name, or `other` for the fallback.

    field: `text` (what the user asks), `system` (the system message), `header:NAME` or `metadata:NAME` of the request.
    pattern: a regular expression that is searched there.
    """

    choose: str
    field: str
    pattern: str


@dataclass(frozen=True, slots=True)
class RulesFile:
    """`router.json` of rules; the router for what no rule decides, if there is one, is the directory `router`."""

    kind: str
    experts: tuple[str, ...]
    rules: tuple[Rule, ...]
    members: dict[str, str]
    tensors_sha256: str = ""
