"""The default method as a codec: low-bit codes, scales and salient channels (`codec.delta`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meswitch.codec.delta import Spec, encode, packed_from, stored_shapes, with_all_rows
from meswitch.codec.registry import CodecRequest, CodedDelta, Meta, Parameter, Shapes, Sharing, Trainable, register


def _as_asked(spec: Spec) -> Spec:
    return spec


@dataclass(frozen=True, slots=True)
class PackedCodec:
    """A codec whose tensors the kernels read, so that its artifacts can be served.

    Args:
        name: as the manifest records it.
        uses_inputs: whether calibration text makes a difference to the codes.
        adapt: makes the spec of the method from the one that was asked for.
    """

    name: str
    uses_inputs: bool = True
    adapt: Callable[[Spec], Spec] = _as_asked
    fields: tuple[str, ...] = ("bits", "group_size", "salient", "live")
    parameters: tuple[Parameter, ...] = ()
    bits: int | None = None
    blocks_only: bool = False
    is_trainable: bool = True
    recipe: Any = None
    sharing: Sharing | None = None

    def check(self, request: CodecRequest) -> None:
        """Nothing to refuse: `Spec` checks itself."""

    def encode(
        self, delta: Tensor, moment: Tensor | None, request: CodecRequest
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        spec = self.adapt(request.spec)
        parts = encode(delta, spec, name=self.name, second_moment=moment if self.uses_inputs else None).tensors()
        index = parts.get("salient_index")
        meta = {"bits": spec.bits, "group_size": spec.group_size or 0, "salient": 0 if index is None else len(index)}
        return parts, meta | {"live": len(parts["weight_packed"])}

    def decode(self, parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
        whole = with_all_rows(parts, rows)
        return packed_from(whole, width, bits=meta["bits"], group_size=meta["group_size"] or None).dequantize()

    def shapes(self, rows: int, width: int, meta: Meta) -> Shapes:
        spec = Spec(meta["bits"], meta["group_size"] or None, meta["salient"])
        found = stored_shapes(meta["live"], width, spec, 0, torch.float32)
        return found if meta["live"] == rows else found | {"row_index": ((meta["live"],), torch.int32)}

    def trainable(
        self, base: Tensor, delta: CodedDelta, recipe: Any, device: torch.device, dtype: torch.dtype
    ) -> Trainable:
        raise TypeError(f"{self.name}: packed deltas are trained as such (`compression.distill.student`)")


ME_SWITCH = register(PackedCodec("me-switch"))
