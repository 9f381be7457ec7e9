"""Fill the embedded engine's tables of docs/results/serving.md from results of `cpu.py`, `residency.py`, `load.py`,
`engine.py`, `quantised.py`.

python benchmarks/serving/doc.py            rewrite what is out of date
python benchmarks/serving/doc.py --check    say so instead, and exit 1
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common.generated import Data, Plot, arguments_of, stored, update, where_measured
from benchmarks.common.markdown_tables import pipe

LATER = "Not measured yet."


def serving(found: Data) -> str:
    """Both sides for each number of users, alone and beside busy processes."""
    head = ["users", "experts", "busy processes", "engine, tokens/s", "merged, tokens/s", "by the clock", "by CPU time"]
    rows: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in found["rows"]:
        if row["what"] == "serving":
            rows.setdefault((row["users"], row["experts"], row["busy"]), {})[row["engine"]] = row

    def times(sides: dict[str, Any], key: str) -> str:
        return f"{sides['embedded'][key] / sides['transformers'][key]:.2f}x"

    table = [
        [
            *map(str, key),
            *(f"{sides[name]['tokens_per_s']:.0f}" for name in ("embedded", "transformers")),
            times(sides, "tokens_per_s"),
            times(sides, "tokens_per_cpu_s"),
        ]
        for key, sides in rows.items()
    ]
    meta = found["meta"]
    alone, *beside = [row["seconds"] for row in found["rows"] if row["what"] == "distillation"]
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    under = (
        f"Merged weights took {meta['merged_bytes'] / 1e6:.0f} MB beside a base of {meta['base_bytes'] / 1e6:.0f} MB. "
        f"A distillation of a few steps took {alone:.0f} s, and {beside[0]:.0f} s beside the busy processes. "
        f"{meta['cores']} cores of an {meta['cpu']}, one thread for each side, best of {meta['repeats']}; the machine "
        f"had a load of {meta['load']} from elsewhere or from this. {versions}, {meta['date']}."
    )
    return f"{pipe(head, *table)}\n\n{under}"


def residency(found: Data) -> str:
    """What requests waited for, in a row for each load; then what loads cost others, where that was measured."""
    head = ["", "experts", "hits", "TTFT p50, p95, p99, ms", "of hits", "TPOT p50, p95, p99, ms", "failed", "MB moved"]
    asked = [row for row in found["rows"] if "ttft_ms" in row]
    table = [
        [
            row["what"] + (", in bursts" if row["arrivals"] == "bursts" else ""),
            str(row["experts"]),
            f"{row['hits']:.0%}",
            *(_several(row[key]) for key in ("ttft_ms", "ttft_of_hits_ms", "tpot_ms")),
            f"{row['failed']} of {row['requests']}",
            f"{row['moved_mb']:.0f}",
        ]
        for row in asked
    ]
    meta = found["meta"]
    under = (
        f"{meta['rate']:g} requests a second for {meta['seconds']:g} s, {meta['tokens']} new tokens each, by "
        f"Zipf({meta['zipf']:g}); {meta['slots']} slots, room for {meta['host_experts']} experts in the host tier. "
    )
    if "card" in meta:
        under += f"{meta['model']}, {meta['layers']} layers. {where_measured(meta)}"
    else:
        versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
        under += f"{meta['cores']} cores, load {meta['load']}; {versions}, {meta['date']}."
    late = [f"{row['ttft_of_hits_p95_ratio']:.2f}" for row in asked if "ttft_of_hits_p95_ratio" in row]
    if late:
        under += (
            f" With more experts than slots the first token of hits came, at p95, after {' and in bursts '.join(late)} "
            "times as long."
        )
    return "\n\n".join([pipe(head, *table), under, *cost_of_loads(found)])


def cost_of_loads(found: Data) -> list[str]:
    """The pace of running answers alone and beside loads, and that of the copy; nothing where it was not measured."""
    running = [row for row in found["rows"] if "streams" in row]
    if not running:
        return []
    head = ["", "TPOT p50, p95, mean, ms", "times as long as alone", "loads a second", "a load p50, p95, ms"]
    head += ["of which the copy, GB/s"]
    which = ("p50", "p95", "mean")
    table = [
        [
            row["what"],
            _several(row["tpot_ms"], which, 1),
            _several(row["tpot_ratio"], which, 2) if "tpot_ratio" in row else "",
            *(
                (f"{row['loads_per_s']:.1f}", _several(row["load_ms"], ("p50", "p95")), f"{row['copy_gb_per_s']:.1f}")
                if "loads" in row
                else ("",) * 3
            ),
        ]
        for row in running
    ]
    (copy,) = (row for row in found["rows"] if "plain_gb_per_s" in row)
    under = (
        f"Experts are loaded one after the other without a pause. The copy of {copy['gigabytes']:g} GB into a slot, "
        f"while nothing else runs, goes at {copy['gb_per_s']:.1f} GB/s, {copy['share']:.0%} of a plain copy's "
        f"{copy['plain_gb_per_s']:.1f}."
    )
    return [pipe(head, *table), under]


def _several(values: Data, which: tuple[str, ...] = ("p50", "p95", "p99"), digits: int = 0) -> str:
    return ", ".join(f"{values[name]:.{digits}f}" for name in which)


def clients(found: Data) -> str:
    """What many streaming clients saw, in a row for each number of them."""
    head = [
        "clients",
        "nice",
        "load average",
        "minutes",
        "right answers",
        "wrong or failed",
        "tokens/s",
        "longest pause of a stream, s",
    ]
    head += ["/health p50, ms", "/health p99, ms", "an idle process wakes up late, p99, ms", "RSS middle, end, MB"]
    table = [
        [
            str(row["clients"]),
            str(row["nice"]),
            str(row["load_average"]),
            f"{row['seconds'] / 60:g}",
            str(row["right"]),
            str(len(row["wrong"]) + sum(row["failed"].values())),
            f"{row['tokens_per_second']:.0f}",
            f"{row['longest_gap_s']:.2f}",
            *(f"{row[key] * 1e3:.0f}" for key in ("health_p50_s", "health_p99_s", "wake_up_p99_s")),
            ", ".join(f"{row[when]['rss_mb']:.0f}" for when in ("middle", "after")),
        ]
        for row in found["rows"]
    ]
    meta = found["meta"]
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    under = (
        f"Each client asks the base, one of four experts or `auto` for {meta['tokens']} tokens, again and again; "
        f"{meta['slots']} slots. Clients and server share {meta['cores']} cores with other work (the load average "
        "is that at the end); `nice` below 0 takes cores from it. The process that asks `/health` does nothing else; "
        "how late it wakes up from sleeps of 50 ms says how much of the times of `/health` is the machine's. "
        f"{versions}, {meta['date']}."
    )
    return f"{pipe(head, *table)}\n\n{under}"


def on_gpu_briefly(found: Data) -> str:
    """The same in one sentence."""
    speed = {(row["engine"], row["requests"], row["experts"]): row for row in found["rows"] if "tokens_per_s" in row}
    ours, theirs = (speed[engine, 32, 8]["tokens_per_s"] for engine in ("embedded", "vllm"))
    plain = speed["transformers continuous", 32, 0]["tokens_per_s"]
    meta = found["meta"]
    return (
        f"{ours:.0f} tokens/s with 32 requests over 8 experts of the same shapes on one {meta['card']}, "
        f"{ours / theirs:.0%} of what vLLM with meswitch gives in the same run, and "
        f"{speed['embedded', 1, 1]['ms_per_step']:.1f} ms a token with one request; transformers' continuous batching "
        f"gives {plain:.0f} tokens/s with 32 requests of the base alone. Prompts of {meta['prompt']} tokens, "
        f"{meta['new_tokens']} new ones; {meta['date']}"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def on_gpu(found: Data) -> str:
    """Tokens a second and milliseconds a step, beside what the memory allows."""
    head = ["", "graphs", "requests", "experts", "tokens/s", "ms a step", "floor, ms", "first time, s", "later, s"]
    table, prompts, starts = list[list[str]](), list[str](), list[Data]()
    for row in found["rows"]:
        if "parts_ms" in row:
            continue
        graphs = {True: "yes", False: "no", None: "-"}[row.get("graphs")]
        what = [row["model"] if row["engine"] == "embedded" else row["engine"], graphs]
        asked = [str(row["requests"]), str(row["experts"]) if row["experts"] else "base"]
        if "ttft_ms" in row:
            prompts.append(
                f"- {what[0]}: the first token of a prompt of {row['prompt']} tokens comes after {row['ttft_ms']} ms, "
                f"the first time after {row['ttft_first_ms']:.0f} ms."
            )
        elif "lengths" in row:
            starts.append(row)
        else:
            numbers = (
                row["tokens_per_s"],
                row["ms_per_step"],
                row.get("floor_ms", "-"),
                row["first_s"],
                row["seconds"],
            )
            table.append([*what, *asked, *map(str, numbers)])
    if starts:
        late = sorted(starts, key=lambda row: row["first_s"] / row["seconds"])[-3:]
        told = ", ".join(
            f"{row['first_s'] / row['seconds']:.2f} ({_counted(row['requests'], 'request')} of "
            f"{_counted(row['experts'], 'expert') if row['experts'] else 'the base'})"
            for row in reversed(late)
        )
        prompts.append(
            f"- {len(starts)} kinds of work, up to {max(row['requests'] for row in starts)} requests of "
            f"{max(row['experts'] for row in starts)} experts with prompts of many lengths, were each done several "
            f"times. The first time took longer than later ones, at most by these factors: {told}."
        )
    meta = found["meta"]
    again = f", {meta['ready_again_s']:.0f} s when it is opened again" if "ready_again_s" in meta else ""
    memory = {name: count / 1e9 for name, count in meta["memory"].items() if name != "host"}
    told = ", ".join(f"{name} {gb:.2f}" for name, gb in memory.items() if gb >= 0.01)
    prompts.append(
        f"- Device memory as `Engine.memory` tells it when the engine is ready: {told} GB, in all "
        f"{sum(memory.values()):.2f} GB; torch has allocated {meta['memory_allocated'] / 1e9:.2f} GB."
    )
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    under = (
        f"{meta['model']}; prompts of {meta['prompt']} tokens, {meta['new_tokens']} new ones each. The floor is "
        f"reading the base's matrices and the experts' deltas once at the bandwidth of a copy, "
        f"{meta['copy_tb_per_s']:.1f} TB/s. From start to ready {meta['ready_s']:.0f} s with {meta['caches']}{again}. "
        f"{meta['card']}, {versions}, {meta['date']}."
    )
    under += f" {meta['note']}" if "note" in meta else ""
    return "\n\n".join([pipe(head, *table), under, "\n".join(prompts)])


def parts_of(found: Data) -> Data:
    """{step: {kind of kernel: milliseconds of the card}}"""
    parts = {}
    for row in found["rows"]:
        if "parts_ms" in row:
            asked = f"{_counted(row['requests'], 'request')}, {_counted(row['experts'], 'expert')}"
            name = f"a prompt of {row['prompt']} tokens" if "prompt" in row else f"a step of {asked}"
            parts[name] = {kind: ms for kind, ms in row["parts_ms"].items() if ms >= 0.01}
    return parts


def parts_table(found: Data) -> str:
    parts = parts_of(found)
    kinds = list(dict.fromkeys(kind for own in parts.values() for kind in own))
    rows = [
        [name, *(f"{own[kind]:.2f}" if kind in own else "-" for kind in kinds), f"{sum(own.values()):.2f}"]
        for name, own in parts.items()
    ]
    floors = {(row["requests"], row["experts"]): row["floor_ms"] for row in found["rows"] if "floor_ms" in row}
    over = [
        row["parts_ms"]["base and deltas"] / floors[row["requests"], row["experts"]]
        for row in found["rows"]
        if "parts_ms" in row and "prompt" not in row
    ]
    told = f"*Base and deltas* take {min(over):.2f} to {max(over):.2f} of the floor in steps without a prompt."
    return f"{pipe(['milliseconds of the card', *kinds, 'in all'], *rows)}\n\n{told}"


def draw_parts(data: Data, pyplot: Any) -> Any:
    kinds = list(dict.fromkeys(kind for own in data.values() for kind in own))
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(data) + 1.2), layout="constrained")
    for place, own in enumerate(data.values()):
        start = 0.0
        for number, kind in enumerate(kinds):
            axes.barh(place, own.get(kind, 0.0), left=start, color=f"C{number}", label=None if place else kind)
            start += own.get(kind, 0.0)
    axes.set_yticks(range(len(data)), list(data))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of the card")
    axes.legend(fontsize=8, frameon=False)
    return figure


def quantised(found: Data) -> str:
    """A base that is held as its codes beside the same base restored, for each kind and step; then the rest."""
    head = ["base", "requests", "experts", "codes: tokens/s", "ms a step", "floor, ms", "16 bit: tokens/s", "ms a step"]
    rows = found["rows"]
    steps: dict[tuple[str, int, int], dict[str, Data]] = {}
    for row in rows:
        if "ms_per_step" in row:
            steps.setdefault((row["kind"], row["requests"], row["experts"]), {})[row["base"]] = row
    table = [
        [
            *(kind, str(requests), str(experts or "base")),
            *(str(sides["held"][name]) for name in ("tokens_per_s", "ms_per_step", "floor_ms")),
            *(str(sides.get("restored", {}).get(name, "-")) for name in ("tokens_per_s", "ms_per_step")),
        ]
        for (kind, requests, experts), sides in steps.items()
    ]
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows if row.get("base") == "restored"):
        own = [row for row in rows if row["kind"] == kind]
        held, plain = ([row for row in own if row.get("base") == how] for how in ("held", "restored"))
        (ours,), (theirs,) = ([row for row in side if "memory" in row] for side in (held, plain))
        prompts = ", ".join(
            f"{a['prompt']} tokens {a['ttft_ms']:.0f} and {b['ttft_ms']:.0f} ms"
            for a, b in zip(held, plain, strict=True)
            if "prompt" in a
        )
        gaps = [
            f"    - {row['compared']}: {row['logprob_gap_mean']:.3f}; {sum(row['agree_until'])} of "
            f"{row['answers'] * row['tokens']} tokens"
            for row in own
            if "compared" in row
        ]
        lines.append(
            f"- {kind}: the base takes {ours['memory']['base'] / 1e9:.2f} GB and {ours['memory']['scratch'] / 1e9:.2f} "
            f"GB of scratch instead of {theirs['memory']['base'] / 1e9:.2f} GB; torch has allocated "
            f"{ours['allocated'] / 1e9:.2f} and {theirs['allocated'] / 1e9:.2f} GB. The first token of a prompt comes "
            f"after: {prompts}. Two ways to compute the same, compared: by how much the log probability of a prompt's "
            "token differs on average, and how many tokens of the answers come before the first that differs."
        )
        lines += gaps
    meta = found["meta"]
    under = f"-: not measured. {meta['model']}, {meta['layers']} layers; a copy moves {meta['copy_tb_per_s']:.1f} TB/s."
    return "\n\n".join([pipe(head, *table), f"{under} {where_measured(meta)}", "\n".join(lines)])


def main(arguments: list[str] | None = None) -> None:
    options = arguments_of(__doc__, "results/serving.md", arguments)
    found, many, load = stored("serving-cpu.json"), stored("residency-cpu.json"), stored("load-cpu.json")
    gpu, codes = stored("engine-h200.json"), stored("quantised-base-h200.json")
    many_gpu = stored("residency-h200.json")
    places = {
        "the embedded engine on a GPU": on_gpu(gpu) if gpu else LATER,
        "where a step's time goes": parts_table(gpu) if gpu else LATER,
        "a quantised base on a GPU": quantised(codes) if codes else LATER,
        "serving on a CPU": serving(found) if found else LATER,
        "many experts on a GPU": residency(many_gpu) if many_gpu else LATER,
        "many experts on a CPU": residency(many) if many else LATER,
        "many clients on a CPU": clients(load) if load else LATER,
    }
    command = "benchmarks/serving/doc.py"
    plots = {"parts": Plot(parts_of(gpu) if gpu else {}, draw_parts, "Milliseconds of the card by kind of kernel")}
    update(options.doc, command, places, plots, check=options.check, redraw=options.redraw)


if __name__ == "__main__":
    main()
