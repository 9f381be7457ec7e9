"""UltraDelta (arXiv 2505.13563): uniform codes, of which a random share is kept, a smaller one where variance is low.

Three parts, in the paper's words: *variance-based mixed sparsity* (matrices sorted by their standard deviation; the
third of all weights with the lowest has its sparsity raised by a step, the highest lowered so that the mean stays),
*distribution-aware compression* (uniform 4-bit codes between the smallest and the largest weight of a matrix, then the
same share of the weights of every code is pruned at random, so that the distribution keeps its shape) and
*trace-norm-guided rescaling*: what is kept is multiplied by `gamma / (1 - s)`, with `gamma` between 0.5 and 1 and the
smaller, the larger the trace norm. The positions are Golomb codes of the gaps. Only the linear layers of the blocks are
compressed. The authors' code takes 4 bits, and at a sparsity of 0.97 a step of 0.01.

Ours: the sparsity `s` is what the budget leaves, and the step is a share of the density (1 - s), 1/3 by default as at
the authors' 0.97. The paper's `gamma` has no formula that we found, and their code takes it by hand: ours is
`1 - s t / 2` with `t = |D|_* / (sqrt(min(rows, in)) |D|_F)`, the trace norm against the most that this energy can have,
for each matrix; the parameter `gamma` fixes it instead. Golomb codes are Rice codes, and stored (a mask of a seed would
not know the codes of the pruned).

Stored for [rows, in] with k kept weights: `value_packed` int32 [1, ceil(k bits / 32)], `value_range` float32 [2]
(lowest level, step; rescaled), `gap_packed`, `remainder_packed` (`meswitch_lab.sparse`): at a density d about
`d (bits + log2(1 / d) + 1.5)` bits a weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from meswitch.codec import BPW, CodecRequest, Meta, Parameter, Shapes, Sharing, register
from meswitch.codec.quantize import pack, packed_words, unpack
from meswitch_lab.method import Encoded, Method, check
from meswitch_lab.sparse import decode_positions, encode_positions, hashed, position_shapes, rice_bits

STEP = Parameter("step", "Share of the density by which matrices of low variance get less.", default=1 / 3, below=1)
CODE_BITS = Parameter("code_bits", "Of a kept weight.", default=4, least=1, most=4, whole=True)
GAMMA = Parameter("gamma", "Of the rescaling, instead of the trace norm's.", most=2)
SEED = Parameter("seed", "Of the choice of weights.", default=0, whole=True)
_LEAST = 1e-4  # density
_TRIES = 20


def encode(delta: Tensor, moment: Tensor | None, request: CodecRequest) -> Encoded:
    """delta: [rows, in] float32; `moment` is not used."""
    bits = int(request.parameters.get(CODE_BITS.name, CODE_BITS.default or 4))
    lowest, highest = delta.min(), delta.max()
    step = (highest - lowest) / (2**bits - 1)
    codes = ((delta - lowest) / step.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(0, 2**bits - 1)
    codes = codes.to(torch.uint8).flatten()
    # the same order of pruning for every share: a code, then at random
    order = hashed(codes.numel(), request.seed, delta.device).argsort(stable=True)
    order = order[codes[order].argsort(stable=True)]
    sizes = codes.bincount(minlength=2**bits)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=delta.device) - (sizes.cumsum(0) - sizes)[codes[order].long()]
    density = _affordable(request.budget, codes.numel(), bits)
    wanted = min(1.0, density * (1.0 if request.share is None else request.share))
    budget = request.budget * _cost(wanted, bits) / _cost(density, bits)
    for _ in range(_TRIES):
        kept = rank < (sizes * wanted).round_().long().clamp_min_(1)[codes.long()]
        positions, meta = encode_positions(kept)
        meta |= {"code_bits": bits}
        size = sum(part.nbytes for part in positions.values()) + 4 * packed_words(meta["kept"], bits) + 8
        if size <= budget or wanted <= _LEAST:
            break
        wanted *= 0.999 * budget / size
    sparsity = 1 - meta["kept"] / codes.numel()
    scale = request.parameters.get(GAMMA.name, 1 - sparsity * _flatness(delta) / 2) / (1 - sparsity)
    parts = {"value_packed": pack(codes[kept][None], bits), "value_range": torch.stack([lowest, step]) * scale}
    return parts | positions, meta


def _cost(density: float, bits: int) -> float:
    """Bits a weight."""
    return density * (bits + rice_bits(density))


def _affordable(budget: int, weights: int, bits: int) -> float:
    """The share of weights that can be kept in so many bytes."""
    low, high = _LEAST, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _cost(middle, bits) * weights / 8 + 24 <= budget else (low, middle)
    return low


def _flatness(delta: Tensor) -> float:
    """The trace norm as a share of the largest that a matrix of this shape and Frobenius norm can have."""
    unit = (delta / delta.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)).double()
    gram = unit.T @ unit if unit.shape[0] > unit.shape[1] else unit @ unit.T
    values = torch.linalg.eigvalsh(gram).clamp_min_(0).sqrt_()
    return float(values.sum() / (len(values) * values.square().sum()).sqrt().clamp_min(torch.finfo(torch.float64).tiny))


def decode(parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
    """[rows, in] float32."""
    lowest, step = parts["value_range"]
    values = unpack(parts["value_packed"], meta["code_bits"], meta["kept"])[0].float() * step + lowest
    delta = torch.zeros(rows * width, dtype=torch.float32, device=values.device)
    delta[decode_positions(dict(parts), dict(meta))] = values
    return delta.view(rows, width)


def shapes(rows: int, width: int, meta: Meta) -> Shapes:
    bits, kept = meta["code_bits"], meta["kept"]
    check(bits in (1, 2, 3, 4), f"code_bits: {bits} is none of 1, 2, 3, 4")
    check(1 <= kept <= rows * width, f"kept: {kept} is not within 1 and {rows * width}")
    check(meta["gap_bits"] >= kept, f"gap_bits: {meta['gap_bits']} do not hold {kept} gaps")
    check(0 <= meta["remainder_bits"] < 32, f"remainder_bits: {meta['remainder_bits']}")
    found: Shapes = {
        "value_packed": ((1, packed_words(kept, bits)), torch.int32),
        "value_range": ((2,), torch.float32),
    }
    return found | position_shapes(dict(meta))


def allocate(measured: Mapping[str, tuple[float, int]], parameters: Mapping[str, float]) -> dict[str, float]:
    """What each matrix's density is multiplied by.

    Args:
        measured: name -> standard deviation, and number of weights.
        parameters: `step` among them.
    """
    step = parameters.get(STEP.name, STEP.default or 0.0)
    total = sum(weights for _, weights in measured.values())
    found: dict[str, float] = {}
    seen = spent = 0.0
    for name in sorted(measured, key=lambda name: measured[name][0]):
        weights = measured[name][1]
        seen += weights
        if seen > 2 * total / 3:  # the highest third shares what the others have left
            continue
        found[name] = 1 - step if seen <= total / 3 else 1.0
        spent += found[name] * weights
    rest = [name for name in measured if name not in found]
    weights = sum(measured[name][1] for name in rest)
    return found | dict.fromkeys(rest, (total - spent) / weights if weights else 1.0)


METHOD = register(
    Method(
        "ultradelta",
        encode,
        decode,
        shapes,
        ("kept", "gap_bits", "remainder_bits", "code_bits"),
        (BPW, STEP, CODE_BITS, GAMMA, SEED),
        blocks_only=True,
        sharing=Sharing(lambda delta: float(delta.double().std(correction=0)), allocate),
    )
)
