"""The LLM router: a causal LM answers a multiple-choice question over the experts' descriptions.

One forward pass; the probabilities are those of the option letters at the last position. An expert is nothing but its
description, so one more can be added without training. Training changes all of the model's weights, or low-rank
adapters through PEFT (the extra `lora`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.architecture import architecture_of
from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.cpu import fitting_threads
from meswitch.errors import CheckpointError, ConfigError
from meswitch.loaded import dequantised
from meswitch.router.base import OTHER, Messages, Router, RouterError, text_of
from meswitch.router.choice import NONE_OF_THESE, ChoiceModel, ChoicePrompt
from meswitch.router.store import (
    OpenOptions,
    RouterProvenance,
    ScoreCalibration,
    read_all_tensors,
    register_router,
    write_router,
)
from meswitch.tokenizer import load_tokenizer

_A, _B = ".lora_A.weight", ".lora_B.weight"


def add_adapters(model: Any, rank: int, alpha: int, top: float = 1.0) -> dict[str, nn.Parameter]:
    """Put LoRA adapters on all linear layers but the head, in place; the adapters' parameters by name.

    Args:
        top: the share of the blocks, from the last one down, that get them. Gradients go no further down than they
            must, so half the blocks cost three quarters of the time.

    Raises:
        ConfigError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            "weights: 'lora' needs PEFT; install it with `pip install 'meswitch[lora]'`, or train with `--weights full`"
        ) from None
    head = model.get_output_embeddings()
    lowest = round(model.config.get_text_config().num_hidden_layers * (1 - top))
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and _block(name) >= lowest
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets), model)
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _block(name: str) -> int:
    """The number of the block that a module belongs to: `model.layers.7.mlp.up_proj` -> 7."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def take_adapters(model: nn.Module) -> dict[str, Tensor]:
    """The adapters under plain names (`<module>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank]), removed.

    The model is again what it was before `add_adapters`, with its own linear layers.
    """
    from peft.tuners.lora import LoraLayer

    tensors: dict[str, Tensor] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        tensors[name + _A] = module.lora_A["default"].weight.detach().cpu().float().contiguous()
        tensors[name + _B] = module.lora_B["default"].weight.detach().cpu().float().contiguous()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    return tensors


@torch.no_grad()
def merge_adapters(model: nn.Module, tensors: Mapping[str, Tensor], rank: int, alpha: int) -> None:
    """weight += alpha / rank x B A, in place; needs no PEFT.

    Raises:
        RouterError: a name without its layer or its other half, or another shape.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in sorted(tensors):
        layer = name.removesuffix(_A).removesuffix(_B)
        if layer not in modules or {layer + _A, layer + _B} - tensors.keys():
            raise RouterError(f"{name}: no adapter of a linear layer of this model; train the router again")
        weight, a, b = modules[layer].weight, tensors[layer + _A], tensors[layer + _B]
        if a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
            raise RouterError(f"{name}: shapes {tuple(a.shape)}, {tuple(b.shape)} do not fit; train the router again")
        if name.endswith(_A):
            weight += ((alpha / rank) * (b.float() @ a.float())).to(weight)


@torch.no_grad()
def replace_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put fully trained weights in place.

    Raises:
        RouterError: not exactly the model's parameters.
    """
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    for name in tensors.keys() | parameters.keys():
        if name not in tensors or name not in parameters or tensors[name].shape != parameters[name].shape:
            raise RouterError(f"{name}: the stored weights are not those of this model; train the router again")
        parameters[name].copy_(tensors[name])


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The causal LM that an LLM router asks.

    Args:
        path: a checkpoint directory (a relative one is relative to the router's directory) or a hub id.
        fingerprint: its content, which decides; the path only says where to look.
    """

    path: str
    fingerprint: str
    parameters: int


@dataclass(frozen=True, slots=True)
class Llm:
    """A causal LM of transformers in eval mode, its tokenizer, and which model it is."""

    model: Any
    tokenizer: Any
    info: ModelInfo


@dataclass(frozen=True, slots=True)
class LlmSettings:
    """How an LLM router asks, and how it was trained.

    Args:
        weights: `reference` (the model as it is), `lora` or `full`: what training changed, and so what is stored.
        max_tokens: of a query.
        permutations: orders of the options that are averaged.
        max_options: of one question.
        steps: of AdamW.
        batch: rows a step.
        learning_rate: at its peak; it falls as a cosine.
        warmup: share of the steps during which it rises.
        weight_decay: of AdamW.
        question: rows that share one order of the options.
        drop: share of the questions that leave experts out, whose queries then belong to "none of these".
        settle: share of the steps during which the options pass from the family's order to random ones.
        reword: share of the options that are described by a part of their description, or by a request of theirs, so
            that what a description says counts and not which one it is.
        disguise: share of the drawn rows that are shown without their source's habits (a label, case, final marks),
            where they have any.
        balance: 0 draws rows as they come, 1 all domains and sources alike.
        average: share of the steps, the last ones, over which the weights are averaged.
        rank: LoRA's.
        alpha: LoRA's.
        top: the share of the blocks, from the last one down, that LoRA adapts.
        holdout: share of the rows kept for the calibration.
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
    calibration: ScoreCalibration
    provenance: RouterProvenance
    tensors_sha256: str = ""


@register_router("llm")
class LlmRouter(Router):
    """See the module's docstring; `train_llm_router` makes one, `save` and `load_router` keep it.

    Args:
        llm: the model that is asked.
        descriptions: of every expert, in the experts' order.
        settings: how it is asked, and how it was trained.
        tuned: what training changed, as `weights` of `settings` says; written by `save`.

    Raises:
        ConfigError: no experts, an empty description, or a tokenizer without letters.
    """

    file = LlmFile
    unknown = ", or take the family's descriptions as they are now with `meswitch router update`"

    def __init__(
        self,
        llm: Llm,
        descriptions: Mapping[str, str],
        settings: LlmSettings,
        calibration: ScoreCalibration,
        provenance: RouterProvenance,
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
        self.llm = llm
        self.settings = settings
        self.calibration = calibration
        self.provenance = provenance
        self.tuned = dict(tuned or {})
        self.chooser = ChoiceModel(llm.model, ChoicePrompt(llm.tokenizer, settings.max_tokens))

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
        chooser, options = self.chooser, self.settings.max_options
        queries = [chooser.prompt.query(text) for text in texts]
        room = min(options, len(chooser.prompt.letter_ids)) - 1
        groups = [self.experts[i : i + room] for i in range(0, len(self.experts), room)]
        with fitting_threads(chooser.model.device, chooser.hidden_size):
            parts = [self._group_odds(queries, group) for group in groups]
        return torch.cat([*parts, torch.zeros(len(texts), 1)], 1)

    def with_descriptions(self, descriptions: Mapping[str, str]) -> "LlmRouter":
        """The same model and calibration over other experts, or over other words for the same ones."""
        return LlmRouter(
            self.llm,
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
            model=self.llm.info,
            settings=self.settings,
            calibration=self.calibration,
            provenance=self.provenance,
        )
        write_router(Path(path), file, self.tuned)

    @classmethod
    def open(cls, directory: Path, file: LlmFile, given: OpenOptions) -> "LlmRouter":
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
        llm = open_llm(where, given.device, file.model)
        settings = file.settings
        try:
            if settings.weights == "full":
                replace_weights(llm.model, tensors)
            elif settings.weights == "lora":
                merge_adapters(llm.model, tensors, settings.rank, settings.alpha)
            elif tensors:
                raise RouterError(f"{min(tensors)}: a router that uses the model as it is has no tensors")
        except RouterError as error:
            raise RouterError(f"{directory}: {error}") from None
        return cls(
            llm,
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
            logits = self.chooser.answer(queries, [options[i] for i in order])
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


def open_llm(source: str | Path, device: str = "cpu", info: ModelInfo | None = None) -> Llm:
    """A causal LM with its tokenizer; float32 on the CPU, the checkpoint's dtype elsewhere.

    Args:
        source: a checkpoint directory or a hub id.
        device: where it computes.
        info: which model it is, where that is known; None: by where it lies now.

    Raises:
        CheckpointError: nothing there. ConfigError: no tokenizer.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(source)
    dtype = torch.float32 if device == "cpu" else "auto"
    if checkpoint.is_quantised:
        model: Any = dequantised(checkpoint, architecture_of(checkpoint.config), dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=dtype, trust_remote_code=False)
    if info is None:
        path = str(Path(source).resolve()) if Path(source).is_dir() else str(source)
        info = ModelInfo(path, fingerprint(checkpoint), sum(value.numel() for value in model.parameters()))
    return Llm(model.to(device).eval(), load_tokenizer(checkpoint.directory), info)


def _find_model(directory: Path, info: ModelInfo, given: OpenOptions) -> str | Path:
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
