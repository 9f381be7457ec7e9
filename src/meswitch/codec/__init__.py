"""Tensors in, named tensors out: quantisers, packing, the salient split. No models, no files."""

from meswitch.codec.baselines.coded import CodedDelta, Request, nbytes
from meswitch.codec.delta import PackedDelta, Spec, encode, joined, stored_shapes
from meswitch.codec.exact import EXACT, EXACT_DTYPES, ExactDelta, encode_exact, same_bits
from meswitch.codec.lowrank import LowRankDelta, Rank, encode_pair, pair_shapes, spectrum
from meswitch.codec.packing import pack, packed_words, unpack
from meswitch.codec.quantize import absmax_scales, dequantize, mse_scales, quantize
from meswitch.codec.registry import BASELINES, ME_SWITCH, METHODS, RTN, encode_baseline, find_baseline, restore_baseline
from meswitch.codec.salient import reconstruction_error, select_salient

# What an op computes with: the delta of one matrix, in a form that is never restored whole.
Delta = PackedDelta | LowRankDelta
# All that an artifact may store of a change.
Change = Delta | CodedDelta | ExactDelta

__all__ = [
    "BASELINES",
    "EXACT",
    "EXACT_DTYPES",
    "METHODS",
    "ME_SWITCH",
    "RTN",
    "Change",
    "CodedDelta",
    "Delta",
    "ExactDelta",
    "LowRankDelta",
    "PackedDelta",
    "Rank",
    "Request",
    "Spec",
    "absmax_scales",
    "dequantize",
    "encode",
    "encode_baseline",
    "encode_exact",
    "encode_pair",
    "find_baseline",
    "joined",
    "mse_scales",
    "nbytes",
    "pack",
    "packed_words",
    "pair_shapes",
    "quantize",
    "reconstruction_error",
    "restore_baseline",
    "same_bits",
    "select_salient",
    "spectrum",
    "stored_shapes",
    "unpack",
]
