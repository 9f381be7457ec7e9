"""Less than one bit a weight: the signs of a block of input channels are a word of a first-order Reed-Muller code.

The words of length `n`, a power of two, are the rows of the Hadamard matrix of order `n` (Sylvester's) and their
negatives: `2 n` words, so `log2(n) + 1` bits for `n` signs. Blocks of 8 take 0.5 bits a weight, of 4 0.75. The nearest
word of a block is found by one Hadamard transform. Of a normal delta's energy a word of 8 keeps 0.41 where one sign for
each of half of the weights keeps 0.32. Fine-tunes' deltas in such words are ours; quantising weights in blocks is
AQLM's and QuIP#'s (arXiv 2401.06118, 2402.04396).

A word is unfolded into its signs when an artifact is read, so what computes with 1-bit codes computes with these.
"""

import torch
from torch import Tensor

from meswitch.codec.quantize import SCALE_DTYPE, expand_scale, pack, packed_words, unpack

LENGTHS = (4, 8)


def word_bits(length: int) -> int:
    """Bits that one word takes."""
    return length.bit_length()


def words_shape(rows: int, in_features: int, length: int) -> tuple[int, int]:
    """Of the packed numbers of words: int32."""
    return rows, packed_words(in_features // length, word_bits(length))


def hadamard(length: int, device: torch.device | None = None) -> Tensor:
    """[length, length] float32 of 1 and -1, symmetric."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < length:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def nearest_words(values: Tensor, length: int) -> Tensor:
    """The numbers of the words nearest to blocks of values.

    Args:
        values: [rows, in_features] float32; in_features is a multiple of `length`.

    Returns:
        [rows, in_features / length] int64; `i + length` is the negative of the word `i`.
    """
    found = values.view(len(values), -1, length) @ hadamard(length, values.device)
    best = found.abs().argmax(-1, keepdim=True)
    return (best + length * (found.gather(-1, best) < 0)).squeeze(-1)


def signs_of(words: Tensor, length: int) -> Tensor:
    """[rows, blocks] numbers of words -> [rows, blocks * length] float32 of 1 and -1."""
    book = hadamard(length, words.device)
    return torch.cat([book, -book])[words].view(len(words), -1)


def fold(packed: Tensor, in_features: int, length: int) -> Tensor:
    """1-bit codes that are words -> the packed numbers of the words (`words_shape`), int32."""
    signs = unpack(packed, 1, in_features).float() * 2 - 1
    return pack(nearest_words(signs, length), word_bits(length))


def unfold(folded: Tensor, in_features: int, length: int) -> Tensor:
    """Undo `fold`: [rows, ceil(in_features / 32)] int32."""
    words = unpack(folded, word_bits(length), in_features // length).long()
    return pack((signs_of(words, length) > 0).to(torch.uint8), 1)


def word_scales(delta: Tensor, length: int, group_size: int | None) -> Tensor:
    """Scales of least squared error for the nearest words: [rows, groups] bfloat16."""
    rows, width = delta.shape
    size = group_size or width
    along = (signs_of(nearest_words(delta, length), length) * delta).view(rows, width)
    padded = torch.nn.functional.pad(along, (0, -width % size)).view(rows, -1, size)
    counts = torch.nn.functional.pad(torch.ones(width, device=delta.device), (0, -width % size)).view(-1, size).sum(1)
    scale: Tensor = (padded.sum(-1) / counts).clamp_min(0)
    return scale.to(SCALE_DTYPE)


def feedback_words(
    delta: Tensor, scale: Tensor, length: int, group_size: int | None, factor: Tensor, order: Tensor
) -> Tensor:
    """1-bit codes that are words, chosen block after block, each for what the blocks before it have left.

    Args:
        delta: [rows, in_features] float32.
        scale: [rows, groups], fixed beforehand.
        factor: what `feedback.upper_factor` gave for `order`.
        order: [in_features] int64, block by block (`block_order`).

    Returns:
        [rows, in_features] uint8.
    """
    rows, width = delta.shape
    book = hadamard(length, delta.device)
    book = torch.cat([book, -book])
    steps = expand_scale(scale.float(), width, group_size)[:, order[::length]]
    own = delta.index_select(1, order)
    errors = torch.zeros_like(own)
    codes = torch.empty(rows, width, dtype=torch.uint8, device=delta.device)
    for start in range(0, width, length):
        some = slice(start, start + length)
        triangle, step = factor[some, some], steps[:, start // length, None]
        # the errors of earlier blocks and this one's delta, as the output sees them
        wanted = own[:, some] @ triangle
        if start:
            wanted = torch.addmm(wanted, errors[:, :start], factor[:start, some])
        seen = book @ triangle
        harm = step * seen.square().sum(1) - 2 * (wanted @ seen.T)  # less what all words share, over the step
        signs = book[harm.argmin(1)]
        errors[:, some] = own[:, some] - step * signs
        codes[:, some] = (signs > 0).to(torch.uint8)
    back = torch.empty_like(order)
    back[order] = torch.arange(width, device=order.device)
    return codes.index_select(1, back)


def block_order(energy: Tensor, length: int) -> Tensor:
    """[in_features] int64: whole blocks by falling energy."""
    width = len(energy)
    first = energy.view(-1, length).sum(1).argsort(descending=True, stable=True) * length
    return (first[:, None] + torch.arange(length, device=energy.device)).view(width)


def words_fit(in_features: int, group_size: int | None, length: int) -> bool:
    """Whether blocks fill the rows, and groups of them."""
    return in_features % length == 0 and (group_size or in_features) % length == 0
