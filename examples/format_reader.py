"""A second reader of the artifact format, from docs/concepts/format.md alone: base + artifact = checkpoint, exactly.

    python examples/format_reader.py BASE ARTIFACT OUT.safetensors

It needs numpy alone. A tensor is (dtype, array); bfloat16, which numpy lacks, is an array of its bits.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

Tensor = tuple[str, np.ndarray]
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "U8": "u1"}


def load(directory: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = memoryview(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        for name, one in json.loads(bytes(data[8:start])).items():
            if name != "__metadata__":
                array = np.frombuffer(data[start:][slice(*one["data_offsets"])], NUMPY[one["dtype"]])
                found[name] = (one["dtype"], array.reshape(one["shape"]))
    return found


def floats(tensor: Tensor) -> np.ndarray:
    return (tensor[1].astype("<u4") << 16).view("<f4") if tensor[0] == "BF16" else tensor[1].astype("<f4")


def rounded(values: np.ndarray, dtype: str) -> Tensor:
    """To the nearest value of a dtype; of two equally near ones to the even one."""
    bits = np.ascontiguousarray(values).view("<u4")
    return dtype, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if dtype == "BF16" else values).astype(NUMPY[dtype])


def codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """[rows, words] int32 -> [rows, count]: each row is one little-endian bit stream."""
    stream = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return stream.reshape(-1, count, bits) @ (1 << np.arange(bits))


def packed_delta(entry: dict[str, Any], part: dict[str, Tensor], width: int) -> np.ndarray:
    bits, n, packed = entry["bits"], entry.get("block"), part["weight_packed"][1]
    if n:  # numbers of words of n signs
        words = [[(-1) ** ((w & i).bit_count() + (w >= n)) for i in range(n)] for w in range(2 * n)]
        levels = np.array(words)[codes(packed, n.bit_length(), width // n)].reshape(-1, width)
    else:
        levels = 2 * codes(packed, bits, width) - (2**bits - 1)
    scale = np.repeat(floats(part["weight_scale"]), entry.get("group_size") or width, axis=1)[:, :width]
    found = scale * levels.astype("<f4")
    if "salient_index" in part:
        found[:, part["salient_index"][1]] += floats(part["salient_weight"])
    return found


def restored(entry: dict[str, Any], part: dict[str, Tensor], base: Tensor | None) -> Tensor:
    kind, shape, transposed = entry["kind"], entry["shape"], entry["role"].startswith("transposed")
    if kind in ("same", "dense"):
        own = part.get("", base)
        return own if base is None or own[0] == base[0] else rounded(floats(own), base[0])
    matrix = np.swapaxes(floats(base), -1, -2) if transposed else floats(base)
    matrix = matrix.reshape(-1, shape[-2] if transposed else shape[-1])
    extra = floats(part["weight_extra"]) if "weight_extra" in part else matrix[:0]
    matrix = matrix[: np.prod(shape) // matrix.shape[1] - len(extra)].copy()
    if kind == "lowrank":  # of one matrix, not of a stack
        delta = np.float32(entry["scale"]) * (floats(part["weight_left"]) @ floats(part["weight_right"]))
    else:
        assert kind == "packed", f"{kind}: this reader does not know it"
        delta = packed_delta(entry, part, matrix.shape[1])
    matrix[part["row_index"][1] if "row_index" in part else slice(None)] += delta
    matrix = np.concatenate([matrix, extra])
    matrix = np.swapaxes(matrix.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2) if transposed else matrix
    return rounded(matrix.reshape(shape), base[0])


def main(base: Path, artifact: Path, out: Path) -> None:
    tensors, theirs, stored = (
        json.loads((artifact / "meswitch.json").read_text())["tensors"],
        load(base),
        load(artifact),
    )
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, entry in tensors.items():
        part = {suffix: stored[name.removesuffix("weight") + suffix if suffix else name] for suffix in entry["stored"]}
        for suffix, (_, array) in part.items():
            assert hashlib.sha256(array.tobytes()).hexdigest() == entry["stored"][suffix]["sha256"], f"{name}: damaged"
        dtype, array = restored(entry, part, theirs.get(name))
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    out.write_bytes(len(text).to_bytes(8, "little") + text + data)


main(*map(Path, sys.argv[1:4]))
