"""Fine-tunes that moved far from the base: which matrices, what to do about it, and when it is another model's base.

Rounding leaves an error in proportion to the delta, so a matrix whose delta is large against its weights is hurt more
than the rest (D-QRELO, arXiv 2604.16940, finds that delta compression fails there first).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meswitch.architecture import as_matrix
from meswitch.artifact.manifest import Entry
from meswitch.checkpoint import Checkpoint
from meswitch.errors import IncompatibleError
from meswitch.loaded import BuiltTensor

LARGE = 0.3  # ||delta|| / ||base||; fine-tunes of 7B models move by 0.01 to 0.05
SMALL = 0.05
ANOTHER_BASE = 1.2  # two matrices that have nothing to do with each other differ by 1.41 of their norm
NAMED = 3
_SAMPLED = 12  # matrices
_ROWS = 64  # of each, from several places


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
