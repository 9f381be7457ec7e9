"""Delta-DCT (arXiv 2503.06676): patches of the delta after a cosine transform, more bits for patches of larger norm.

As in JPEG: the matrix is cut into square patches, a patch's importance is its L2 norm, every patch is transformed by a
two-dimensional DCT-II, and its coefficients are quantised uniformly in the bits that its importance is worth. The
paper's size is one bit a weight: the half of the patches with the larger norms in 2 bits, the rest dropped. No
training, no data. Compressed are the linear layers of the blocks.

Ours: patches of 16 (the parameter `patch`). Other budgets follow the same rule: below one bit fewer patches have 2
bits; between n and n + 1 bits the stronger half has n + 1, the weaker half n - 1, and of each half the strongest have
one more bit, as many as fit. The levels are the codec's, without zero, with one bfloat16 scale of least squared error a
patch, where the authors take the range of a patch. Dropped patches are 0. The parameter `rescale` multiplies the matrix
so that its mean magnitude is the delta's again, as a reproduction of the paper does; off by default, because we could
not find it in the paper. Only an abstract and reproductions were at hand, not the authors' code.

Stored for [rows, in] and P = ceil(rows / p) ceil(in / p) patches of p x p, n_b of them in b bits: `patch_packed` int32
[1, ceil(3 P / 32)] (the bits of each patch), `codes<b>_packed` int32 [n_b, ceil(p p b / 32)], `codes<b>_scale` bfloat16
[n_b, 1], `rescale_scale` float32 [1]: the sum of n_b (b p^2 + 16) over the patches that are kept, + 3 P, bits.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from meswitch.codec import BPW, CodecRequest, Meta, Parameter, Shapes, nbytes, register
from meswitch.codec.quantize import pack, packed_words, unpack
from meswitch_lab.method import Encoded, Method, check, restore_matrix, round_matrix, rounded_shapes

PATCH = Parameter("patch", "Rows and columns of a patch.", default=16, least=2, most=256, whole=True)
RESCALE = Parameter("rescale", "1 keeps the mean magnitude of the delta, 0 does not.", default=0, most=1, whole=True)
BITS = (4, 3, 2, 1)


def encode(delta: Tensor, moment: Tensor | None, request: CodecRequest) -> Encoded:
    """delta: [rows, in] float32; `moment` is not used."""
    rows, width = delta.shape
    size = int(request.parameters.get(PATCH.name, PATCH.default or 16))
    patches = _cut(delta, size)
    order = patches.square().sum((1, 2)).argsort(descending=True, stable=True)
    steps = _steps(len(order))
    low, high = 0, len(steps)  # how many of them fit
    while low < high:
        middle = (low + high + 1) // 2
        fits = nbytes(shapes(rows, width, _meta(size, steps[:middle], len(order)))) <= request.budget
        low, high = (middle, high) if fits else (low, middle - 1)
    meta = _meta(size, steps[:low], len(order))
    bits = torch.zeros(len(order), dtype=torch.uint8, device=delta.device)
    bits[order] = torch.tensor(_bits(steps[:low], len(order)), dtype=torch.uint8, device=delta.device)
    basis = _basis(size, delta.device)
    coefficients = (basis @ patches @ basis.T).flatten(1)
    parts = {"patch_packed": pack(bits[None], 3), "rescale_scale": torch.ones(1, device=delta.device)}
    for b in BITS:
        if meta[f"patches_{b}"]:
            parts |= round_matrix(coefficients[bits == b], b, None, f"codes{b}")
    if request.parameters.get(RESCALE.name, 0):
        restored = decode(parts, rows, width, meta).abs().double().mean()
        parts["rescale_scale"] = (delta.abs().double().mean() / restored).float().view(1) if restored else torch.ones(1)
    return parts, meta


def _steps(count: int) -> list[tuple[int, int]]:
    """Ways to spend one budget after another: (place in the order of norms, bits that it gets from then on)."""
    half = (count + 1) // 2
    strong, weak = range(half), range(half, count)
    steps = [(place, 2) for place in strong]
    for bits in (3, 4):
        for first, second in zip(strong, [*weak, None], strict=False):
            steps.append((first, bits))
            if second is not None:
                steps.append((second, bits - 2))
    return steps + [(place, bits) for bits in (3, 4) for place in weak]


def _bits(steps: list[tuple[int, int]], count: int) -> list[int]:
    """Bits of each patch, in the order of norms."""
    found = [0] * count
    for place, bits in steps:
        found[place] = bits
    return found


def _meta(size: int, steps: list[tuple[int, int]], count: int) -> dict[str, int]:
    bits = _bits(steps, count)
    return {"patch": size} | {f"patches_{b}": bits.count(b) for b in BITS}


def _cut(delta: Tensor, size: int) -> Tensor:
    """[patches, size, size], filled up with zeros at the edges."""
    rows, width = delta.shape
    padded = F.pad(delta, (0, -width % size, 0, -rows % size))
    down, across = padded.shape[0] // size, padded.shape[1] // size
    return padded.view(down, size, across, size).transpose(1, 2).reshape(-1, size, size)


def _basis(size: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II: [size, size] float32, a row for each frequency."""
    at = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (at + 0.5) * at[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.float().to(device)


def decode(parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
    """[rows, in] float32."""
    size = meta["patch"]
    down, across = math.ceil(rows / size), math.ceil(width / size)
    bits = unpack(parts["patch_packed"], 3, down * across)[0]
    coefficients = torch.zeros(down * across, size * size, dtype=torch.float32, device=bits.device)
    for b in BITS:
        if meta[f"patches_{b}"]:
            coefficients[bits == b] = restore_matrix(parts, size * size, b, None, f"codes{b}")
    basis = _basis(size, bits.device)
    patches = basis.T @ coefficients.view(-1, size, size) @ basis
    delta = patches.view(down, across, size, size).transpose(1, 2).reshape(down * size, across * size)
    return delta[:rows, :width].contiguous() * parts["rescale_scale"]


def shapes(rows: int, width: int, meta: Meta) -> Shapes:
    size = meta["patch"]
    check(2 <= size <= 256, f"patch: {size} is not within 2 and 256")
    patches = math.ceil(rows / size) * math.ceil(width / size)
    counts = {b: meta[f"patches_{b}"] for b in BITS}
    check(min(counts.values()) >= 0, "patches: a negative number of them")
    check(sum(counts.values()) <= patches, f"patches: more than {patches}")
    found: Shapes = {
        "patch_packed": ((1, packed_words(patches, 3)), torch.int32),
        "rescale_scale": ((1,), torch.float32),
    }
    for b, count in counts.items():
        found |= rounded_shapes(count, size * size, b, None, f"codes{b}") if count else {}
    return found


METHOD = register(
    Method(
        "delta-dct",
        encode,
        decode,
        shapes,
        ("patch", *(f"patches_{b}" for b in BITS)),
        (BPW, PATCH, RESCALE),
        blocks_only=True,
    )
)
