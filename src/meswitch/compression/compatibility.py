"""Can this expert share the base in one batch? If not, say which field or tensor is in the way.

A fine-tune may also have moved far from the base. Rounding leaves an error in proportion to the delta, so a matrix
whose delta is large against its weights is hurt more than the rest (D-QRELO, arXiv 2604.16940, finds that delta
compression fails there first): those are named. Where all matrices moved that far, it is a fine-tune of another base.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meswitch.architecture import architecture_of, as_matrix
from meswitch.artifact.manifest import Entry
from meswitch.checkpoint import Checkpoint
from meswitch.configuration import INACTIVE, TRAINING, UNREAD, config_differences
from meswitch.errors import IncompatibleError, listed
from meswitch.loaded import alike
from meswitch.tensorfile import WEIGHT_DTYPES, BuiltTensor

_PAIR = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")
LARGE = 0.3  # ||delta|| / ||base||; fine-tunes of 7B models move by 0.01 to 0.05
SMALL = 0.05
ANOTHER_BASE = 1.2  # two matrices that have nothing to do with each other differ by 1.41 of their norm
NAMED = 3
_SAMPLED = 12  # matrices
_ROWS = 64  # of each, from several places


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
    if not base.holds_weights:
        raise IncompatibleError(
            f"{base.directory}/config.json: quantization_config: {base.unread_reason}; give the checkpoint in 16 bit "
            "that this was made from"
        )
    if expert.is_quantised:
        raise IncompatibleError(
            f"{expert.directory}/config.json: quantization_config: a delta is taken from an expert's own weights; give "
            "the checkpoint in 16 bit that this was made from"
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


def relative_norm(delta: Tensor, base: Tensor) -> float:
    """||delta|| / ||base||, Frobenius; infinite where only the base is zero. delta, base: [rows, in_features]."""
    change, size = (torch.linalg.vector_norm(tensor, dtype=torch.float32).item() for tensor in (delta, base))
    return change / size if size else float("inf") if change else 0.0


def check_same_base(base: Checkpoint, expert: Checkpoint) -> None:
    """Refuse a fine-tune of another base, from a few rows of a few matrices.

    Args:
        base: matched with the expert (`compatibility.matched`).
        expert: the fine-tune.

    Raises:
        IncompatibleError: every matrix that was looked at moved by `ANOTHER_BASE` of its norm or more.
    """
    matrices = [
        name
        for name, info in expert.tensors.items()
        if len(info.shape) == 2 and min(info.shape) > 1 and (theirs := base.info(name)) and theirs.shape == info.shape
        if info.dtype.is_floating_point and not isinstance(info, BuiltTensor)
    ]
    step = max(1, len(matrices) // _SAMPLED)
    moved = []
    for name in matrices[::step]:
        original = _some_rows(base, name)
        moved.append(relative_norm(_some_rows(expert, name) - original, original))
        if not moved[-1] >= ANOTHER_BASE:  # NaN tells nothing of bases
            return
    if moved:
        raise IncompatibleError(f"{another_base(expert, len(moved), min(moved))}, or --force (force=True) to go on")


def another_base(expert: Checkpoint, count: int, least: float) -> str:
    """What is said of an expert whose matrices have nothing to do with the base's. least: relative norm of a delta."""
    return (
        f"{expert.directory}: is no fine-tune of this base: all {count} matrices that were compared moved by "
        f"{least:.2f} of their norm or more, as in two models trained apart; give the base that it was trained from"
    )


def _some_rows(checkpoint: Checkpoint, name: str) -> Tensor:
    """[at most _ROWS, in_features] float32: rows from the start, the middle and the end."""
    info = checkpoint.info(name)
    assert info is not None
    rows, width = info.shape
    count = min(_ROWS // 4, rows)
    nbytes = width * info.dtype.itemsize
    starts = sorted({(rows - count) * part // 3 for part in range(4)})
    data = b"".join(info.read_bytes(start * nbytes, count * nbytes) for start in starts)
    return torch.frombuffer(bytearray(data), dtype=info.dtype).reshape(-1, width).float()


@dataclass(slots=True)
class LargeDeltas:
    """The relative norm of every delta that was quantised, by tensor name."""

    norms: dict[str, float] = field(default_factory=dict)

    def see(self, name: str, delta: Tensor, base: Tensor) -> None:
        self.norms[name] = relative_norm(delta, base)

    def see_resumed(self, entries: Mapping[str, Entry], expert: Checkpoint, base: Checkpoint) -> None:
        """Read again what an earlier, interrupted run quantised, so that a resumed one says the same."""
        for name, entry in entries.items():
            if entry.kind in ("packed", "lowrank", "coded") and name not in self.norms:
                ours, theirs = (as_matrix(side.read(name), entry.role)[: entry.base_rows] for side in (expert, base))
                self.see(name, ours.float() - theirs.float(), theirs)

    @property
    def large(self) -> dict[str, float]:
        """Those of at least `LARGE`, the worst first."""
        worst_first = sorted(self.norms.items(), key=lambda item: (-item[1], item[0]))
        return {name: norm for name, norm in worst_first if norm >= LARGE}

    def warning(self, bits: int | None) -> str | None:
        """One line that names the worst and says what helps; None if all deltas are small."""
        large = self.large
        if not large:
            return None
        named = ", ".join(f"{name.removesuffix('.weight')} ({norm:.2f})" for name, norm in list(large.items())[:NAMED])
        more = f" and {len(large) - NAMED} more" if len(large) > NAMED else ""
        advice = "more bits keep them closer" if bits is None or bits < 4 else "they lose most"
        return (
            f"large deltas: {len(large)} of {len(self.norms)} matrices moved by {LARGE} of their norm or more: "
            f"{named}{more}; {advice} (`meswitch diff` shows all, `meswitch eval` what it costs)"
        )
