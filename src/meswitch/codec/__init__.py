"""Tensors in, named tensors out: quantisers, packing, the salient split. No models, no files."""

from meswitch.codec.delta import PackedDelta, Spec, encode, stored_shapes
from meswitch.codec.packing import pack, packed_words, unpack
from meswitch.codec.quantize import absmax_scales, dequantize, mse_scales, quantize
from meswitch.codec.salient import reconstruction_error, select_salient

__all__ = [
    "PackedDelta",
    "Spec",
    "absmax_scales",
    "dequantize",
    "encode",
    "mse_scales",
    "pack",
    "packed_words",
    "quantize",
    "reconstruction_error",
    "select_salient",
    "stored_shapes",
    "unpack",
]
