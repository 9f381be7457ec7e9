"""Can this expert share the base in one batch? If not, say which field or tensor is in the way."""

import re

from meswitch.architecture import architecture_of
from meswitch.checkpoint import Checkpoint
from meswitch.config_fields import INACTIVE, TRAINING, UNREAD, config_differences
from meswitch.errors import IncompatibleError, listed
from meswitch.loaded import alike
from meswitch.tensorfile import WEIGHT_DTYPES

_PAIR = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")


def matched(base: Checkpoint, expert: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both as their model loads them, under names that are the same where the parameters are.

    Raises:
        IncompatibleError: the two cannot share a base: naming the field or the tensor.
        CheckpointError: one of them cannot be read, or lacks a parameter.
    """
    check_same_computation(base, expert)
    base, expert = alike(base, expert)
    check_same_tensors(base, expert)
    return base, expert


def remarks(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """What of a matched pair is not used, in a line each: fields without effect, files and tensors beside the model."""
    found = [*base.remarks, *expert.remarks]
    fields = [
        f"{item.field} ({item.base!r}, {item.expert!r})"
        for item in config_differences(base.config, expert.config)
        if item.reason in (INACTIVE, TRAINING, UNREAD)
    ]
    if fields:
        found.append(f"config.json: differs in fields that change nothing here (base's, expert's): {', '.join(fields)}")
    for checkpoint in (base, expert):
        if checkpoint.left_out:
            found.append(
                f"{checkpoint.directory}: left out, as the model does not load them: {listed(checkpoint.left_out)}"
            )
    return found


def check_same_computation(base: Checkpoint, expert: Checkpoint) -> None:
    """Refuse a pair whose configurations compute different things, or whose weights are not there as numbers.

    Raises:
        IncompatibleError: naming the field and both values.
    """
    for checkpoint in (base, expert):
        if checkpoint.is_quantised:
            raise IncompatibleError(
                f"{checkpoint.directory}/config.json: quantization_config: a delta is taken between weights; give the "
                "checkpoint in 16 bit that this was made from"
            )
    file = f"{expert.directory}/config.json"
    if expert.config.model_type != base.config.model_type:
        part = getattr(base.config, "text_config", None)
        hint = ""
        if getattr(part, "model_type", None) == expert.config.model_type:
            hint = "; it is the type of the base's language model alone: give a base without the other parts"
        raise IncompatibleError(
            f"{file}: model_type: the expert has {expert.config.model_type!r}, the base {base.config.model_type!r}; "
            f"they are different models{hint}"
        )
    changed = [item for item in config_differences(base.config, expert.config) if item.changes_computation]
    if changed:
        named = "; ".join(f"{item.field}: the expert has {item.expert!r}, the base {item.base!r}" for item in changed)
        raise IncompatibleError(
            f"{file}: {named}; the model reads it, so they cannot share one batch. If the weights do not depend on it, "
            "set it to the base's value"
        )


def check_same_tensors(base: Checkpoint, expert: Checkpoint) -> None:
    """Refuse a pair whose tensors do not correspond (rows of the vocabulary may differ).

    Raises:
        IncompatibleError: naming the tensor.
    """
    for checkpoint in (base, expert):
        _check_weights(checkpoint)
    vocabulary = architecture_of(expert.config).vocabulary(expert.tensors)
    for name, info in expert.tensors.items():
        theirs = base.info(name)
        if theirs is None:
            raise IncompatibleError(f"{expert.directory}: tensor {name} has no counterpart in {base.directory}")
        same_width = len(info.shape) == 2 and info.shape[1:] == theirs.shape[1:]
        if info.shape != theirs.shape and not (same_width and name in vocabulary):
            raise IncompatibleError(
                f"{expert.directory}: tensor {name}: shape {list(info.shape)} against the base's {list(theirs.shape)}"
            )
    for name in base.tensors:
        if expert.info(name) is None:
            raise IncompatibleError(f"{expert.directory}: lacks the tensor {name} of {base.directory}")


def _check_weights(checkpoint: Checkpoint) -> None:
    """Refuse what is stored as something else than numbers of 16 bit or more, whether the configuration says so or not,
    and weights that are not whole without the LoRA pairs beside them.

    Raises:
        IncompatibleError: naming the tensor.
    """
    pairs = [name for name in checkpoint.left_out if _PAIR.search(name)]
    if pairs:
        raise IncompatibleError(
            f"{checkpoint.directory}: {listed(pairs)}: LoRA pairs beside the weights, which no model loads; merge them "
            "(`merge_and_unload` of PEFT) and save the model again"
        )
    values = architecture_of(checkpoint.config).model.state_dict()
    for conversion in checkpoint.load_plan.conversions:
        if not all(values[target].is_floating_point() for target in conversion.targets):
            continue
        for name in conversion.sources:
            info = checkpoint.tensors[name]
            if info.dtype not in WEIGHT_DTYPES:
                raise IncompatibleError(
                    f"{info.file}: {name}: holds {str(info.dtype).removeprefix('torch.')} where the model has weights, "
                    "so it is quantised; give the checkpoint in 16 bit that this was made from"
                )
