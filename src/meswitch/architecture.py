"""What each tensor of a model is, and what can be done with it. Every other part of the package asks here.

The facts come from transformers itself, not from names: the model is laid out on the `meta` device (no memory, no
weights), a tensor is what the module that owns it makes of it, and the way from stored names to parameters is the one
that `from_pretrained` goes (its own conversion mapping: prefixes, renamed parts, expert matrices that are stored one by
one and computed as a stack).
"""

import copy
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.errors import CheckpointError

# What a tensor is.
EMBEDDING = "embedding"  # a table of rows that are looked up: token embeddings, learned positions
HEAD = "head"  # the output embedding: hidden states -> logits
LINEAR = "linear"  # a matrix [out_features, in_features] that inputs are multiplied with
TRANSPOSED = "transposed"  # the same, stored as [in_features, out_features] (`Conv1D` of GPT-2)
EXPERTS = "experts"  # matrices of a mixture of experts in one tensor: [experts, out_features, in_features]
TRANSPOSED_EXPERTS = "transposed experts"  # the same, each stored as [in_features, out_features] (gpt-oss, Llama 4)
ROUTER = "router"  # decides which experts of a mixture see a token
NORM = "norm"
BIAS = "bias"
CONVOLUTION = "convolution"
OTHER = "other"
ROLES = (
    EMBEDDING,
    HEAD,
    LINEAR,
    TRANSPOSED,
    EXPERTS,
    TRANSPOSED_EXPERTS,
    ROUTER,
    NORM,
    BIAS,
    CONVOLUTION,
    OTHER,
)
STACKS = (EXPERTS, TRANSPOSED_EXPERTS)
LIE_TRANSPOSED = (TRANSPOSED, TRANSPOSED_EXPERTS)
# Names that wrappers of a model, or of its parts, put in front of tensors: DataParallel and DDP, torch.compile, FSDP,
# recomputed activations.
WRAPPERS = re.compile(r"^(?:module\.)+|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?:module\.)*")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Dimensions that a stored tensor of a role has, where that matters: some are reshaped while they are loaded.
_DIMENSIONS = dict.fromkeys((EMBEDDING, HEAD, LINEAR, TRANSPOSED), (2,)) | dict.fromkeys(STACKS, (2, 3))
_PLANS = 8  # of an architecture that are remembered: checkpoint, base and artifacts name few sets of tensors
_ROUTER_NAMES = ("gate", "gating", "wg")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter, or stored buffer, of a model.

    Args:
        name: in the model in memory.
        role: one of `ROLES`.
        module: name of the module that owns it.
        kind: class of that module.
        shape: its shape.
        is_vocabulary: whether it has one row a token of the vocabulary.
    """

    name: str
    role: str
    module: str
    kind: str
    shape: tuple[int, ...]
    is_vocabulary: bool = False


@dataclass(frozen=True, slots=True)
class Conversion:
    """How some stored tensors become parameters.

    Args:
        sources: names in the checkpoint.
        targets: names in the model.
        patterns: for each source the pattern of transformers' mapping that it matched; None where a name is all that
            changes.
        rule: transformers' own `WeightConverter`, None where a name is all that changes.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    patterns: tuple[str, ...] | None = None
    rule: Any = None

    @property
    def renames(self) -> bool:
        """Whether the values stay as they are stored."""
        return self.rule is None

    def build(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """The parameters.

        Args:
            read: gives a stored tensor by its name.
            model: the model, or its layout.
        """
        if self.patterns is None:
            return {self.targets[0]: read(self.sources[0])}
        return _converted(self.rule, self.targets[0], zip(self.sources, self.patterns, strict=True), read, model)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How a checkpoint's tensors become a model.

    Args:
        conversions: every stored tensor that a parameter needs is in one of them.
        unneeded: stored names that the model does not load: buffers that it computes itself, parts that it lacks.
        missing: parameters that no stored tensor gives, tied ones not counted.
        tied: parameters that are others' values -> those.
    """

    conversions: tuple[Conversion, ...]
    unneeded: tuple[str, ...]
    missing: tuple[str, ...]
    tied: Mapping[str, str]
    by_source: Mapping[str, Conversion] = field(repr=False, default_factory=dict)
    by_target: Mapping[str, Conversion] = field(repr=False, default_factory=dict)

    def parameters_of(self, stored: str) -> tuple[str, ...]:
        """The parameters that a stored tensor is, or is a part of; none if the model does not load it."""
        found = self.by_source.get(stored)
        return () if found is None else found.targets

    def alike(self, parameter: str) -> tuple[str, ...]:
        """The parameters that have this one's values: itself, and those tied to it that nothing else gives."""
        of = self.tied.get(parameter, parameter)
        tied = (of, *(name for name, source in self.tied.items() if source == of))
        return (parameter, *(name for name in tied if name not in self.by_target and name != parameter))


class Architecture:
    """A model as transformers lays it out for a configuration.

    Args:
        config: a transformers configuration.
        text_only: leave out towers for images and sound, where transformers has a class for the language model alone.

    Raises:
        CheckpointError: transformers has no model that generates text for it.
    """

    def __init__(self, config: Any, *, text_only: bool = False) -> None:
        self.model_class = model_class(config, text_only=text_only)
        whole = not text_only or self.model_class is model_class(config)
        self.config = config if whole else config.get_text_config()
        self.text_config = config.get_text_config()
        self.model = self._lay_out()
        self.model.tie_weights()
        self.tied: Mapping[str, str] = dict(getattr(self.model, "all_tied_weights_keys", {}) or {})
        self._plans: dict[frozenset[str], LoadPlan] = {}

    def _lay_out(self) -> Any:
        try:
            with torch.device("meta"):
                return self.model_class._from_config(copy.deepcopy(self.config))
        except Exception as error:  # of values that do not fit together, a model raises whatever it likes
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            pad, tokens = (getattr(self.text_config, name, None) for name in ("pad_token_id", "vocab_size"))
            if isinstance(pad, int) and isinstance(tokens, int) and not -tokens <= pad < tokens:
                reason = f"pad_token_id: {pad} is none of its {tokens} tokens (vocab_size); correct it, or make it null"
            raise CheckpointError(
                f"{_file_of(self.config)}: transformers cannot lay out a {self.model_class.__name__} from it: {reason}"
            ) from error

    @property
    def is_multimodal(self) -> bool:
        """Whether the model has parts for images, sound or video beside its language model."""
        return self.text_config is not self.config

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        return dict(self.model.named_modules())

    @cached_property
    def embedding(self) -> str:
        """Name of the token embedding's module."""
        return self._name_of(self.model.get_input_embeddings(), "token embedding")

    @cached_property
    def head(self) -> str:
        """Name of the output embedding's module."""
        return self._name_of(self.model.get_output_embeddings(), "output embedding")

    def _name_of(self, module: nn.Module | None, what: str) -> str:
        found = next((name for name, other in self.modules.items() if other is module), None)
        if found is None:
            raise CheckpointError(f"{self.config.model_type}: {type(self.model).__name__} has no {what}")
        return found

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """Every parameter and stored buffer, tied ones included, by its name in the model."""
        return {name: self._part(name, tensor) for name, tensor in self.model.state_dict(keep_vars=True).items()}

    def _part(self, name: str, tensor: Tensor) -> Part:
        path, _, leaf = name.rpartition(".")
        module = self.modules[path]
        shape = tuple(tensor.shape)
        is_table = len(shape) == 2 and leaf == "weight" and path in (self.embedding, self.head)
        return Part(name, self._role(path, module, leaf, tensor), path, type(module).__name__, shape, is_table)

    def _role(self, path: str, module: nn.Module, leaf: str, tensor: Tensor) -> str:
        from transformers.pytorch_utils import Conv1D

        dimensions = tensor.dim()
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return OTHER
        if leaf.endswith("bias"):
            return BIAS
        if isinstance(module, nn.Embedding):
            return EMBEDDING if dimensions == 2 else OTHER
        if path == self.head and leaf == "weight":
            return HEAD
        if isinstance(module, _CONVOLUTIONS):
            return CONVOLUTION
        if isinstance(module, Conv1D) and dimensions == 2:
            return TRANSPOSED
        if "norm" in type(module).__name__.lower():
            return NORM
        if dimensions == 2 and self._routes(path, module, tensor):
            return ROUTER
        if isinstance(module, nn.Linear) and dimensions == 2:
            return LINEAR
        stacked = dimensions == 3 or (dimensions == 2 and self._expert_count > 1 and "expert" in path.lower())
        if stacked and min(tensor.shape[-2:]) > 1:
            return TRANSPOSED_EXPERTS if dimensions == 3 and self._is_transposed(module) else EXPERTS
        return NORM if dimensions == 1 and "norm" in leaf.lower() else OTHER

    @cached_property
    def _expert_count(self) -> int:
        counts = (getattr(self.text_config, name, None) for name in _EXPERT_COUNTS)
        return max((count for count in counts if isinstance(count, int)), default=1)

    def _routes(self, path: str, module: nn.Module, weight: Tensor) -> bool:
        """Whether a module gives one value an expert of the mixture."""
        if self._expert_count <= 1 or weight.shape[0] != self._expert_count:
            return False
        names = (type(module).__name__, *path.split(".")[-2:])
        return any(name.lower() in _ROUTER_NAMES or "router" in name.lower() for name in names)

    def _is_transposed(self, experts: nn.Module) -> bool:
        """Whether a module multiplies its inputs with the matrices of its stacks as they lie: [in, out] each."""
        said = getattr(experts, "is_transposed", None)
        if said is not None:
            return bool(said)
        # what leads from hidden states and what leads back to them, one after the other
        shapes = [tuple(stack.shape) for stack in experts.parameters(recurse=False) if stack.dim() == 3]
        width = self.text_config.hidden_size
        if len(shapes) != 2 or (shapes[0][-1] == width and shapes[1][-2] == width):
            return False
        return shapes[0][-2] == width and shapes[1][-1] == width

    def load_plan(self, stored: Collection[str]) -> LoadPlan:
        """How tensors of these names are loaded."""
        key = frozenset(stored)
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = _plan(self.model, self.parts, self.tied, key)
        return self._plans[key]

    def roles(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """The role of every stored tensor.

        Args:
            shapes: stored name -> shape. A piece of a stack of expert matrices that is stored alone is `linear`.
        """
        plan = self.load_plan(shapes)
        found = {}
        for name, shape in shapes.items():
            targets = plan.parameters_of(name)
            roles = {self.parts[target].role for target in targets}
            role = roles.pop() if len(roles) == 1 else LINEAR if roles and len(shape) == 2 else OTHER
            if role in STACKS and not plan.by_source[name].renames:
                role = LINEAR if len(shape) == 2 else self._stored_stack(role, shape, targets)
            found[name] = role if len(shape) in _DIMENSIONS.get(role, (len(shape),)) else OTHER
        return found

    def _stored_stack(self, role: str, shape: tuple[int, ...], targets: tuple[str, ...]) -> str:
        """The role of a stack that is changed while it is loaded: some are transposed."""
        swapped = (*shape[:-2], shape[-1], shape[-2])
        if any(self.parts[target].shape == swapped != shape for target in targets):
            return EXPERTS if role == TRANSPOSED_EXPERTS else TRANSPOSED_EXPERTS
        return role

    def vocabulary(self, stored: Collection[str]) -> set[str]:
        """Stored names of the tensors with one row a token."""
        plan = self.load_plan(stored)
        return {name for name in stored if any(self.parts[t].is_vocabulary for t in plan.parameters_of(name))}

    def stored_layout(self) -> dict[str, Tensor]:
        """What a saved checkpoint holds: stored name -> tensor on `meta`, tied ones once."""
        from transformers.core_model_loading import revert_weight_conversion

        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.tied}
        return dict(revert_weight_conversion(self.model, state))


def architecture_of(config: Any, *, text_only: bool = False) -> Architecture:
    """The architecture of a configuration; equal configurations share one.

    Raises:
        CheckpointError: see `Architecture`.
    """
    return _cached(_Key(config), text_only)


class _Key:
    """A configuration, equal to others that say the same."""

    def __init__(self, config: Any) -> None:
        self.config = config
        fields = config.to_dict() | {"_name_or_path": None}  # where it was read from
        self._text = json.dumps([type(config).__name__, fields], sort_keys=True, default=str)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other._text == self._text


@functools.lru_cache(maxsize=8)
def _cached(key: _Key, text_only: bool) -> Architecture:
    return Architecture(key.config, text_only=text_only)


def model_class(config: Any, *, text_only: bool = False) -> Any:
    """The class of transformers that loads a checkpoint whole: with its towers, if it has some.

    Args:
        text_only: the class for the language model alone, if there is one.

    Raises:
        CheckpointError: none generates text for this configuration.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    options = [
        mapping[type(config)]
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        if type(config) in mapping
    ]
    if not options:
        raise CheckpointError(
            f"{_file_of(config)}: model_type: {config.model_type!r}: transformers {transformers.__version__} has no "
            "model for it that generates text"
        )
    has_towers = config.get_text_config() is not config
    return options[0] if text_only or not has_towers else options[-1]


def _plan(model: Any, parts: Mapping[str, Part], tied: Mapping[str, str], stored: Collection[str]) -> LoadPlan:
    """As `convert_and_load_state_dict_in_model` of transformers takes a checkpoint's names apart."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix

    def target_of(name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            return rename_source_key(name, [], [], prefix, state)
        return renamed, pattern

    gathered: dict[tuple[str, str | None], list[tuple[str, str | None]]] = {}
    unneeded = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = target_of(unwrapped(name))
        if target not in state:
            unneeded.append(name)
            continue
        gathered.setdefault((target, None if pattern is None else "rule"), []).append((name, pattern))
    conversions = []
    given: set[str] = set()
    for (target, is_rule), sources in gathered.items():
        names = tuple(name for name, _ in sources)
        if is_rule is None:
            conversions.append(Conversion(names[-1:], (target,)))
            given.add(target)
            continue
        patterns = tuple(str(pattern) for _, pattern in sources)
        rule = by_pattern[patterns[0]]
        targets = _targets(rule, target, names, patterns, model, state)
        conversions.append(Conversion(names, targets, patterns, rule))
        given |= set(targets)
    missing = tuple(
        name for name in parts if name not in given and name not in tied and tied.get(name, name) not in given
    )
    # symmetric, as transformers does it: a head that is stored without its embedding gives both
    reverse = {source for target, source in tied.items() if target in given}
    return LoadPlan(
        tuple(conversions),
        tuple(unneeded),
        tuple(name for name in missing if name not in reverse),
        tied,
        {name: conversion for conversion in conversions for name in conversion.sources},
        {name: conversion for conversion in conversions for name in conversion.targets},
    )


def _targets(
    rule: Any,
    first: str,
    names: tuple[str, ...],
    patterns: tuple[str, ...],
    model: Any,
    state: Mapping[str, Tensor],
) -> tuple[str, ...]:
    """The parameters that a conversion gives, by its target patterns."""
    if len(rule.target_patterns) == 1:
        return (first,)
    prefix, found, suffix = first.partition(rule.target_patterns[0])
    if not found:
        return (first,)
    named = tuple(f"{prefix}{pattern}{suffix}" for pattern in rule.target_patterns)
    return tuple(name for name in named if name in state)


def _converted(
    rule: Any, first: str, sources: Iterable[tuple[str, str]], read: Callable[[str], Tensor], model: Any
) -> dict[str, Tensor]:
    chosen = copy.deepcopy(rule)
    for name, pattern in sources:
        chosen.add_tensor(first, name, pattern, read(name))
    made = chosen.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def as_matrix(tensor: Tensor, role: str) -> Tensor:
    """A tensor as the matrix that its delta is coded as: a row for each output, a column for each input channel.

    The matrices of a stack lie one under the other.

    Args:
        tensor: of at least one dimension, as it is stored.
        role: one of `ROLES`.

    Returns:
        [rows, columns], a view where that is possible.
    """
    tensor = tensor.mT if role in LIE_TRANSPOSED else tensor
    return tensor.reshape(-1, tensor.shape[-1])


def from_matrix(matrix: Tensor, shape: tuple[int, ...], role: str) -> Tensor:
    """The way back from `as_matrix`.

    Args:
        matrix: [rows, columns].
        shape: the tensor's.
        role: one of `ROLES`.
    """
    if role not in LIE_TRANSPOSED:
        return matrix.reshape(shape)
    return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).mT


def matrix_shape(shape: tuple[int, ...], role: str) -> tuple[int, int]:
    """Rows and columns of `as_matrix` for a tensor of this shape; of one without dimensions, none."""
    if not shape:
        return 1, 0
    if role in LIE_TRANSPOSED:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return math.prod(shape[:-1]), shape[-1]


def _file_of(config: Any) -> str:
    """Where a configuration was read from, for messages."""
    source = str(getattr(config, "name_or_path", "") or "")
    return source if source.endswith(".json") else f"{source}/config.json" if source else "config.json"


def unwrapped(name: str) -> str:
    """A tensor's name without what DataParallel, DDP, FSDP and torch.compile put in it."""
    return WRAPPERS.sub("", name)


@functools.cache
def _facts() -> dict[str, Any]:
    from importlib.resources import files

    facts: dict[str, Any] = json.loads(files("meswitch").joinpath("architectures.json").read_text())
    return facts


@dataclass(frozen=True)
class Tried:
    """What came of trying everything with small models of a model type.

    Args:
        transformers: the version that was tried; another may run a model type in another way.
        compressed: whether fine-tunes of it are compressed, verified, merged and loaded.
        calibrated: whether compression can be calibrated.
        uncalibrated: why not.
        runner: how the embedded engine serves it, `batch` or `turns`; None if not at all.
        reason: why not the batch.
    """

    transformers: str
    compressed: bool
    calibrated: bool
    uncalibrated: str | None
    runner: str | None
    reason: str | None


def tried(model_type: str) -> Tried | None:
    """What is known of a model type; None if it was not tried: it is then proven when it is compressed and served."""
    fact = _facts()["model_types"].get(model_type)
    if fact is None:
        return None
    return Tried(_facts()["transformers"], *(fact[field.name] for field in dataclasses.fields(Tried)[1:]))
