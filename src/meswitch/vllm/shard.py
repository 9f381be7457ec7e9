"""Packed deltas cut and joined: vLLM keeps q, k and v as one matrix, and a rank's share of it.

All of this is exact. Codes of fewer bits are among those of more (level `2 c - (2^b - 1)`), a scale can be repeated for
a finer group, and a salient channel that a part does not have gets weights of 0.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from meswitch.codec import PackedDelta, pack, unpack
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.ops.layout import Shape

_LEAST_GROUP = 16  # of the kernels, see `ops.layout`


def on_device(delta: PackedDelta, device: torch.device) -> PackedDelta:
    """Its codes, scales and salient channels there; extra rows stay where they are."""
    return replace(
        delta,
        packed=delta.packed.to(device),
        scale=delta.scale.to(device),
        salient_index=delta.salient_index.to(device),
        salient_weight=delta.salient_weight.to(device),
    )


def take_rows(delta: PackedDelta, first: int, last: int) -> PackedDelta:
    """Output channels `[first, last)`: what a column-parallel rank holds. Extra rows are left out."""
    return replace(
        delta,
        packed=delta.packed[first:last],
        scale=delta.scale[first:last],
        salient_weight=delta.salient_weight[first:last],
        extra=None,
    )


def take_columns(delta: PackedDelta, first: int, last: int, name: str) -> PackedDelta:
    """Input channels `[first, last)`: what a row-parallel rank holds.

    Raises:
        IncompatibleError: a cut within a group leaves groups smaller than the kernels read. It names the tensor.
    """
    group = cut_group(delta.group_size, delta.in_features, first, last, name)
    index = delta.salient_index
    kept = ((index >= first) & (index < last)).nonzero().view(-1)
    return replace(
        delta,
        packed=pack(unpack(delta.packed, delta.bits, delta.in_features)[:, first:last].contiguous(), delta.bits),
        scale=_scale_for(delta, group, first, last),
        salient_index=(index[kept] - first).int(),
        salient_weight=delta.salient_weight[:, kept],
        group_size=group,
        in_features=last - first,
        extra=None,
    )


def cut_group(group: int | None, in_features: int, first: int, last: int, name: str) -> int | None:
    """The group size of input channels `[first, last)`: the same where the cut is at a group's border, else finer."""
    if group is None or group >= in_features or (first // group == (last - 1) // group):
        return None
    finer = math.gcd(group, first) if last == in_features else math.gcd(group, first, last)
    if finer < _LEAST_GROUP:
        raise IncompatibleError(
            f"{name}: its {in_features} input channels are cut at {first} and {last}, within groups of {group}; use a "
            f"tensor-parallel size whose shares are multiples of {_LEAST_GROUP} channels, or compress with group_size "
            "'row'"
        )
    return finer


def join(parts: Sequence[PackedDelta | None], rows: Sequence[int]) -> PackedDelta | None:
    """Deltas below one another, all with the same inputs.

    Args:
        parts: None for rows that do not change. rows: of each part.

    Returns:
        None if no part changes anything.
    """
    present = [part for part in parts if part is not None]
    if not present:
        return None
    width, bits = present[0].in_features, max(part.bits for part in present)
    device = present[0].packed.device
    group = joint_group([part.group_size for part in present], width)
    salient = torch.cat([part.salient_index for part in present]).unique().int()
    joined = []
    for part, count in zip(parts, rows, strict=True):
        if not count:
            continue
        if part is None:
            none = torch.zeros(count, width, dtype=torch.uint8, device=device)
            scale = torch.zeros(count, 1, dtype=present[0].scale.dtype, device=device)
            part = replace(
                present[0],
                packed=pack(none, bits),
                scale=scale,
                salient_index=salient[:0],
                salient_weight=present[0].salient_weight.new_zeros(count, 0),
                bits=bits,
                group_size=None,
            )
        joined.append(conform(part, bits, group, salient))
    return replace(
        joined[0],
        packed=torch.cat([part.packed for part in joined]),
        scale=torch.cat([part.scale for part in joined]),
        salient_weight=torch.cat([part.salient_weight for part in joined]),
        extra=None,
    )


def joint_group(groups: Sequence[int | None], in_features: int) -> int | None:
    """The group size that every one of these can be written in.

    Raises:
        ConfigError: they have no common divisor that the kernels read.
    """
    real = [group for group in groups if group is not None and group < in_features]
    if not real:
        return None
    common = math.gcd(*real)
    if common < _LEAST_GROUP and common not in real:
        raise ConfigError(f"group_size: {sorted(set(real))} in one layer have no common divisor of {_LEAST_GROUP} up")
    return common


def conform(delta: PackedDelta, bits: int, group: int | None, salient: Tensor | None = None) -> PackedDelta:
    """The same delta in more bits, finer groups and more salient channels.

    Raises:
        ConfigError: it does not fit.
    """
    if delta.bits > bits:
        raise ConfigError(f"bits: {delta.bits}, in a place made for {bits}")
    packed = delta.packed
    if delta.bits < bits:
        codes = unpack(delta.packed, delta.bits, delta.in_features)
        packed = pack(codes + ((1 << bits) - (1 << delta.bits)) // 2, bits)
    own = None if delta.group_size is None or delta.group_size >= delta.in_features else delta.group_size
    if own != group and (group is None or (own is not None and own % group)):
        raise ConfigError(f"group_size: {own or 'row'}, in a place made for {group or 'row'}")
    index, weight = delta.salient_index, delta.salient_weight
    if salient is not None:
        weight = weight.new_zeros(delta.rows, salient.numel())
        weight[:, torch.searchsorted(salient, index)] = delta.salient_weight
        index = salient
    return replace(
        delta,
        packed=packed,
        scale=_scale_for(delta, group, 0, delta.in_features),
        salient_index=index,
        salient_weight=weight,
        bits=bits,
        group_size=group,
    )


def joint_shape(shapes: Sequence[Shape]) -> Shape:
    """A place that any of these deltas of one layer can be written to: most bits, finest groups, most salient."""
    rows, width = shapes[0].rows, shapes[0].in_features
    group = joint_group([shape.group or None for shape in shapes], width)
    return Shape(rows, width, max(s.bits for s in shapes), group or 0, max(s.salient for s in shapes))


def _scale_for(delta: PackedDelta, group: int | None, first: int, last: int) -> Tensor:
    """The scales of input channels `[first, last)` in groups of `group`, which divides the delta's own."""
    if delta.group_size is None or delta.group_size >= delta.in_features:
        return delta.scale[:, :1].expand(-1, 1 if group is None else -(-(last - first) // group)).contiguous()
    starts = torch.arange(first, last, group or last - first, device=delta.scale.device)
    return delta.scale[:, starts // delta.group_size].contiguous()
