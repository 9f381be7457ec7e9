"""One delta matrix: low-bit codes, scales, salient channels and rows that the base does not have.

Rows without a change take no bytes: an embedding's rows of tokens that the fine-tuning never saw. In memory such a row
has scale 0 and salient weights 0. Stored, it is left out, and `row_index` lists the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from meswitch.codec.feedback import damped, feedback_codes, refit, upper_factor
from meswitch.codec.quantize import (
    SCALE_DTYPE,
    SCALES,
    dequantize,
    expand_scale,
    group_count,
    levels,
    normal_scales,
    pack,
    packed_words,
    quantize,
    starting_scales,
    unpack,
)
from meswitch.codec.words import (
    LENGTHS,
    block_order,
    feedback_words,
    fold,
    nearest_words,
    signs_of,
    unfold,
    word_scales,
    words_shape,
)
from meswitch.errors import MeswitchError

# `error` is the method's; the others are there to compare with
RULES = ("error", "magnitude", "activation", "random")
BY_ROW = frozenset({"weight_packed", "weight_scale", "salient_weight", "weight_left"})  # parts that leave rows out
SALIENT_DTYPE = torch.bfloat16
# weights worked on at once: on a GPU many, as each step costs its launch
_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 24}
# larger: error feedback walks all columns once for every block
_FEEDBACK_BLOCK = {"cpu": 1 << 25, "cuda": 1 << 28}


def reconstruction_error(delta: Tensor, dequantized: Tensor, energy: Tensor | None) -> Tensor:
    """What quantising each input channel costs the layer's output.

    ME-Switch, section 3 (arXiv 2406.09041): `E_i = sum_j ||x_i D_ij - x_i Dq_ij||^2` over calibration inputs,
    which is `||X_:,i||^2 * ||D_:,i - Dq_:,i||^2`.

    Args:
        delta: [out_features, in_features] float32.
        dequantized: alike.
        energy: [in_features] float32, `||X_:,i||^2` up to a common factor; None is the data-free form,
            in which every channel carries the same energy.

    Returns:
        [in_features] float32.
    """
    error = (delta - dequantized).square().sum(dim=0)
    return error if energy is None else error * energy


def select_salient(score: Tensor, count: int) -> Tensor:
    """The `count` channels of largest score, ascending: [min(count, in_features)] int32."""
    count = min(count, score.numel())
    return torch.topk(score, count).indices.sort().values.to(torch.int32)


def other_score(rule: str, delta: Tensor, energy: Tensor | None) -> Tensor:
    """Scores of input channels by a rule that does not look at the rounding error: [in_features] float32.

    `magnitude`: the delta's own energy. `activation`: the inputs' (all alike without calibration). `random`: a fixed
    permutation.
    """
    width = delta.shape[1]
    if rule == "magnitude":
        return delta.square().sum(dim=0)
    if rule == "activation":
        return delta.new_ones(width) if energy is None else energy
    return torch.randperm(width, generator=torch.Generator().manual_seed(width)).to(delta)


def without_negligible(delta: Tensor, floor: float) -> Tensor:
    """The delta with zeros in every row whose root mean square is below `floor` times that of the whole matrix.

    Weight decay and rounding move rows that no gradient ever reached. At a floor of 0.1 all that is dropped is less
    than a hundredth of the delta's energy, a tenth of what rounding to 2 bits loses.

    Args:
        delta: [rows, in_features] float32.
    """
    power = delta.double().square().mean(1)
    dropped = power < floor * floor * power.mean()
    return delta if not bool(dropped.any()) else delta.masked_fill(dropped[:, None], 0.0)


def live_rows(packed: Tensor, scale: Tensor, salient_weight: Tensor) -> Tensor | None:
    """[live] int32, ascending: the rows that change anything; None where leaving out the others saves nothing.

    Args:
        packed: [rows, words] int32.
        scale: [rows, groups].
        salient_weight: [rows, k].
    """
    live = (scale != 0).any(1) | (salient_weight != 0).any(1)
    row_bytes = sum(part.shape[1] * part.element_size() for part in (packed, scale, salient_weight))
    count = int(live.sum())
    saved = (len(live) - count) * row_bytes
    return live.nonzero().squeeze(1).to(torch.int32) if saved > count * torch.int32.itemsize else None


def with_all_rows(parts: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Stored parts of a delta, by suffix, with the rows that were left out. rows: of the delta."""
    index = parts.get("row_index")
    if index is None:
        return dict(parts)
    return {suffix: expand_rows(part, index, rows) if suffix in BY_ROW else part for suffix, part in parts.items()}


def expand_rows(part: Tensor, index: Tensor, rows: int) -> Tensor:
    """[live, ...] -> [rows, ...] with zeros in the rows that are not stored."""
    whole = part.new_zeros(rows, *part.shape[1:])
    whole[index.long()] = part
    return whole


@dataclass(frozen=True, slots=True)
class Spec:
    """How one matrix is quantised.

    Args:
        bits: 1-4.
        group_size: input channels that share a scale, None for one scale a row.
        salient: input channels kept in 16 bit.
        damping: of the second moment, for error feedback.
        row_floor: rows whose root mean square is below this share of the matrix's are taken as unchanged.
        rule: how the salient channels are chosen, one of `RULES`.
        scales: the search that starts scales, one of `codec.quantize.SCALES`.
        feedback: with the inputs' second moment, round with error feedback.
        refit: with it, solve for scales and salient weights once the codes are chosen.
        block: signs of so many channels are one word (`codec.words`); needs 1 bit and no salient channels.
    """

    bits: int = 2
    group_size: int | None = 128
    salient: int = 4
    damping: float = 0.01
    row_floor: float = 0.0
    rule: str = "error"
    scales: str = "mse"
    feedback: bool = True
    refit: bool = True
    block: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4):
            raise ValueError(f"bits must be 1, 2, 3 or 4, not {self.bits}")
        if self.group_size is not None and self.group_size < 8:
            raise ValueError(f"group_size must be at least 8 or a whole row, not {self.group_size}")
        if self.salient < 0:
            raise ValueError(f"salient must be 0 or more, not {self.salient}")
        if self.block is not None and not (self.block in LENGTHS and self.bits == 1 and not self.salient):
            raise ValueError(f"block: {self.block}: one of {LENGTHS}, with 1 bit and without salient channels")
        for name, value, known in (("salient_rule", self.rule, RULES), ("scales", self.scales, SCALES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


@dataclass(frozen=True, slots=True)
class PackedDelta:
    """The delta of one [out_features, in_features] matrix.

    Args:
        packed: [rows, words] int32 (see `codec.quantize`), rows = out_features without the extra rows.
        scale: [rows, groups] bfloat16.
        salient_index: [k] int32 ascending.
        salient_weight: [rows, k] bfloat16, what is missing from the dequantised codes in these channels, so that a
            kernel adds both without masking.
        extra: [extra_rows, in_features] rows after the base's last one, whole weights in the expert's dtype.
        block: of 1-bit codes that are words of so many signs, which are stored as numbers of words; None of all others.
    """

    packed: Tensor
    scale: Tensor
    salient_index: Tensor
    salient_weight: Tensor
    bits: int
    group_size: int | None
    in_features: int
    extra: Tensor | None = None
    block: int | None = None

    @property
    def rows(self) -> int:
        return self.packed.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """By the suffix of their stored names (the first three are compressed-tensors'); see `live_rows`."""
        extra_rows = 0 if self.extra is None else self.extra.shape[0]
        live = live_rows(self.packed, self.scale, self.salient_weight)
        rows = slice(None) if live is None else live.long()
        packed = self.packed[rows]
        named = {
            "weight_packed": packed if self.block is None else fold(packed, self.in_features, self.block),
            "weight_scale": self.scale[rows],
            "weight_shape": torch.tensor([self.rows + extra_rows, self.in_features], dtype=torch.int32),
        }
        if live is not None:
            named["row_index"] = live
        if self.salient_index.numel():
            named |= {"salient_index": self.salient_index, "salient_weight": self.salient_weight[rows]}
        if self.extra is not None:
            named["weight_extra"] = self.extra
        return named

    def to(self, device: torch.device) -> "PackedDelta":
        """The same delta on another device."""
        moved: dict[str, Any] = {
            item.name: value.to(device)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The delta in float32, salient channels included and extra rows not.

        Args:
            rows: [n] int64 to restore only these; None restores all.

        Returns:
            [rows, in_features] float32.
        """
        packed, scale, salient = self.packed, self.scale, self.salient_weight
        if rows is not None:
            packed, scale, salient = packed[rows], scale[rows], salient[rows]
        delta = dequantize(unpack(packed, self.bits, self.in_features), scale, self.bits, self.group_size)
        if self.salient_index.numel():
            delta.index_add_(1, self.salient_index.long(), salient.float())
        return delta


def packed_shape(rows: int, in_features: int, bits: int, block: int | None = None) -> tuple[int, int]:
    """Of the stored codes."""
    return (rows, packed_words(in_features, bits)) if block is None else words_shape(rows, in_features, block)


def stored_shapes(
    rows: int, in_features: int, spec: Spec, extra_rows: int, extra_dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `encode` stores if every row changed, without weights: suffix -> (shape, dtype)."""
    salient = min(spec.salient, in_features)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": (packed_shape(rows, in_features, spec.bits, spec.block), torch.int32),
        "weight_scale": ((rows, group_count(in_features, spec.group_size)), SCALE_DTYPE),
        "weight_shape": ((2,), torch.int32),
    }
    if salient:
        shapes["salient_index"] = ((salient,), torch.int32)
        shapes["salient_weight"] = ((rows, salient), SALIENT_DTYPE)
    if extra_rows:
        shapes["weight_extra"] = ((extra_rows, in_features), extra_dtype)
    return shapes


def encode(
    delta: Tensor,
    spec: Spec,
    *,
    name: str,
    second_moment: Tensor | None = None,
    lengthen: bool = False,
    extra: Tensor | None = None,
) -> PackedDelta:
    """Quantise one delta. Rows are worked on in blocks, so that the temporaries stay small.

    Args:
        delta: [rows, in_features] float32.
        name: of the tensor, for errors.
        second_moment: [in_features, in_features] float32, `X^T X / n` of the layer's inputs. With it the
            salient channels are chosen by activation energy x quantisation error, rounding uses error feedback
            and scales are refitted; without it all are data-free.
        lengthen: undo half of what rounding takes off the delta's length (`_lengthened`).
        extra: [extra_rows, in_features], stored as it is.

    Raises:
        MeswitchError: the delta has NaN or infinite values.
    """
    check_finite(delta, name)
    if spec.row_floor:
        delta = without_negligible(delta, spec.row_floor)
    energy = None if second_moment is None else second_moment.diagonal()
    index = _choose_salient(delta, spec, energy)
    kept = None
    if index.numel():  # the salient channels need no scale: fit it to the rest
        kept = torch.ones(delta.shape[1], dtype=torch.float32, device=delta.device)
        kept[index.long()] = 0
    metric = None
    if second_moment is not None:
        metric = damped(second_moment, spec.damping)
        energies = second_moment.diagonal()
        order = _salient_last(energies, index) if spec.block is None else block_order(energies, spec.block)
        factor = upper_factor(metric, order)
    columns = index.long()
    packed, scales, salient = [], [], []
    for block in _row_blocks(delta, _BLOCK if second_moment is None else _FEEDBACK_BLOCK):
        with_feedback = metric is not None and spec.feedback
        if spec.block is not None:
            scale = word_scales(block, spec.block, spec.group_size)
            if with_feedback:
                codes = feedback_words(block, scale, spec.block, spec.group_size, factor, order)
            else:
                codes = (signs_of(nearest_words(block, spec.block), spec.block) > 0).to(torch.uint8)
        else:
            scale = starting_scales(spec.scales, block, spec.bits, spec.group_size, kept)
            if with_feedback:
                codes = feedback_codes(block, scale, spec.bits, spec.group_size, factor, order, exact=index.numel())
            else:
                codes = quantize(block, scale, spec.bits, spec.group_size)
        if metric is None or not spec.refit:
            step = expand_scale(scale.float(), delta.shape[1], spec.group_size)[:, columns]
            missing = block[:, columns] - levels(codes[:, columns], spec.bits) * step
        else:
            scale, missing = refit(block, codes, spec.bits, spec.group_size, columns, metric, scale)
        if lengthen:
            scale, missing = _lengthened(block, codes, scale, missing, columns, spec)
        packed.append(pack(codes, spec.bits))
        scales.append(scale)
        salient.append(missing.to(SALIENT_DTYPE))
    return PackedDelta(
        packed=torch.cat(packed),
        scale=torch.cat(scales),
        salient_index=index,
        salient_weight=torch.cat(salient),
        bits=spec.bits,
        group_size=spec.group_size,
        in_features=delta.shape[1],
        extra=extra,
        block=spec.block,
    )


def _lengthened(
    delta: Tensor, codes: Tensor, scale: Tensor, missing: Tensor, columns: Tensor, spec: Spec
) -> tuple[Tensor, Tensor]:
    """Scales times `2 / (1 + share)`, with `share` of a row `<Dq, D> / |D|^2`; salient channels stay as they are.

    Codes of least squared error shorten every row of every delta: at 2 bits to 0.88 of it, at 1 bit to 0.64. All layers
    lose in the same direction, so what the model loses grows with the square of the number of layers, where the
    errors at right angles to the delta, which a longer step makes larger, are independent of one another. With `c` the
    harm of an error along the delta against one across it, `1 / (share + (1 - share) / c)` is best; `c = 2` is ours,
    for deltas that are small against the weights, measured on fine-tunes of a pretrained model.

    Args:
        delta: [rows, in_features] float32.
        codes: alike.
        scale: [rows, groups].
        missing: [rows, k] float32.
    """
    restored = dequantize(codes, scale, spec.bits, spec.group_size)
    kept = restored[:, columns]
    power = delta.square().sum(1) - delta[:, columns].square().sum(1)
    inner = torch.linalg.vecdot(restored, delta) - torch.linalg.vecdot(kept, delta[:, columns])
    share = (inner / power.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)
    longer = (scale.float() * torch.where(power > 0, 2 / (1 + share), 1.0)[:, None]).to(scale.dtype)
    step, before = (expand_scale(s.float(), delta.shape[1], spec.group_size)[:, columns] for s in (longer, scale))
    return longer, missing + levels(codes[:, columns], spec.bits) * (before - step)


def packed_from(
    parts: Mapping[str, Tensor], in_features: int, *, bits: int, group_size: int | None, block: int | None = None
) -> PackedDelta:
    """The delta over its stored parts, wherever they lie.

    Args:
        parts: by suffix, with all rows (`rows.with_all_rows`).
        in_features: of the matrix.
        bits: of its codes.
        group_size: see `Spec`.
        block: see `Spec`.
    """
    packed = parts["weight_packed"]
    if block is not None:
        packed = unfold(packed, in_features, block)
    no_index = torch.empty(0, dtype=torch.int32, device=packed.device)
    no_weight = torch.empty(len(packed), 0, dtype=SALIENT_DTYPE, device=packed.device)
    return PackedDelta(
        packed=packed,
        scale=parts["weight_scale"],
        salient_index=parts.get("salient_index", no_index),
        salient_weight=parts.get("salient_weight", no_weight),
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        extra=parts.get("weight_extra"),
        block=block,
    )


def joined(parts: Sequence[tuple[Tensor, PackedDelta]]) -> PackedDelta:
    """One delta of the deltas of its rows, which have no salient channels.

    Args:
        parts: rows [n] int64, and their delta; together all rows.
    """
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([rows for rows, _ in parts]).argsort()
    packed = torch.cat([delta.packed for _, delta in parts])[order]
    scale = torch.cat([delta.scale for _, delta in parts])[order]
    salient = torch.cat([delta.salient_weight for _, delta in parts])[order]
    return replace(parts[0][1], packed=packed, scale=scale, salient_weight=salient)


def check_finite(delta: Tensor, name: str) -> None:
    """Refuse a delta with NaN or infinite values.

    Raises:
        MeswitchError: naming the tensor.
    """
    if not delta.isfinite().all():
        bad = int((~delta.isfinite()).sum())
        raise MeswitchError(f"{name}: {bad} of {delta.numel()} delta values are NaN or infinite; repair the checkpoint")


def _choose_salient(delta: Tensor, spec: Spec, energy: Tensor | None) -> Tensor:
    """[k] int32, ascending: by default the channels whose plain rounding costs most."""
    if not spec.salient:
        return torch.empty(0, dtype=torch.int32, device=delta.device)
    if spec.rule != "error":
        return select_salient(other_score(spec.rule, delta, energy), spec.salient)
    score = torch.zeros(delta.shape[1], dtype=torch.float32, device=delta.device)
    for block in _row_blocks(delta, _BLOCK):
        scale = normal_scales(block, spec.bits, spec.group_size)
        codes = quantize(block, scale, spec.bits, spec.group_size)
        score += reconstruction_error(block, dequantize(codes, scale, spec.bits, spec.group_size), energy)
    return select_salient(score, spec.salient)


def _row_blocks(delta: Tensor, weights: Mapping[str, int]) -> tuple[Tensor, ...]:
    return delta.split(max(1, weights.get(delta.device.type, weights["cpu"]) // max(1, delta.shape[1])))


def _salient_last(energy: Tensor, salient: Tensor) -> Tensor:
    """Channels by falling energy, the salient ones at the end: [in_features] int64."""
    order = energy.argsort(descending=True, stable=True)
    is_salient = torch.zeros(energy.numel(), dtype=torch.bool, device=energy.device)
    is_salient[salient.long()] = True
    return torch.cat([order[~is_salient[order]], order[is_salient[order]]])
