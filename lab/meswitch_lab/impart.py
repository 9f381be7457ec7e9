"""ImPart (arXiv 2504.13237): singular vectors of the delta are made sparse, the less the larger their singular value.

`D = U S V^T`. A share `beta` of the vectors, those of the smallest singular values, is dropped. Of the others vector k
loses the share `p_k = (1 - s_k / s_1) gamma` of its entries, in `U` and in `V` alike, chosen at random; what is kept is
multiplied by `1 / (1 - p_k)`, so that the product is right on average (the paper's algorithm 1 with C = 1). The last
vectors are dropped until the mean of `p_k` is `gamma`. At high ratios the entries that are kept are quantised as
Delta-CoMe does (section 7.1: 8, 3 and 2 bits for the first 2, the next 32 and the other vectors, with error feedback
that skips what is not kept), and `gamma` is found by bisection for a target size (algorithm 3). Only the linear layers
of the blocks are compressed.

Ours: always quantised, as every budget here is a high ratio. `beta` is tuned by the authors on validation data (their
code has 0.8 at half a bit a weight); here it leaves vectors that would take 1.25 of the budget if all their entries
were kept, or is the parameter `preprune`: in the example family the least sparsity is the best. The counts of vectors
in 8 and 3 bits are those of a width of 4096 and scale with the width (at least 1 each). Entries are quantised in groups
of kept entries, singular value and `1 / (1 - p_k)` are apart from them; feedback is for `V^T` only. The shares are
multiples of 1/255. As in the paper's accounting, positions cost nothing: they are drawn from a seed, by a hash that
does not depend on the version of torch.

Stored for [rows, in] and n vectors: `density_packed` uint8 [1, n], `vector_scale` bfloat16 [n], and for each band of b
bits with k entries `left<b>_packed` int32 [1, ceil(k b / 32)] (8 bit: uint8 [1, k]), `left<b>_scale` bfloat16 [1,
ceil(k / group)], `right<b>_*` alike: the mean density times (b + 16 / group) (rows + in) n / (rows in) bits a weight.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from meswitch.codec import BPW, CodecRequest, Meta, Parameter, Shapes, nbytes, register
from meswitch.codec.feedback import damped, inverse_factor
from meswitch.codec.quantize import SCALE_DTYPE, expand_scale, pack
from meswitch_lab.delta_come import BITS, COUNTS, WIDTH
from meswitch_lab.method import (
    Encoded,
    Method,
    check,
    group_meta,
    group_of,
    restore_matrix,
    round_matrix,
    rounded_shapes,
)
from meswitch_lab.sparse import drawn
from meswitch_lab.svd import decompose

PREPRUNE = Parameter("preprune", "Share of the singular vectors that is dropped before all (beta).", below=1)
SEED = Parameter("seed", "Of the choice of entries.", default=0, whole=True)
_SEEDS = 1 << 31
_ROOM = 1.25  # of what the vectors that are left would take whole, against the budget
_UNIT = 255  # of a density
_BLOCK = 128  # inputs between two corrections of all that follow


def encode(delta: Tensor, moment: Tensor | None, request: CodecRequest) -> Encoded:
    """delta: [rows, in] float32. moment: [in, in] float32 or None."""
    rows, width = delta.shape
    left, values, right = decompose(delta)
    seed = request.seed % _SEEDS
    densities = _densities(values, rows, width, request)
    meta = _meta(densities, rows, width, request.group_size, seed)
    count = len(densities)
    of_left, of_right = _counts(densities, rows), _counts(densities, width)
    chosen_left, chosen_right = drawn(of_left, rows, 2 * seed), drawn(of_right, width, 2 * seed + 1)
    lefts, rights = left[:, :count].T.contiguous(), right[:count]
    scale = values[:count] * (rows / of_left) * (width / of_right)
    parts = {"density_packed": densities[None], "vector_scale": scale.to(SCALE_DTYPE)}
    for bits, band in _bands(meta):
        if band.start == band.stop:
            continue
        name = f"right{bits}"
        parts |= round_matrix(lefts[band][chosen_left[band]][None], bits, request.group_size, f"left{bits}")
        rounded = round_matrix(rights[band][chosen_right[band]][None], bits, request.group_size, name)
        if moment is not None:
            metric = damped(moment, request.damping)
            step = rounded[f"{name}_scale"]
            codes = _feedback(rights[band], chosen_right[band], step, bits, request.group_size, metric)
            rounded[f"{name}_packed"] = codes if bits == 8 else pack(codes, bits)
        parts |= rounded
    return parts, meta


def _densities(values: Tensor, rows: int, width: int, request: CodecRequest) -> Tensor:
    """[n] uint8: the share of its entries that each vector keeps, in 1/255, within the budget."""

    def size(densities: Tensor) -> int:
        meta = _meta(densities, rows, width, request.group_size, 0)
        return nbytes(shapes(rows, width, meta))

    full = len(values)
    if PREPRUNE.name in request.parameters:
        start = max(1, int(full * (1 - request.parameters[PREPRUNE.name])))
    else:
        start = _most(lambda n: size(values.new_full((n,), _UNIT).to(torch.uint8)) <= _ROOM * request.budget, full)
    values = values[:start]
    low, high = 0.0, 1.0  # of gamma
    found = _sparsified(values, low)
    if size(found) <= request.budget:
        return found
    found = _sparsified(values, high)
    for _ in range(20):
        middle = (low + high) / 2
        tried = _sparsified(values, middle)
        if size(tried) <= request.budget:
            high, found = middle, tried
        else:
            low = middle
    return found


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, at least 1."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _sparsified(values: Tensor, gamma: float) -> Tensor:
    """Algorithm 1: densities [n] uint8 of the vectors that are left at a mean sparsity of `gamma`."""
    sparsity = (1 - values / values[0].clamp_min(torch.finfo(torch.float32).tiny)).double() * gamma
    count = len(values)
    before = torch.cat([sparsity.new_zeros(1), sparsity.cumsum(0)])  # of the first k vectors
    dropped = count - torch.arange(count + 1, device=values.device)
    enough = before + dropped >= gamma * count - 1e-9
    left = max(1, int(enough.nonzero().max()))  # the largest number of vectors
    return ((1 - sparsity[:left]) * _UNIT).round_().clamp_(1, _UNIT).to(torch.uint8)


def _counts(densities: Tensor, length: int) -> Tensor:
    """[n] int64: entries that each vector of this length keeps."""
    return ((densities.long() * length + _UNIT // 2) // _UNIT).clamp_min_(1)


def _meta(densities: Tensor, rows: int, width: int, group_size: int | None, seed: int) -> dict[str, int]:
    full, count = min(rows, width), len(densities)
    meta = {"vectors": count, "group_size": group_meta(group_size), "seed": seed}
    for bits, wanted in zip(BITS, (*COUNTS, None), strict=True):
        some = count if wanted is None else max(1, round(wanted * full / WIDTH))
        meta[f"vectors_{bits}"] = min(some, count - sum(meta.get(f"vectors_{b}", 0) for b in BITS))
    for side, length in (("left", rows), ("right", width)):
        counts = _counts(densities, length)
        for bits, band in _bands(meta):
            meta[f"{side}_{bits}"] = int(counts[band].sum())
    return meta


def _bands(meta: Meta) -> list[tuple[int, slice]]:
    """The vectors of each number of bits."""
    found, start = [], 0
    for bits in BITS:
        found.append((bits, slice(start, start + meta[f"vectors_{bits}"])))
        start = found[-1][1].stop
    return found


def _feedback(
    vectors: Tensor, chosen: Tensor, scale: Tensor, bits: int, group_size: int | None, metric: Tensor
) -> Tensor:
    """Codes [1, kept] uint8 of sparse vectors: later entries that are kept absorb the errors of earlier ones.

    Args:
        vectors: [n, in] float32.
        chosen: [n, in] bool.
        scale: [1, groups], fixed beforehand.
        bits: of a code.
        group_size: kept entries that share a scale.
        metric: [in, in] float32, the damped second moment of the inputs.
    """
    width, top = vectors.shape[1], 2**bits - 1
    factor = inverse_factor(metric, torch.arange(width, device=vectors.device))
    steps = torch.zeros_like(vectors)
    steps[chosen] = expand_scale(scale.float(), int(chosen.sum()), group_size)[0]
    target = torch.where(chosen, vectors, 0.0)
    codes = torch.zeros_like(vectors, dtype=torch.uint8)
    tiny = torch.finfo(torch.float32).tiny
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        errors = torch.zeros(len(vectors), stop - start, device=vectors.device)
        for column in range(start, stop):
            value, step = target[:, column], steps[:, column]
            code = ((value / step.clamp_min(tiny) + top) / 2).round_().clamp_(0, top)
            error = torch.where(chosen[:, column], value - (code * 2 - top) * step, 0.0) / factor[column, column]
            target[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
            codes[:, column], errors[:, column - start] = code.to(torch.uint8), error
        target[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes[chosen][None]


def decode(parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
    """[rows, in] float32."""
    densities, count = parts["density_packed"][0], meta["vectors"]
    sides = []
    for side, length, seed in (("left", rows, 2 * meta["seed"]), ("right", width, 2 * meta["seed"] + 1)):
        entries = [
            restore_matrix(parts, meta[f"{side}_{bits}"], bits, group_of(meta), f"{side}{bits}")[0]
            for bits in BITS
            if meta[f"vectors_{bits}"]
        ]
        dense = torch.zeros(count, length, dtype=torch.float32, device=densities.device)
        sides.append(dense.masked_scatter_(drawn(_counts(densities, length), length, seed), torch.cat(entries)))
    left, right = sides
    return (left * parts["vector_scale"].float()[:, None]).T @ right


def shapes(rows: int, width: int, meta: Meta) -> Shapes:
    vectors, group_size = meta["vectors"], group_of(meta)
    check(1 <= vectors <= min(rows, width), f"vectors: {vectors} is not within 1 and {min(rows, width)}")
    bands = {bits: meta[f"vectors_{bits}"] for bits in BITS}
    check(min(bands.values()) >= 0 and sum(bands.values()) == vectors, f"vectors: {bands} are not {vectors} in all")
    check(0 <= meta["seed"] < _SEEDS, f"seed: {meta['seed']}")
    found: Shapes = {"density_packed": ((1, vectors), torch.uint8), "vector_scale": ((vectors,), SCALE_DTYPE)}
    for side, length in (("left", rows), ("right", width)):
        for bits, count in bands.items():
            kept = meta[f"{side}_{bits}"]
            check(count <= kept <= count * length, f"{side}_{bits}: {kept} entries of {count} vectors")
            found |= rounded_shapes(1, kept, bits, group_size, f"{side}{bits}") if count else {}
    return found


METHOD = register(
    Method(
        "impart",
        encode,
        decode,
        shapes,
        (
            "vectors",
            "group_size",
            "seed",
            *(f"vectors_{bits}" for bits in BITS),
            *(f"{side}_{bits}" for side in ("left", "right") for bits in BITS),
        ),
        (BPW, PREPRUNE, SEED),
        blocks_only=True,
        uses_inputs=True,
    )
)
