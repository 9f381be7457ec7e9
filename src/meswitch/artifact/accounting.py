"""Where an artifact's bytes are, by kind of content and by layer type."""

from dataclasses import asdict, dataclass
from typing import Any

from meswitch.artifact.reader import Artifact

# By the suffix of the stored name; baselines have more codes (`..._packed`) and scales (`..._scale`).
_CONTENT = {
    "weight_packed": "codes",
    "weight_scale": "scales",
    "weight_shape": "shapes",
    "salient_index": "salient channels",
    "salient_weight": "salient channels",
    "weight_extra": "added rows",
    "row_index": "row indices",
    "weight_left": "low-rank pairs",
    "weight_right": "low-rank pairs",
    "weight_exact": "exact changes",
    "weight_blocks": "tables of blocks",
    "mask_packed": "sparsity pattern",
    "index_packed": "sparsity pattern",
    "factor_left": "factors",
    "factor_right": "factors",
}


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """One layer type: its parameters, bytes and bits per weight."""

    layer: str
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * 8 / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, slots=True)
class Accounting:
    """`by_content` and `by_layer` each add up to the artifact's tensor bytes."""

    by_content: dict[str, int]
    by_layer: tuple[LayerBytes, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; every layer type with its bits per weight."""
        by_layer = [asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in self.by_layer]
        return {"by_content": self.by_content, "by_layer": by_layer}


def account(artifact: Artifact) -> Accounting:
    """Sum the artifact's tensor bytes both ways."""
    content: dict[str, int] = {}
    layers: dict[str, list[int]] = {}
    for name, entry in artifact.manifest.tensors.items():
        for suffix, part in entry.stored.items():
            kind = _content(suffix)
            content[kind] = content.get(kind, 0) + part.bytes
        parameters = 1
        for size in entry.shape:
            parameters *= size
        total = layers.setdefault(layer_type(name), [0, 0])
        total[0] += parameters
        total[1] += entry.bytes
    by_layer = tuple(LayerBytes(layer, *numbers) for layer, numbers in layers.items())
    return Accounting(content, by_layer)


def _content(suffix: str) -> str:
    if not suffix:
        return "exact tensors"
    return _CONTENT.get(suffix) or ("scales" if suffix.endswith("_scale") else "codes")


def layer_type(tensor: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `self_attn.q_proj`."""
    parts = [part for part in tensor.split(".") if not part.isdigit()]
    parts = [part for part in parts if part not in ("model", "layers", "weight", "transformer", "h")]
    return ".".join(parts) or tensor
