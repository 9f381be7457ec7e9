"""Which entries of a matrix are kept: drawn from a seed, so that they cost no bytes, or stored as Rice codes."""

import math

import torch
from torch import Tensor

from meswitch.codec import Shapes
from meswitch.codec.quantize import pack, packed_words, unpack

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's, as int64
_MOST_REMAINDER_BITS = 20


def hashed(count: int, seed: int, device: torch.device) -> Tensor:
    """[count] int64, pseudorandom numbers of a seed; the same with every version of torch, and on every device.

    The finaliser of splitmix64, over a counter.
    """
    start = _GOLDEN * (seed + 1) % (1 << 64)
    x = torch.arange(count, dtype=torch.int64, device=device) * _GOLDEN + (start - (1 << 64) * (start >> 63))
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, filled up with zeros."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def drawn(counts: Tensor, width: int, seed: int) -> Tensor:
    """A mask with so many entries in each row, chosen at random.

    Args:
        counts: [rows] int64, at most `width`.
        width: entries of a row.
        seed: of the choice.

    Returns:
        [rows, width] bool.
    """
    rows = len(counts)
    order = hashed(rows * width, seed, counts.device).view(rows, width).argsort(dim=1, stable=True)
    place = torch.arange(width, device=counts.device).expand(rows, width)
    return torch.empty_like(order).scatter_(1, order, place) < counts[:, None]


def rice_bits(density: float) -> float:
    """Expected bits of one position among entries that are kept with this probability."""
    return min(_expected(density, bits) for bits in range(_MOST_REMAINDER_BITS))


def _expected(density: float, bits: int) -> float:
    longer = (1 - density) ** (1 << bits)  # the chance of one more step of the quotient
    return 1 + bits + longer / (1 - longer)


def encode_positions(mask: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The places of the entries that are set, as Rice codes of the gaps between them: quotients apart from remainders.

    A Rice code is a Golomb code (1966) whose divisor is a power of two.

    Args:
        mask: bool of any shape, read row by row.

    Returns:
        `gap_packed` int32 [1, words], quotients in unary, a one at the end of each; `remainder_packed` int32 [bits,
        words], a row for each bit of the remainders. And the integers `kept`, `gap_bits`, `remainder_bits`.
    """
    places = mask.flatten().nonzero().squeeze(1)
    gaps = places.diff(prepend=places.new_tensor([-1])) - 1
    likely = math.log2(max(1.0, 0.7 * mask.numel() / max(1, len(places))))
    tried = range(max(0, int(likely) - 1), min(_MOST_REMAINDER_BITS, int(likely) + 2))
    bits = min(tried, key=lambda b: int((gaps >> b).sum()) + b * len(gaps))
    ends = ((gaps >> bits) + 1).cumsum(0) - 1
    total = int(ends[-1]) + 1 if len(ends) else 0
    unary = torch.zeros(1, total, dtype=torch.uint8, device=mask.device)
    unary[0, ends] = 1
    parts = {"gap_packed": pack(unary, 1)}
    if bits:
        parts["remainder_packed"] = pack(torch.stack([(gaps >> b) & 1 for b in range(bits)]), 1)
    return parts, {"kept": len(places), "gap_bits": total, "remainder_bits": bits}


def decode_positions(parts: dict[str, Tensor], meta: dict[str, int]) -> Tensor:
    """Undo `encode_positions`: [kept] int64, ascending."""
    ends = unpack(parts["gap_packed"], 1, meta["gap_bits"])[0].nonzero().squeeze(1)
    gaps = ends.diff(prepend=ends.new_tensor([-1])) - 1
    if bits := meta["remainder_bits"]:
        rest = unpack(parts["remainder_packed"], 1, meta["kept"]).long()
        gaps = (gaps << bits) + sum(rest[b] << b for b in range(bits))
    return (gaps + 1).cumsum(0) - 1


def position_shapes(meta: dict[str, int]) -> Shapes:
    """What `encode_positions` stores."""
    bits = meta["remainder_bits"]
    found: Shapes = {"gap_packed": ((1, packed_words(meta["gap_bits"], 1)), torch.int32)}
    return found | ({"remainder_packed": ((bits, packed_words(meta["kept"], 1)), torch.int32)} if bits else {})
