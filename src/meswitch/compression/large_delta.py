"""Fine-tunes that moved far from the base: which matrices, and what to do about it.

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

LARGE = 0.3  # ||delta|| / ||base||; fine-tunes of 7B models move by 0.01 to 0.05
NAMED = 3


def relative_norm(delta: Tensor, base: Tensor) -> float:
    """||delta|| / ||base||, Frobenius; infinite where only the base is zero. delta, base: [rows, in_features]."""
    change, size = (torch.linalg.vector_norm(tensor, dtype=torch.float32).item() for tensor in (delta, base))
    return change / size if size else float("inf") if change else 0.0


@dataclass(slots=True)
class LargeDeltas:
    """The relative norm of every delta that was quantised, by tensor name."""

    norms: dict[str, float] = field(default_factory=dict)

    def see(self, name: str, delta: Tensor, base: Tensor) -> None:
        self.norms[name] = relative_norm(delta, base)

    def see_resumed(self, entries: Mapping[str, Entry], expert: Checkpoint, base: Checkpoint) -> None:
        """Read again what an earlier, interrupted run quantised, so that a resumed one says the same."""
        for name, entry in entries.items():
            if entry.kind in ("packed", "coded") and name not in self.norms:
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
