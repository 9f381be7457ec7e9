"""Tensors in, named tensors out: quantisers, packing, the salient split, codecs by name. No models, no files."""

from meswitch.codec.delta import (
    PackedDelta,
    Spec,
    encode,
    joined,
    packed_shape,
    reconstruction_error,
    select_salient,
    stored_shapes,
)
from meswitch.codec.exact import EXACT, EXACT_DTYPES, ExactDelta, encode_exact, same_bits
from meswitch.codec.lowrank import LowRankDelta, Rank, encode_pair, pair_shapes, spectrum
from meswitch.codec.quantize import absmax_scales, dequantize, mse_scales, pack, quantize, unpack
from meswitch.codec.registry import (
    BPW,
    ME_SWITCH,
    Codec,
    CodecRequest,
    CodedDelta,
    Group,
    Meta,
    PackedCodec,
    Parameter,
    Shapes,
    Sharing,
    Trainable,
    codec_names,
    coded_by,
    encode_coded,
    find_codec,
    nbytes,
    register,
    restore_coded,
)
from meswitch.codec.words import unfold

# What an op computes with: the delta of one matrix, in a form that is never restored whole.
Delta = PackedDelta | LowRankDelta
# All that an artifact may store of a change.
Change = Delta | CodedDelta | ExactDelta

__all__ = [
    "BPW",
    "EXACT",
    "EXACT_DTYPES",
    "ME_SWITCH",
    "Change",
    "Codec",
    "CodecRequest",
    "CodedDelta",
    "Delta",
    "ExactDelta",
    "Group",
    "LowRankDelta",
    "Meta",
    "PackedCodec",
    "PackedDelta",
    "Parameter",
    "Rank",
    "Shapes",
    "Sharing",
    "Spec",
    "Trainable",
    "absmax_scales",
    "codec_names",
    "coded_by",
    "dequantize",
    "encode",
    "encode_coded",
    "encode_exact",
    "encode_pair",
    "find_codec",
    "joined",
    "mse_scales",
    "nbytes",
    "pack",
    "packed_shape",
    "pair_shapes",
    "quantize",
    "reconstruction_error",
    "register",
    "restore_coded",
    "same_bits",
    "select_salient",
    "spectrum",
    "stored_shapes",
    "unfold",
    "unpack",
]
