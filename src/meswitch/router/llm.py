"""The LLM router: a causal LM answers a multiple-choice question over the experts' descriptions.

One forward pass; the probabilities are those of the option letters at the last position. An expert is nothing but its
description, so one more can be added without training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.errors import CheckpointError, ConfigError
from meswitch.router.base import OTHER, Messages, Router, RouterError, text_of
from meswitch.router.letters import NONE_OF_THESE, LetterModel, Prompt
from meswitch.router.lora import merge_adapters, replace_weights
from meswitch.router.store import Calibration, Given, Provenance, read_all_tensors, register, write_router
from meswitch.threads import fitting_threads
from meswitch.tokenizer import load_tokenizer


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


@register("llm")
class LlmRouter(Router):
    """See the module's docstring; `train_llm_router` makes one, `save` and `load_router` keep it.

    Args:
        model, tokenizer: a transformers causal LM in eval mode with its tokenizer.
        info: which model that is. descriptions: of every expert, in the experts' order.
        tuned: what training changed, as `weights` of `settings` says; written by `save`.

    Raises:
        ConfigError: no experts, an empty description, or a tokenizer without letters.
    """

    file = LlmFile
    unknown = ", or take the family's descriptions as they are now with `meswitch router update`"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        info: ModelInfo,
        descriptions: Mapping[str, str],
        settings: LlmSettings,
        calibration: Calibration,
        provenance: Provenance,
        *,
        tuned: Mapping[str, Tensor] | None = None,
        fallback: str = "base",
        threshold: float | None = None,
    ) -> None:
        check_descriptions(descriptions)
        self.experts = tuple(descriptions)
        self.labels = (*self.experts, OTHER)
        self.descriptions = dict(descriptions)
        self.fallback = fallback
        self.threshold = calibration.threshold if threshold is None else threshold
        self.info = info
        self.settings = settings
        self.calibration = calibration
        self.provenance = provenance
        self.tuned = dict(tuned or {})
        self.letters = LetterModel(model, Prompt(tokenizer, settings.max_tokens))

    def scores(self, messages_batch: Sequence[Messages]) -> list[dict[str, float]]:
        if not messages_batch:
            return []
        odds = self.log_odds([text_of(messages) for messages in messages_batch])
        rows = (odds.double() / self.calibration.temperature).softmax(1).tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]

    def log_odds(self, texts: Sequence[str]) -> Tensor:
        """[n, labels] float32: each expert's log-odds against "none of these" (the last column, 0).

        Averaged over `settings.permutations` orders of the options. More experts than a question has room for are
        asked for in several questions; "none of these" is in each and makes their answers comparable.
        """
        letters, options = self.letters, self.settings.max_options
        queries = [letters.prompt.query(text) for text in texts]
        room = min(options, len(letters.prompt.letter_ids)) - 1
        groups = [self.experts[i : i + room] for i in range(0, len(self.experts), room)]
        with fitting_threads(letters.model.device, letters.hidden_size):
            parts = [self._group_odds(queries, group) for group in groups]
        return torch.cat([*parts, torch.zeros(len(texts), 1)], 1)

    def with_descriptions(self, descriptions: Mapping[str, str]) -> "LlmRouter":
        """The same model and calibration over other experts, or over other words for the same ones."""
        return LlmRouter(
            self.letters.model,
            self.letters.prompt.tokenizer,
            self.info,
            descriptions,
            self.settings,
            self.calibration,
            self.provenance,
            tuned=self.tuned,
            fallback=self.fallback,
            threshold=self.threshold,
        )

    def save(self, path: str | Path) -> None:
        """Write the router as a directory in one step; a router that is there is replaced.

        The model itself is not written, only what training changed in it.

        Raises:
            RouterError: `path` exists and is not a router, or cannot be written.
        """
        file = LlmFile(
            kind="llm",
            experts=self.experts,
            descriptions=self.descriptions,
            model=self.info,
            settings=self.settings,
            calibration=self.calibration,
            provenance=self.provenance,
        )
        write_router(Path(path), file, self.tuned)

    @classmethod
    def open(cls, directory: Path, file: LlmFile, given: Given) -> "LlmRouter":
        """
        Raises:
            RouterError: damaged, or its model is not to be found. CheckpointError, ConfigError: see `open_llm`.
        """
        if file.settings.weights not in ("reference", "lora", "full"):
            raise RouterError(
                f"{directory}: settings.weights: {file.settings.weights!r} is none of reference, lora, full"
            )
        if file.experts != tuple(file.descriptions):
            raise RouterError(f"{directory}: descriptions: not of the router's experts, in their order")
        tensors = read_all_tensors(directory, file)
        where = _find_model(directory, file.model, given)
        model, tokenizer = open_llm(where, given.device)
        settings = file.settings
        try:
            if settings.weights == "full":
                replace_weights(model, tensors)
            elif settings.weights == "lora":
                merge_adapters(model, tensors, settings.rank, settings.alpha)
            elif tensors:
                raise RouterError(f"{min(tensors)}: a router that uses the model as it is has no tensors")
        except RouterError as error:
            raise RouterError(f"{directory}: {error}") from None
        return cls(
            model,
            tokenizer,
            file.model,
            file.descriptions,
            settings,
            file.calibration,
            file.provenance,
            tuned=tensors,
            fallback=given.fallback,
            threshold=given.threshold,
        )

    def _group_odds(self, queries: Sequence[Sequence[int]], group: Sequence[str]) -> Tensor:
        """[n, len(group)] float32."""
        options = [*(self.descriptions[name] for name in group), NONE_OF_THESE]
        total = torch.zeros(len(queries), len(options))
        shifts = rotations(len(options), self.settings.permutations)
        for shift in shifts:
            order = [(i + shift) % len(options) for i in range(len(options))]
            logits = self.letters.answer(queries, [options[i] for i in order])
            total[:, order] += logits.log_softmax(1)
        return (total[:, :-1] - total[:, -1:]) / len(shifts)


def rotations(options: int, wanted: int) -> list[int]:
    """How far to turn the options' order for each question: `wanted` turns, evenly spread, at most one an option.

    With one an option, each option is at each letter once, and the average does not depend on where they started.
    """
    count = max(1, min(wanted, options))
    return [round(i * options / count) for i in range(count)]


def check_descriptions(descriptions: Mapping[str, str]) -> None:
    """
    Raises:
        ConfigError: no experts, or one without a description, or one that is called `other`.
    """
    if not descriptions:
        raise ConfigError("expert: none; an LLM router needs at least one expert with a description")
    for name, text in descriptions.items():
        if name == OTHER:
            raise ConfigError(f"expert.name: {OTHER!r} means 'no expert' in routing data; rename the expert")
        if not text.strip():
            raise ConfigError(
                f"expert.description: {name!r} has none; the LLM router chooses by descriptions, so say in a sentence "
                "what this expert is for"
            )


def open_llm(source: str | Path, device: str = "cpu") -> tuple[Any, Any]:
    """A causal LM and its tokenizer; float32 on the CPU, the checkpoint's dtype elsewhere.

    Raises:
        CheckpointError: nothing there. ConfigError: no tokenizer.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(source)
    dtype = torch.float32 if device == "cpu" else "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval(), load_tokenizer(checkpoint.directory)


def model_info(source: str | Path, model: Any) -> ModelInfo:
    """Which model this is: where it lies, its content and its size."""
    checkpoint = Checkpoint.open(source)
    path = str(Path(source).resolve()) if Path(source).is_dir() else str(source)
    return ModelInfo(path, fingerprint(checkpoint), sum(value.numel() for value in model.parameters()))


def _find_model(directory: Path, info: ModelInfo, given: Given) -> str | Path:
    """Where the router's model is: where the caller says, where it was, or it is the base itself."""
    if given.llm is not None:
        if _is(given.llm, info):
            return given.llm
        raise RouterError(
            f"{directory}: model.fingerprint: {given.llm} is another model than the one this router was trained with"
        )
    here = directory / info.path
    known = here if here.is_dir() else info.path
    if _is(known, info):
        return known
    if _is(given.base, info):
        return given.base
    raise RouterError(
        f"{directory}: model.path: {info.path} is not there or is another model than the one this router was trained "
        "with; give its directory with `--model`, or train the router again"
    )


def _is(source: str | Path, info: ModelInfo) -> bool:
    try:
        return fingerprint(Checkpoint.open(source)) == info.fingerprint
    except CheckpointError:
        return False
