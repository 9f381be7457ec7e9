"""What changed of a tensor, bit for bit.

A fine-tune in 16 bit moves most weights by a few steps of the floating-point grid, or by none. Both tensors are read as
integers in the order of the floats, so that neighbours differ by one; their difference is small, its upper byte nearly
always zero, and a standard entropy coder finds that. Integers wrap around, so every pattern of bits comes back: NaN
with its payload, -0.0, infinities, subnormals.
"""

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from meswitch.errors import ArtifactError
from meswitch.tensorfile import tensor_bytes

EXACT = "exact"
BLOCK = 1 << 18  # values that are coded on their own: what a thread has in memory stays small
_INTEGERS = {2: (torch.int16, np.int16, np.uint16), 4: (torch.int32, np.int32, np.uint32)}
EXACT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MEM_LEVEL = 9  # zlib's most: new Huffman codes for every 32768 values
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ExactDelta:
    """A tensor of any shape, as what is to be done to the base's.

    Args:
        stream: [bytes] uint8, all coded planes after one another: of each block its lowest byte's first.
        blocks: [blocks, planes + 1] int64, for each block the bytes of its coded planes, 0 for one that is all zero,
            and the CRC-32 of the tensor's own bytes.
        shape: of the tensor.
        dtype: one of `EXACT_DTYPES`.
    """

    stream: Tensor
    blocks: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """By the suffix of their stored names."""
        return {"weight_exact": self.stream, "weight_blocks": self.blocks}

    def restore(self, base: Tensor, name: str) -> Tensor:
        """The tensor itself, in host memory.

        Args:
            base: the base's tensor as it is stored; it may have more rows or fewer.
            name: of the tensor, for errors.

        Raises:
            ArtifactError: the stream is damaged, or this is not the base's tensor that it was made from.
        """
        restored = torch.empty(self.shape, dtype=self.dtype)
        own, stream = _integers(restored), tensor_bytes(self.stream)
        table: list[list[int]] = self.blocks.cpu().tolist()
        sizes = [row[:-1] for row in table]
        fits = len(table) == block_count(restored.numel()) and all(min(row) >= 0 for row in sizes)
        if not fits or sum(map(sum, sizes)) != len(stream):
            raise ArtifactError(f"{name}: its table of blocks does not fit its {len(stream)} bytes; it is damaged")
        try:
            theirs = _integers(counterpart(base, self.shape, self.dtype))
        except ValueError as error:
            raise ArtifactError(f"{name}: {error}") from None
        starts = np.cumsum([0, *map(sum, sizes)]).tolist()

        def decode(block: int) -> None:
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            try:
                own[part] = _decoded(stream[starts[block] : starts[block + 1]], sizes[block], theirs[part])
            except (ValueError, zlib.error) as error:
                raise ArtifactError(f"{name}: block {block} is damaged ({error})") from None
            if zlib.crc32(own[part]) != table[block][-1]:
                raise ArtifactError(
                    f"{name}: block {block} is not restored to what was compressed: the base's tensor is another one, "
                    "or the artifact is damaged"
                )

        _in_threads(decode, len(table))
        return restored


def encode_exact(ours: Tensor, base: Tensor) -> ExactDelta:
    """Code a tensor against the base's.

    Args:
        ours: of one of `EXACT_DTYPES`.
        base: of the same shape, or with more or fewer rows; another dtype is converted first.
    """
    own, theirs = _integers(ours), _integers(counterpart(base, tuple(ours.shape), ours.dtype))

    def encode(block: int) -> tuple[list[bytes], int]:
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        return _coded(own[part], theirs[part]), zlib.crc32(own[part])

    coded = _in_threads(encode, block_count(ours.numel()))
    stream = bytearray(b"".join(plane for planes, _ in coded for plane in planes))
    table = [[*map(len, planes), check] for planes, check in coded]
    return ExactDelta(
        torch.frombuffer(stream, dtype=torch.uint8) if stream else torch.empty(0, dtype=torch.uint8),
        torch.tensor(table, dtype=torch.int64).view(-1, ours.dtype.itemsize + 1),
        tuple(ours.shape),
        ours.dtype,
    )


def block_count(values: int) -> int:
    """How many blocks a tensor of so many values has."""
    return -(-values // BLOCK)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: 0.0 is not -0.0, and a NaN is itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.view(whole), other.view(whole))


def counterpart(base: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What a tensor of this shape and dtype is compared with: the base's, its rows cut off, or zeros below them.

    Raises:
        ValueError: the base's tensor has rows of another shape.
    """
    if tuple(base.shape) == shape:
        return base.to(dtype)
    if not shape or base.shape[1:] != shape[1:]:
        raise ValueError(f"the base's shape {list(base.shape)} does not go with {list(shape)}")
    known = base[: shape[0]].to(dtype)
    return torch.cat([known, known.new_zeros(shape[0] - len(known), *shape[1:])])


def _integers(tensor: Tensor) -> Any:
    """The bits as a flat array of unsigned integers, over the same memory where the tensor is contiguous."""
    own, _, unsigned = _INTEGERS[tensor.dtype.itemsize]
    return tensor.contiguous().view(-1).view(own).numpy().view(unsigned)


def _sign(values: Any) -> Any:
    """All ones where the uppermost bit is set, else zeros."""
    _, signed, unsigned = _INTEGERS[values.itemsize]
    return (values.view(signed) >> (8 * values.itemsize - 1)).view(unsigned)


def _ordered(floats: Any) -> Any:
    """Bits of floats as integers in the same order: -0.0 is one below 0.0."""
    return floats ^ (_sign(floats) | _top(floats))


def _top(values: Any) -> Any:
    return values.dtype.type(1 << (8 * values.itemsize - 1))


def _coded(own: Any, theirs: Any) -> list[bytes]:
    """The byte planes of the difference, the lowest first, each deflated. Both: [values] unsigned."""
    difference = _ordered(own) - _ordered(theirs)
    zigzag = (difference << 1) ^ _sign(difference)  # 0, -1, 1, -2, ... -> 0, 1, 2, 3, ...
    return [_deflated((zigzag >> (8 * plane)).astype(np.uint8)) for plane in range(own.itemsize)]


def _decoded(stream: memoryview, sizes: list[int], theirs: Any) -> Any:
    """Undo `_coded`: [values] unsigned."""
    zigzag, start = np.zeros_like(theirs), 0
    for plane, size in enumerate(sizes):
        if size:
            values = _inflated(stream[start : start + size], len(theirs))
            zigzag |= np.frombuffer(values, np.uint8).astype(theirs.dtype) << (8 * plane)
        start += size
    ordered = _ordered(theirs) + ((zigzag >> 1) ^ (0 - (zigzag & 1)))
    return ordered ^ (~_sign(ordered) | _top(ordered))


def _deflated(plane: Any) -> bytes:
    """Huffman codes and runs: as small as with a search for repetitions, ten times as fast. Zeros alone are nothing."""
    if not plane.any():
        return b""
    coder = zlib.compressobj(zlib.Z_BEST_COMPRESSION, zlib.DEFLATED, -zlib.MAX_WBITS, _MEM_LEVEL, zlib.Z_RLE)
    return coder.compress(plane) + coder.flush()


def _inflated(data: memoryview, size: int) -> bytes:
    """Exactly `size` bytes.

    Raises:
        ValueError, zlib.error: the stream holds anything else.
    """
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    found = coder.decompress(data, size + 1)
    if len(found) != size or not coder.eof or coder.unused_data:
        raise ValueError(f"a plane does not hold {size} bytes")
    return found


def _in_threads(function: Callable[[int], _Result], count: int) -> list[_Result]:
    """For each block, by as many threads as PyTorch takes: zlib works without Python's lock."""
    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        return [function(block) for block in range(count)]
    with ThreadPoolExecutor(threads, "exact") as pool:
        return list(pool.map(function, range(count)))
