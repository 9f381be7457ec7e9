"""The embedding router: an encoder's hidden states, the query's words and its style, with calibrated linear heads.

Two questions, two heads. *Which expert?* is learnt from the experts' rows alone, from states and words. *Any expert
at all?* is learnt against the rows of `other`, from states, words and perhaps style. The probability of an expert is
the product. Measured by leaving sources out with a sentence
encoder, most unseen sources were chosen as well or better than with one softmax over experts and `other` (one of six
a little worse); for the base that made no clear difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.router.base import OTHER, Messages, Router, RouterError, text_of
from meswitch.router.described import Prior, RouteOption, Space
from meswitch.router.encoder import Encoder, Progress, TextEncoder, open_encoder
from meswitch.router.features import WIDTH, Bags, bags, style
from meswitch.router.store import Calibration, Given, Provenance, read_tensors, register, write_router
from meswitch.threads import fitting_threads

# What an embedding router keeps of its training rows, so that experts can be added to it without them.


ROWS = 16  # of every label; measured: 64 change little


@dataclass(frozen=True, slots=True)
class Memory:
    """Features of ROWS training rows of every label, in the order of the router's labels; float32.

    states: [labels x ROWS, width]. known: [labels x ROWS, known width]. words: [labels x ROWS, experts], what the word
    head adds to the logits.
    """

    states: Tensor
    known: Tensor
    words: Tensor

    @classmethod
    def of(cls, states: Tensor, known: Tensor, words: Tensor, targets: Tensor, labels: int) -> "Memory":
        """Rows spread evenly over those of each label; of a label that has fewer, some more than once."""
        chosen = torch.cat([spread((targets == label).nonzero()[:, 0]) for label in range(labels)])
        return cls(states[chosen], known[chosen], words[chosen])

    def targets(self) -> Tensor:
        """[labels x ROWS] int64."""
        return torch.arange(len(self.states) // ROWS).repeat_interleave(ROWS)

    def with_expert(self, states: Tensor, known: Tensor) -> "Memory":
        """With rows of one more expert, behind those of the others, whose words count for nothing."""
        chosen, at = spread(torch.arange(len(states))), self.words.shape[1] * ROWS
        words = torch.cat([self.words[:at], torch.zeros(ROWS, self.words.shape[1]), self.words[at:]])
        return Memory(
            torch.cat([self.states[:at], states[chosen], self.states[at:]]),
            torch.cat([self.known[:at], known[chosen], self.known[at:]]),
            torch.cat([words, torch.zeros(len(words), 1)], 1),
        )


def spread(members: Tensor) -> Tensor:
    """[ROWS] of `members` [n], at even distances."""
    return members[(torch.arange(ROWS) * len(members)) // ROWS]


KIND = "embedding"
BASE = "base"  # the encoder is the family's base


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The model whose hidden states the router reads; `fingerprint` identifies it by content."""

    fingerprint: str
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Settings:
    """What the heads see and how they are fitted.

    layers: which hidden states are averaged (0: embeddings) to choose the expert. known_layers: to tell queries for
    some expert from others. max_tokens: of a query. buckets: of hashed words. smoothing: counts added by the word
    head. words: the word head's weight beside the states'. l2: on the state head's weights. folds: of the held-out
    calibration. encoder: whose states, `base` or a directory or hub id. bits: of its linear layers, 32 or 8. style:
    whether how a query is written counts for telling others. lower: whether that is also learnt from rows in lower
    case, for encoders that see the case. prior, own: where there is one, the weights of the prior's log-odds beside the
    heads' and of the heads' odds beside the prior's (measured on 15 sources).
    target_precision, target_coverage: what the threshold was chosen for; neither: to tell experts' queries from others.
    """

    layers: tuple[int, ...]
    known_layers: tuple[int, ...]
    max_tokens: int = 64
    buckets: int = 1 << 15
    smoothing: float = 0.7
    words: float = 1.0
    l2: float = 2e-5
    encoder: str = "base"
    bits: int = 32
    style: bool = False
    lower: bool = True
    prior: float = 1.5
    own: float = 0.3
    target_precision: float | None = None
    target_coverage: float | None = None
    folds: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RouterFile:
    """`router.json` without its head (format, version) and the checksum of the tensors.

    other: whether the router knows queries that no expert is for. added: how many of the experts, the last ones, were
    added by examples. routes: what is said of the experts, if that is where the router starts from.
    """

    kind: str
    experts: tuple[str, ...]
    other: bool
    added: int
    base: BaseInfo
    settings: Settings
    calibration: Calibration
    provenance: Provenance
    routes: tuple[RouteOption, ...]
    tensors_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Features:
    """What the heads see of `n` texts.

    words: of the texts. states: [n, width] float32, to choose the expert. known: [n, width] float32, to tell others.
    prior: [n, experts + 1] float32, see `Prior`; None without one.
    """

    words: Bags
    states: Tensor
    known: Tensor
    prior: Tensor | None = None

    def select(self, rows: Tensor) -> "Features":
        prior = None if self.prior is None else self.prior[rows]
        return Features(self.words.select(rows), self.states[rows], self.known[rows], prior)


@dataclass(frozen=True, slots=True)
class Linear:
    """x -> ((x - mean) * scale) @ weight + bias; mean, scale: [width], weight: [width, outputs], bias: [outputs]."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * self.scale) @ self.weight + self.bias

    def scaled(self, factor: float, shift: float | Tensor = 0.0) -> "Linear":
        """The same head with its outputs times `factor`, plus `shift`."""
        return Linear(self.mean, self.scale, self.weight * factor, self.bias * factor + shift)


@dataclass(frozen=True, slots=True)
class Heads:
    """The linear heads of both questions; float32.

    words: [buckets, experts]. states: width -> experts. known: width -> 1, and known_words: [buckets, 1], whose sum is
    the log-odds of "some expert's"; None without rows of `other`. Each expert that was added by examples has a further
    column there, and the query is some expert's if any column says so.
    """

    words: Tensor
    states: Linear
    known: Linear | None
    known_words: Tensor | None

    def logits(self, features: Features, words: float) -> Tensor:
        """[n, experts] float32, before the temperature."""
        return words * features.words.weighted(self.words) + self.states(features.states)

    def odds(self, features: Features) -> Tensor | None:
        """[n] float32: log-odds that some expert is for the text; None if that was not learnt."""
        if self.known is None or self.known_words is None:
            return None
        return (self.known(features.known) + features.words.weighted(self.known_words)).logsumexp(1)

    def scores(self, features: Features, settings: Settings, temperature: float) -> Tensor:
        """[n, experts (+ 1 for other)] float64: log-probabilities."""
        logits = self.logits(features, settings.words).double() / temperature
        which = with_prior(logits, features, settings).log_softmax(1)
        odds = self.odds(features)
        if odds is None:
            return which
        known = odds_with_prior(odds.double(), features, settings)[:, None].clamp(
            -30, 30
        )  # never so sure that a threshold of 1 would let it answer
        return torch.cat([which + logsigmoid(known), logsigmoid(-known)], 1)


def with_prior(logits: Tensor, features: Features, settings: Settings) -> Tensor:
    """[n, experts] float64, of logits after their temperature."""
    return logits if features.prior is None else logits + settings.prior * features.prior[:, :-1].double()


def odds_with_prior(odds: Tensor, features: Features, settings: Settings) -> Tensor:
    """[n] float64, of calibrated log-odds that some expert is for the text."""
    return odds if features.prior is None else settings.own * odds + features.prior[:, -1].double()


@register(KIND)
class EmbeddingRouter(Router):
    """See the module's docstring; `meswitch.router.train.train_router` makes one, `save` and `load_router` keep it."""

    file = RouterFile
    unknown = ", or give each new [[expert]] of family.toml `examples`, five lines that are queries for it"

    def __init__(
        self,
        encoder: TextEncoder,
        heads: Heads,
        experts: Sequence[str],
        settings: Settings,
        calibration: Calibration,
        provenance: Provenance,
        *,
        memory: Memory,
        prior: Prior | None = None,
        added: int = 0,
        fallback: str = "base",
        threshold: float | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.fallback = fallback
        self.threshold = calibration.threshold if threshold is None else threshold
        self.encoder = encoder
        self.heads = heads
        self.settings = settings
        self.calibration = calibration
        self.provenance = provenance
        self.memory = memory
        self.prior = prior
        self.added = added  # experts, by examples: see `meswitch.router.few`
        self.labels = self.experts if heads.known is None else (*self.experts, OTHER)

    def scores(self, messages_batch: Sequence[Messages]) -> list[dict[str, float]]:
        if not messages_batch:
            return []
        with fitting_threads(self.encoder.device, self.encoder.hidden_size):
            texts = [text_of(messages) for messages in messages_batch]
            features = extract(self.encoder, texts, self.settings, self.prior)
            logs = self.heads.scores(features, self.settings, self.calibration.temperature)
            rows = logs.exp().tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]

    def nbytes(self) -> int:
        """Of the encoder and the heads in memory."""
        tensors = tensors_of(self.heads, self.memory).values()
        return self.encoder.nbytes() + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def save(self, path: str | Path) -> None:
        """Write the router as a directory in one step; a router that is there is replaced.

        Raises:
            RouterError: `path` exists and is not a router, or cannot be written.
        """
        encoder = self.encoder
        file = RouterFile(
            kind=KIND,
            experts=self.experts,
            other=self.labels != self.experts,
            added=self.added,
            base=BaseInfo(encoder.fingerprint, encoder.hidden_size, encoder.vocab_size),
            settings=self.settings,
            calibration=self.calibration,
            provenance=self.provenance,
            routes=() if self.prior is None else self.prior.options,
        )
        write_router(Path(path), file, tensors_of(self.heads, self.memory))

    @classmethod
    def open(cls, directory: Path, file: RouterFile, given: Given) -> "EmbeddingRouter":
        """
        Raises:
            RouterError: damaged, or trained with another encoder. CheckpointError: the encoder is gone.
        """
        settings = file.settings
        own = settings.encoder == BASE
        near = directory / settings.encoder  # a path is also looked for beside router.json
        source = given.base if own else near if near.is_dir() else settings.encoder
        found = fingerprint(Checkpoint.open(source))
        if found != file.base.fingerprint:
            raise RouterError(
                f"{directory}: base.fingerprint: trained on the hidden states of another base than {source} "
                f"({file.base.fingerprint:.24}..., this is {found:.24}...); train it again with `meswitch router train`"
            )
        experts, width = len(file.experts), file.base.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"words.weight": (settings.buckets, experts)}
        shapes |= _shapes("states", len(settings.layers) * width, experts)
        known, columns = len(settings.known_layers) * width + WIDTH * settings.style, 1 + file.added
        if file.other:
            shapes |= _shapes("known", known, columns)
            shapes["known.words"] = (settings.buckets, columns)
        rows = (experts + file.other) * ROWS
        shapes |= {"memory.states": (rows, len(settings.layers) * width), "memory.words": (rows, experts)}
        shapes["memory.known"] = (rows, known)
        tensors = read_tensors(directory, file, shapes)
        encoder: TextEncoder
        if own and given.model is not None:
            encoder = Encoder(given.model, given.tokenizer, found)
        else:
            last = None if file.routes else max(*settings.layers, *settings.known_layers, 0)
            encoder = (
                Encoder.load(given.base, given.device, last)
                if own
                else open_encoder(source, given.device, settings.bits)
            )
            encoder.source = settings.encoder
        for name in ("hidden_size", "vocab_size"):
            if getattr(encoder, name) != getattr(file.base, name):
                raise RouterError(
                    f"{directory}: base.{name}: {getattr(file.base, name)}, but the model has {getattr(encoder, name)}"
                )

        def head(name: str) -> Linear:
            return Linear(*(tensors[f"{name}.{part}"] for part in ("mean", "scale", "weight", "bias")))

        heads = Heads(
            tensors["words.weight"], head("states"), head("known") if file.other else None, tensors.get("known.words")
        )
        return cls(
            encoder,
            heads,
            file.experts,
            settings,
            file.calibration,
            file.provenance,
            prior=Prior.of(file.routes, Space(encoder)) if file.routes else None,
            memory=Memory(*(tensors[f"memory.{part}"] for part in ("states", "known", "words"))),
            added=file.added,
            fallback=given.fallback,
            threshold=given.threshold,
        )

    @classmethod
    def upgraded(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        settings = data.get("settings")
        if version < 2 and isinstance(settings, dict):
            return {"routes": []} | data | {"settings": {"prior": 0.0, "own": 1.0} | settings}
        return data


def tensors_of(heads: Heads, memory: Memory) -> dict[str, Tensor]:
    """Heads and memory by the names they have on disk."""
    tensors = {"words.weight": heads.words}
    tensors |= {f"memory.{part}": getattr(memory, part) for part in ("states", "known", "words")}
    for name, head in (("states", heads.states), ("known", heads.known)):
        if head is not None:
            tensors |= {f"{name}.{part}": getattr(head, part) for part in ("mean", "scale", "weight", "bias")}
    if heads.known_words is not None:
        tensors["known.words"] = heads.known_words
    return tensors


def extract(
    encoder: TextEncoder,
    texts: Sequence[str],
    settings: Settings,
    prior: Prior | None = None,
    progress: Progress | None = None,
) -> Features:
    """Everything that the heads see of some texts."""
    said = () if prior is None else prior.space.layers
    layers = sorted({*settings.layers, *settings.known_layers, *said})
    states = encoder.encode(texts, layers, settings.max_tokens, progress)
    with torch.inference_mode(False):  # plain tensors, so that training may differentiate through them
        parts = dict(zip(layers, states.clone().split(encoder.hidden_size, 1), strict=True))
        known = [parts[layer] for layer in settings.known_layers] + ([style(texts)] if settings.style else [])
        chosen = torch.cat([parts[layer] for layer in settings.layers], 1)
        before = None if prior is None else prior(torch.cat([parts[layer] for layer in said], 1))
        return Features(bags(texts, settings.buckets), chosen, torch.cat(known, 1) if known else chosen[:, :0], before)


def _shapes(name: str, width: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.mean": (width,),
        f"{name}.scale": (width,),
        f"{name}.weight": (width, outputs),
        f"{name}.bias": (outputs,),
    }
