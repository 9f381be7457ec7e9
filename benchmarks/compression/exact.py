"""What `meswitch compress --bits exact` takes, and how fast one thread codes it: bytes of the full tensor, MB/s.

    python benchmarks/compression/exact.py [--values 16777216] [--repeats 3] [--json FILE]
    python benchmarks/compression/exact.py --doc [--check]      fill the table of docs/results/quality.md, or compare

Weights are drawn as normal(0, 0.02) in float32. A full fine-tune is the rounded sum of them and a normal change of the
stated relative norm; a sparse one changes a share of the weights, by that change or by one step of the 16-bit grid. The
example family's experts are trained ones, with far larger changes than those of large models. Beside the size is what
the order-0 entropy of the differences allows, and what other ways to code the same differences take.
"""

import argparse
import json
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common.generated import RESULTS, ROOT
from benchmarks.common.markdown_tables import fill, pipe
from benchmarks.compression.cpu import cpu
from meswitch.checkpoint import Checkpoint
from meswitch.codec import encode_exact, same_bits
from meswitch.codec.exact import BLOCK

RESULT = RESULTS / "exact-cpu.json"
Pairs = list[tuple[Tensor, Tensor]]
HUFFMAN, DEFAULT = (6, zlib.Z_HUFFMAN_ONLY), (6, zlib.Z_DEFAULT_STRATEGY)


def cases(values: int) -> Iterator[tuple[str, Pairs]]:
    """What changed, and the tensors: ours, the base's."""
    draw = torch.Generator().manual_seed(0)
    full = torch.randn(values, generator=draw) * 0.02
    change = torch.randn(values, generator=draw) * 0.02
    chance = torch.rand(values, generator=draw)
    base = full.bfloat16()
    for relative in (0.003, 0.01, 0.03, 0.1):
        yield f"full fine-tune, {relative}", [((full + relative * change).bfloat16(), base)]
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"full fine-tune, 0.01, {name}", [((full + 0.01 * change).to(dtype), full.to(dtype))]
    for share in (0.3, 0.1, 0.05, 0.01):
        yield f"{share:.0%} moved, 0.01", [((full + 0.01 * change * (chance < share)).bfloat16(), base)]
    for share in (0.3, 0.1):
        step = (chance < share) * change.sign()
        yield f"{share:.0%} moved by a step", [((base.view(torch.int16) + step.short()).view(torch.bfloat16), base)]
    family = ROOT / "examples" / "family"
    theirs = Checkpoint.open(family / "base")
    for name in ("math", "sql"):
        ours = Checkpoint.open(family / name)
        yield f"example family, {name}", [(ours.read(tensor), theirs.read(tensor)) for tensor in ours.tensors]


def measure(name: str, pairs: Pairs, repeats: int) -> dict[str, Any]:
    """One row; the fastest of several runs."""
    full = sum(ours.nbytes for ours, _ in pairs)
    encoding, deltas = fastest(lambda: [encode_exact(*pair) for pair in pairs], repeats)
    decoding, back = fastest(
        lambda: [delta.restore(base, "") for delta, (_, base) in zip(deltas, pairs, strict=True)], repeats
    )
    if not all(same_bits(own, ours) for own, (ours, _) in zip(back, pairs, strict=True)):
        raise SystemExit(f"{name}: not restored bit for bit")
    differences = np.concatenate([zigzag(ours, base) for ours, base in pairs])
    change, size = (
        sum(side.double().square().sum() for side in sides).sqrt()
        for sides in zip(*((ours.float() - base.float(), base.float()) for ours, base in pairs), strict=True)
    )
    return {
        "what": name,
        "share": float((differences != 0).mean()),
        "relative": float(change / size),
        "bytes": sum(delta.nbytes for delta in deltas) / full,
        "entropy": entropy(differences),
        "encode": full / encoding / 1e6,
        "decode": full / decoding / 1e6,
        "others": others(differences),
    }


def fastest(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Seconds of CPU time of the fastest run, and what it gave."""
    best, found = float("inf"), None
    for _ in range(repeats):
        started = time.process_time()
        found = run()
        best = min(best, time.process_time() - started)
    return best, found


def zigzag(ours: Tensor, base: Tensor) -> Any:
    """Differences of the floats in their order, as the artifact codes them: [values] unsigned."""
    size = 8 * ours.dtype.itemsize
    ints = [tensor.reshape(-1).view({16: torch.int16, 32: torch.int32}[size]).long() for tensor in (ours, base)]
    one, other = (torch.where(bits < 0, -(2 ** (size - 1)) - 1 - bits, bits) for bits in ints)
    difference = (one - other).numpy()
    return np.where(difference < 0, -2 * difference - 1, 2 * difference).astype({16: np.uint16, 32: np.uint32}[size])


def entropy(differences: Any) -> float | None:
    """Order-0 entropy as a share of the full size; None in 32 bit, where no value comes often enough to tell."""
    if differences.itemsize > 2:
        return None
    share = np.bincount(differences)
    share = share[share > 0] / len(differences)
    return float(-(share * np.log2(share)).sum() / 16)


def others(differences: Any) -> dict[str, float]:
    """Bytes of other ways to code the same, as shares of the full size, and MB/s of one thread."""
    planes = [(differences >> (8 * plane)).astype(np.uint8) for plane in range(differences.itemsize)]
    moved = differences != 0
    values = [plane[moved] for plane in planes]
    ways = {
        "Huffman codes alone": (planes, HUFFMAN),
        "search for repetitions": (planes, DEFAULT),
        "mask of the moved, values": ([np.packbits(moved), *values], HUFFMAN),
    }
    found = {}
    for name, (arrays, how) in ways.items():
        started, size = time.process_time(), sum(deflated(array, *how) for array in arrays)
        found[name] = size / differences.nbytes
        found[f"{name}, MB/s"] = differences.nbytes / (time.process_time() - started) / 1e6
    return found


def deflated(array: Any, level: int, strategy: int) -> int:
    """Bytes in blocks as the artifact has them."""
    size = 0
    for start in range(0, len(array), BLOCK):
        coder = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
        size += len(coder.compress(array[start : start + BLOCK])) + len(coder.flush())
    return size


def table(found: dict[str, Any]) -> str:
    """As docs/results/quality.md shows it."""
    head = ["", "weights that changed", "relative norm", "of the full size", "entropy", "encode, MB/s", "decode, MB/s"]
    rows = [
        [
            row["what"],
            f"{row['share']:.1%}",
            f"{row['relative']:.4f}",
            f"{row['bytes']:.1%}",
            "-" if row["entropy"] is None else f"{row['entropy']:.1%}",
            f"{row['encode']:.0f}",
            f"{row['decode']:.0f}",
        ]
        for row in found["rows"]
    ]
    meta = found["meta"]
    note = (
        f"{meta['values']:,} weights in bfloat16 where nothing else is said; CPU time of one thread, {meta['cpu']}; "
        f"torch {meta['torch']}, zlib {meta['zlib']}, {meta['date']} (`benchmarks/compression/exact.py`)."
    )
    return f"{pipe(head, *rows)}\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1 << 24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--doc", action="store_true", help="fill docs/results/quality.md from the stored result")
    parser.add_argument("--check", action="store_true", help="with --doc: only say what is out of date, and exit 1")
    options = parser.parse_args()
    if options.doc:
        page = ROOT / "docs" / "results" / "quality.md"
        text = page.read_text()
        filled = fill(text, "exact", table(json.loads(RESULT.read_text())))
        if options.check and filled != text:
            sys.exit(f"{page}: older than the results: run `python benchmarks/compression/exact.py --doc`")
        page.write_text(filled)
        return
    torch.set_num_threads(1)
    rows = []
    for name, pairs in cases(options.values):
        rows.append(measure(name, pairs, options.repeats))
        print(rows[-1], file=sys.stderr, flush=True)
    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "values": options.values,
        "cpu": cpu(),
        "threads": 1,
        "torch": torch.__version__,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "python": platform.python_version(),
    }
    found = {"meta": meta, "rows": rows}
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
