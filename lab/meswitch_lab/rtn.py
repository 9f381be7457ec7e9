"""Rounding to nearest: what codes and scales do by themselves.

Stored like the default method's tensors, so that it can be served: codes of b bits and a bfloat16 scale for each group,
b + 16 / group bits a weight. There are no salient channels, and the inputs are not looked at. Ours: levels without
zero, and scales of least squared error instead of the largest magnitude (`meswitch.codec.quantize`).
"""

from dataclasses import replace

from meswitch.codec import PackedCodec, Spec, register


def _plain(spec: Spec) -> Spec:
    return replace(spec, salient=0, row_floor=0.0)


METHOD = register(PackedCodec("rtn", uses_inputs=False, adapt=_plain))
