"""Fill vLLM's tables of docs/results/serving.md from what `vllm_server.py` and the other benchmarks of its name stored.

python benchmarks/serving/vllm_doc.py            rewrite what is out of date
python benchmarks/serving/vllm_doc.py --check    say so instead, and exit 1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common.generated import Data, arguments_of, stored, update, where_measured
from benchmarks.common.markdown_tables import pipe

SERVED, OTHERS, RANKS = "vllm-h100.json", "vllm-others-h100.json", "vllm-h200-x2.json"
PROFILE = "vllm-profile-h100.json"
PAUSES, STEPS = "vllm-cold-load-h200.json", "cold-load-h200.json"
RANKS_OPTION = "--tensor-parallel-size"
NOT_YET = "Not measured yet: `python benchmarks/serving/{}.py`."


def served() -> str:
    """Tokens a second by the number of experts, beside what else could serve them, and what their weights take."""
    rows, where = _by_experts()
    head = [
        "experts",
        "meswitch, tokens/s",
        "of the base alone",
        "one expert at a time, tokens/s",
        "LoRA of rank 64, tokens/s",
        "weights, GB",
        "merged, GB",
    ]
    cells = [
        [
            str(row["experts"]),
            f"{row['rate']:.0f}",
            f"{row['of_base']:.2f}",
            f"{row['swap']:.0f}",
            f"{row['lora']:.0f}",
            f"{row['weights']:.1f}",
            f"{row['merged']:.1f}",
        ]
        for row in rows
    ]
    return f"{pipe(head, *cells)}\n\n{where}"


def answer() -> str:
    """`served`, and what it says at the most experts."""
    rows, _ = _by_experts()
    last = rows[-1]
    said = [
        f"One copy of the base and {last['experts']} experts take {last['weights']:.0f} GB; {last['experts']} merged "
        f"models take {last['merged']:.0f} GB.",
        f"A batch of {last['experts']} experts gives {last['rate']:.0f} tokens a second, one expert at a time "
        f"{last['swap']:.0f}.",
        f"It costs speed: {last['experts']} experts in one batch give {last['of_base']:.2f} of the base's throughput, "
        f"because a step reads {last['experts']} deltas. LoRA adapters of rank 64 give {last['lora']:.0f} tokens a "
        "second.",
    ]
    return "\n".join([served(), "", *(f"- {one}" for one in said)])


def _by_experts() -> tuple[list[dict[str, float]], str]:
    """Of each number of experts at the most requests: tokens a second and GB; and a line on where."""
    data, others, steps = stored(SERVED), stored(OTHERS), stored(STEPS)
    sizes = stored("compress-memory-7b.json")
    if data is None or others is None or steps is None or sizes is None:
        raise SystemExit(f"benchmarks/results: {SERVED}, {OTHERS}, {STEPS} and compress-memory-7b.json are needed")
    slot, whole = steps["seconds"]["gigabytes"], sizes["checkpoint_gb"]
    most = max(row["concurrency"] for row in data["rows"])
    measured = data["rows"] + [row for row in others["rows"] if row["engine"] == "swap"]
    rates = {(r["engine"], r["experts"]): r["output_throughput"] for r in measured if r["concurrency"] == most}
    rows = [
        {
            "experts": count,
            "rate": rate,
            "of_base": rate / rates["base", 0],
            "swap": rates["swap", count],
            "lora": rates["lora-64", count],
            "weights": whole + count * slot,
            "merged": count * whole,
        }
        for (engine, count), rate in rates.items()
        if engine == "meswitch" and count
    ]
    settings = data["meta"]["settings"]
    lengths = f"{settings['input_len']} tokens in, {settings['output_len']} out; one expert at a time in another run."
    return rows, f"{lengths} {where_measured(data['meta'])}"


def table(rows: list[Data]) -> str:
    """Shares are of vLLM without LoRA or deltas. Decoding is by the time between two tokens: in the median a step that
    reads no prompts, while TPOT holds those that do as well.
    """
    head = [
        "engine",
        "requests at a time",
        "experts",
        "tokens/s",
        "of base",
        "TTFT, ms",
        "TPOT, ms",
        "between tokens, ms",
        "decoding, of base",
    ]
    cells = []
    for row in rows:
        base = [r for r in rows if r["engine"] == "base" and r["concurrency"] == row["concurrency"]]
        whole = f"{row['output_throughput'] / base[0]['output_throughput']:.2f}" if base else "-"
        decoding = f"{base[0]['median_itl_ms'] / row['median_itl_ms']:.2f}" if base else "-"
        counts = [str(row["concurrency"]), str(row["experts"]), f"{row['output_throughput']:.0f}"]
        times = [f"{row[name]:.1f}" for name in ("median_ttft_ms", "median_tpot_ms", "median_itl_ms")]
        cells.append([row["engine"], *counts, whole, *times, decoding])
    return pipe(head, *cells)


def pauses_table(rows: list[Data]) -> str:
    """Of `vllm_cold_load.py`."""
    head = ["read ahead", "longest pause without a load, ms", "during loads, ms", "a load, ms"]
    fields = ("quiet_ms", "longest_ms", "load_ms")
    return pipe(head, *(["yes" if r["read_ahead"] else "no", *(f"{r[name]:.1f}" for name in fields)] for r in rows))


def profile_table(data: Data) -> str:
    """Of `vllm_profile.py`: a column for each engine and count of experts."""
    layers = data["meta"]["settings"]["layers"]
    names = [
        "linears, a layer",
        "attention, a layer",
        "norms and the rest, a layer",
        "head",
        "sampling and the rest",
        "gaps",
    ]
    columns = []
    for row in data["rows"]:
        parts = dict.fromkeys(names, 0.0)
        for kernel in row["kernels"]:
            parts[_part_of(kernel, layers)] += kernel["us"] * kernel["a_step"]
        parts["gaps"] = row["gaps_us"]
        parts["sampling and the rest"] = row["step_us"] - sum(parts[n] for n in names if n != "sampling and the rest")
        columns.append([parts[name] / (layers if "a layer" in name else 1) for name in names])
    head = ["us", *("base" if r["engine"] == "plain" else f"{r['experts']} experts" for r in data["rows"])]
    return pipe(head, *([name, *(f"{column[i]:.1f}" for column in columns)] for i, name in enumerate(names)))


def _part_of(kernel: Data, layers: int) -> str:
    name, often = kernel["kernel"], kernel["a_step"] > layers / 2
    if "attention" in name or name == "reduce_segments":  # where it is cut along the context
        return "attention, a layer"
    if name.startswith(("nvjet", "fused_kernel", "decode_kernel", "void cublasLt")):
        return "linears, a layer" if often else "head"
    return "norms and the rest, a layer" if often else "sampling and the rest"


def steps_table(data: Data) -> str:
    """Of `cold_load.py`. Waits are those of launches by another thread; without a GPU there are none."""
    size, waits = data["seconds"]["gigabytes"], data["waits_ms"]
    head, rows = ["step", "s", "GB/s"], []
    for name, value in data["seconds"].items():
        if name != "gigabytes":
            rows.append([name, f"{value:.2f}", f"{size / value:.1f}"])
    if waits:
        head.append("launches wait, ms")
        for row in rows:
            row.append(f"{waits[row[0]]:.1f}")
    return pipe(head, *rows)


def _served(data: Data) -> str:
    settings = data["meta"]["settings"]
    lengths = f"{settings['input_len']} tokens in and {settings['output_len']} out, the prefix cache off; medians."
    words = settings["serve_args"]
    ranks = f" {words[words.index(RANKS_OPTION) + 1]} ranks:" if RANKS_OPTION in words else ""
    return f"{table(data['rows'])}\n\n{_about(data)}, {lengths}{ranks} {where_measured(data['meta'])}"


def _profiled(data: Data) -> str:
    shown = data | {"rows": [row for row in data["rows"] if (row["engine"] == "plain") == (row["experts"] == 0)]}
    settings = data["meta"]["settings"]
    size = f"steps of {settings['tokens']} tokens, {settings['layers']} layers."
    return f"{profile_table(shown)}\n\n{_about(data)}, {size} {where_measured(data['meta'])}"


def _pauses(data: Data) -> str:
    return f"{pauses_table(data['rows'])}\n\n{_about(data)}. {where_measured(data['meta'])}"


def _steps(data: Data) -> str:
    size = data["seconds"]["gigabytes"]
    return f"{steps_table(data)}\n\n{_about(data)}, {size:.2f} GB in a slot. {where_measured(data['meta'])}"


def _about(data: Data) -> str:
    settings = data["meta"]["settings"]
    return f"{settings['model']}, deltas of {settings['bits']} bits"


def main(arguments: list[str] | None = None) -> None:
    options = arguments_of(__doc__, "results/serving.md", arguments)
    wanted = {
        "measured": (SERVED, _served, "vllm_server"),
        "others": (OTHERS, _served, "vllm_server"),
        "ranks": (RANKS, _served, "vllm_server"),
        "profile": (PROFILE, _profiled, "vllm_profile"),
        "pauses": (PAUSES, _pauses, "vllm_cold_load"),
        "steps": (STEPS, _steps, "cold_load"),
    }
    places = {"answer": answer()}
    for name, (file, written, script) in wanted.items():
        data = stored(file)
        places[name] = NOT_YET.format(script) if data is None else written(data)
    update(options.doc, "benchmarks/serving/vllm_doc.py", places, {}, check=options.check, redraw=options.redraw)


if __name__ == "__main__":
    main()
