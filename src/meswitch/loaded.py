"""A checkpoint as its model loads it, however it is stored.

The same model is stored in many ways: with buffers that nobody needs, with or without the prefix of the base model,
with what DataParallel or torch.compile put before each name, its tied head once or twice, its expert matrices one by
one or in a stack. What is loaded alike counts as alike (`alike`), and is known by one name (`as_loaded`).
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from meswitch.architecture import WRAPPERS, Architecture, Conversion, LoadPlan, architecture_of, unwrapped
from meswitch.checkpoint import Checkpoint
from meswitch.configuration import without_quantisation
from meswitch.errors import CheckpointError, listed
from meswitch.lazymodel import LazyModel, attend_at_any_length
from meswitch.tensorfile import BuiltTensor, TensorInfo

_PREFIX_PARTS = 3  # parts of a name that may stand before all names
_BLOCK = 16 << 20  # bytes that are compared at a time


def as_loaded(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors that the model loads, under the names that a saved checkpoint has.

    A checkpoint that transformers saved keeps its names. What the model does not load is `left_out`, and a tied head
    that is stored as well is in `aliases`.

    Raises:
        CheckpointError: transformers has no model for the configuration, two stored tensors are one parameter, or a
            parameter is not stored: transformers would fill it with random numbers.
    """
    if not checkpoint.is_stored:
        return checkpoint
    architecture = architecture_of(checkpoint.config)
    layout = architecture.stored_layout()
    if set(layout) == set(checkpoint.tensors):
        aliases = {
            _saved_name(architecture, name): _saved_name(architecture, of) for name, of in architecture.tied.items()
        }
        _check_shapes(checkpoint, {name: tuple(layout[name].shape) for name in layout})
        return replace(checkpoint, ties=aliases, is_stored=False)
    bare, plan = _names(checkpoint, architecture)
    _check_shapes(
        checkpoint,
        {
            bare[conversion.sources[0]]: architecture.parts[conversion.targets[0]].shape
            for conversion in plan.conversions
            if conversion.renames
        },
    )
    _check_pieces(checkpoint, bare, plan, architecture)
    named = _saved_names(plan, architecture.load_plan(layout), architecture)
    tensors: dict[str, TensorInfo] = {}
    for name, new in named.items():
        if new in tensors:
            raise CheckpointError(
                f"{checkpoint.directory}: {tensors[new].name} and {bare[name]} are one parameter; save the model anew"
            )
        tensors[new] = replace(checkpoint.tensors[bare[name]], name=new)
    aliases = _tie(tensors, plan, named, architecture)
    left_out = tuple(bare[name] for name in plan.unneeded)
    return replace(checkpoint, tensors=dict(sorted(tensors.items())), ties=aliases, left_out=left_out, is_stored=False)


def alike(base: Checkpoint, expert: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both as they are loaded, under names that are the same where the parameters are.

    Where one stores a parameter in pieces and the other whole, both get the parameter itself, under its name in the
    model. An expert with a tied head whose base has one of its own gets the head as a tensor.

    Raises:
        CheckpointError: see `as_loaded`.
    """
    ours, theirs = base.loaded, expert.loaded
    content = ours.tensors
    own = {head: replace(theirs.tensors[of], name=head) for head, of in theirs.aliases.items() if head in ours.tensors}
    if own:
        rest = {head: of for head, of in theirs.aliases.items() if head not in own}
        theirs = replace(theirs, tensors=dict(sorted((*theirs.tensors.items(), *own.items()))), ties=rest)
    for left, right in ((ours, theirs), (theirs, ours)):
        if any(right.info(name) is None for name in left.tensors):
            ours, theirs = _in_parameters(ours, theirs)
            break
    return replace(ours, content=base.content or content), theirs


def find(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    """A tensor that is not stored under this name: by its name in a saved checkpoint, or in the model."""
    try:
        loaded = checkpoint.loaded
    except CheckpointError:
        return None
    found = loaded.info(name)
    if found is not None:
        return found
    conversion = next((c for c in loaded.load_plan.conversions if name in c.targets), None)
    return None if conversion is None else _parameters(loaded, conversion)[name]


def _names(checkpoint: Checkpoint, architecture: Architecture) -> tuple[dict[str, str], LoadPlan]:
    """Names without what stands before all of them -> stored names; and how those are loaded."""
    bare: dict[str, str] = {}
    for name in checkpoint.tensors:
        other = bare.setdefault(unwrapped(name), name)
        if other != name:
            raise CheckpointError(f"{checkpoint.directory}: {other} and {name} are one parameter; save the model anew")
    plan = architecture.load_plan(bare)
    lacking = _lacking(plan, architecture)
    if not lacking:
        return bare, plan
    for prefix in _prefixes(plan.unneeded):
        shorter = {name.removeprefix(prefix): stored for name, stored in bare.items()}
        shorter_plan = architecture.load_plan(shorter)
        if not _lacking(shorter_plan, architecture):
            return shorter, shorter_plan
    model = type(architecture.model).__name__
    raise CheckpointError(
        f"{checkpoint.directory}: lacks {listed(lacking)}, which {model} needs: transformers would fill in random "
        "numbers; save the whole model"
        + (f" (stored, and not loaded: {listed(plan.unneeded)})" if plan.unneeded else "")
        + (
            "; if its head is its embedding, say `tie_word_embeddings: true` in config.json"
            if lacking == [f"{architecture.head}.weight"]
            else ""
        )
    )


def load_model(
    checkpoint: Checkpoint,
    architecture: Architecture,
    dtype: Any,
    *,
    prepare: Callable[[LazyModel, Checkpoint], None] | None = None,
    **options: Any,
) -> Any:
    """A checkpoint's model, loaded by transformers.

    Args:
        architecture: the checkpoint's, or that of its language model alone.
        dtype: as `from_pretrained` takes it.
        prepare: as of `dequantised`, for a quantised checkpoint only.
        options: for `from_pretrained` too.

    Raises:
        CheckpointError: a parameter is not stored: transformers would fill it with random numbers.
    """
    if checkpoint.is_quantised:
        return dequantised(checkpoint, architecture, dtype, prepare=prepare, **options)
    import transformers

    attend_at_any_length()
    model, found = architecture.model_class.from_pretrained(
        checkpoint.directory,
        config=copy.deepcopy(architecture.config),
        key_mapping=_taken_out(checkpoint) or None,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    if absent := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{checkpoint.directory}: {type(model).__name__}: {listed(absent)} not stored under a name that "
            f"transformers {transformers.__version__} loads; fetch the checkpoint again, or save it with this version"
        )
    return model


def dequantised(
    checkpoint: Checkpoint,
    architecture: Architecture,
    dtype: Any,
    *,
    attn_implementation: str | None = None,
    prepare: Callable[[LazyModel, Checkpoint], None] | None = None,
) -> Any:
    """The model of a quantised checkpoint, with the weights that its codes stand for. It is no longer quantised.

    Args:
        checkpoint: with codes in its files.
        architecture: of all of it, of its language model, or of its first layers.
        dtype: as `from_pretrained` takes it.
        attn_implementation: likewise.
        prepare: is given the model before its weights are read, and the checkpoint under the names that it loads; a
            module that is put in another's place there is left as it is.

    Raises:
        CheckpointError: they are not read.
    """
    if not checkpoint.holds_weights:
        raise CheckpointError(f"{checkpoint.directory}: {checkpoint.unread_reason}; give the checkpoint in 16 bit")
    loaded = checkpoint.loaded
    config = without_quantisation(architecture.config)
    kept = getattr(config, "dtype", None) or torch.bfloat16
    weights = LazyModel(
        config,
        loaded.tensors,
        loaded.read,
        checkpoint.directory,
        torch.device("cpu"),
        kept if dtype == "auto" else dtype,
    )
    if prepare is not None:
        prepare(weights, loaded)
    model = weights.load().requires_grad_(True)  # as `from_pretrained` gives it
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model


def _taken_out(checkpoint: Checkpoint) -> dict[str, str]:
    """What stored names carry that transformers does not know, as `key_mapping` of `from_pretrained` takes it out."""
    bare, _ = _names(checkpoint, architecture_of(checkpoint.config))
    patterns: dict[str, str] = {}
    for name, stored in bare.items():
        plain = unwrapped(stored)
        if plain != stored:
            patterns[WRAPPERS.pattern] = ""
        if plain != name:
            patterns[f"^{re.escape(plain.removesuffix(name))}"] = ""
    return patterns


def _check_shapes(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        info = checkpoint.tensors[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: {name}: shape {list(info.shape)}, but config.json makes it {list(shape)}; correct the "
                "configuration (vocab_size, if these are tokens), or save the model anew"
            )


def _check_pieces(checkpoint: Checkpoint, bare: Mapping[str, str], plan: LoadPlan, architecture: Architecture) -> None:
    """Refuse matrices that are not as many as the stack that they are loaded into holds."""
    for conversion in plan.conversions:
        if conversion.renames:
            continue
        pieces = [checkpoint.tensors[bare[name]] for name in conversion.sources]
        given = sum(math.prod(piece.shape) for piece in pieces)
        wanted = sum(math.prod(architecture.parts[name].shape) for name in conversion.targets)
        if given != wanted:
            raise CheckpointError(
                f"{checkpoint.directory}: {conversion.targets[0]}: its {len(pieces)} pieces ({pieces[0].name}, ...) "
                f"hold {given} numbers, but config.json makes them {wanted}: some are missing, or of another shape; "
                "fetch the checkpoint again, or save the whole model"
            )


def _lacking(plan: LoadPlan, architecture: Architecture) -> list[str]:
    """Parameters that nothing gives and that the model does not do without."""
    parameters = {name for name, _ in architecture.model.named_parameters()}
    optional = getattr(architecture.model, "_keys_to_ignore_on_load_missing", None) or ()
    return [
        name
        for name in plan.missing
        if name in parameters and not any(re.search(pattern, name) for pattern in optional)
    ]


def _prefixes(names: Iterable[str]) -> Iterator[str]:
    """What may stand before all of these names: `language_model.`, `model.language_model.`; short ones first."""
    parts = [name.split(".") for name in names]
    for depth in range(1, _PREFIX_PARTS + 1):
        yield from dict.fromkeys(".".join(name[:depth]) + "." for name in parts if len(name) > depth)


def _saved_names(plan: LoadPlan, saved: LoadPlan, architecture: Architecture) -> dict[str, str]:
    """Name of a tensor that the model loads -> the name that a saved checkpoint has for it.

    Args:
        plan: how the tensors are loaded.
        saved: how those of a saved checkpoint are.
    """
    as_saved = {conversion.targets: conversion.sources for conversion in saved.conversions if conversion.renames}
    found: dict[str, str] = {}
    for conversion in plan.conversions:
        if conversion.renames:
            targets = conversion.targets
            name = as_saved[targets][0] if targets in as_saved else _saved_name(architecture, targets[0])
            found[conversion.sources[0]] = name
        else:
            found |= {name: name for name in conversion.sources}
    return found


def _saved_name(architecture: Architecture, parameter: str) -> str:
    """The name of a parameter in a saved checkpoint; its own if it is stored in pieces."""
    from transformers.core_model_loading import revert_weight_conversion

    names = revert_weight_conversion(architecture.model, {parameter: architecture.model.state_dict()[parameter]})
    return next(iter(names)) if len(names) == 1 else parameter


def _tie(
    tensors: dict[str, TensorInfo], plan: LoadPlan, named: Mapping[str, str], architecture: Architecture
) -> dict[str, str]:
    """Names without a tensor of their own -> the names whose tensors they are. Copies are taken out of `tensors`.

    As transformers ties: of two that are stored both stay if they differ, and one that is stored alone gives both.
    """
    stored = {
        conversion.targets[0]: named[conversion.sources[0]] for conversion in plan.conversions if conversion.renames
    }
    aliases = {}
    for tied, of in architecture.tied.items():
        copy, original = stored.get(tied), stored.get(of)
        if copy is not None and original is not None:
            if not _equal(tensors[copy], tensors[original]):
                continue
            del tensors[copy]
        elif copy is not None:
            original = _saved_name(architecture, of)
            tensors[original] = replace(tensors.pop(copy), name=original)
        elif original is None:
            continue
        aliases[copy or _saved_name(architecture, tied)] = original
    return aliases


def _equal(one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(
        one.read_bytes(start, count) == other.read_bytes(start, count)
        for start in range(0, one.nbytes, _BLOCK)
        for count in (min(_BLOCK, one.nbytes - start),)
    )


def _in_parameters(base: Checkpoint, expert: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both with parameters of the model in place of the stored tensors that only one of them has."""
    sides = (base, expert)
    plans = [side.load_plan for side in sides]
    unlike = {
        parameter
        for side, other, plan in zip(sides, reversed(sides), plans, strict=True)
        for name in side.tensors
        if other.info(name) is None
        for parameter in plan.parameters_of(name)
    }
    grouped = [{*conversion.targets} for plan in plans for conversion in plan.conversions]
    while grown := {name for group in grouped if group & unlike for name in group - unlike}:
        unlike |= grown
    found = []
    for side, plan in zip(sides, plans, strict=True):
        tensors = dict(side.tensors)
        for conversion in plan.conversions:
            if unlike.isdisjoint(conversion.targets):
                continue
            for name in conversion.sources:
                tensors.pop(name)
            tensors |= _parameters(side, conversion)
        found.append(replace(side, tensors=dict(sorted(tensors.items()))))
    return found[0], found[1]


def _parameters(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, TensorInfo]:
    """What a conversion gives: name of a parameter -> where it is, or how it is made."""
    architecture = architecture_of(checkpoint.config)
    first = checkpoint.tensors[conversion.sources[0]]
    if conversion.renames:
        return {conversion.targets[0]: replace(first, name=conversion.targets[0])}

    def make(name: str) -> Callable[[], Tensor]:
        return lambda: conversion.build(checkpoint.read, architecture.model)[name]

    found: dict[str, TensorInfo] = {}
    for name in conversion.targets:
        shape = architecture.parts[name].shape
        nbytes = math.prod(shape) * first.dtype.itemsize
        found[name] = BuiltTensor(name, first.dtype, shape, checkpoint.directory, 0, nbytes, make(name))
    return found
