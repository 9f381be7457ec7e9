"""Fill the table of docs/vllm.md from what `vllm.py` stored.

python benchmarks/vllm_doc.py            rewrite what is out of date
python benchmarks/vllm_doc.py --check    say so instead, and exit 1
"""

from generated import Data, arguments_of, stored, update
from markdown_tables import pipe

FILE = "vllm-h100.json"
NOT_YET = "Not measured yet: `python benchmarks/vllm.py`."


def table(rows: list[Data]) -> str:
    """Decoding is a request's tokens after the first; shares are of vLLM without LoRA or deltas."""
    head = [
        "engine",
        "requests at a time",
        "experts",
        "tokens/s",
        "of base",
        "decoding, of base",
        "TTFT, ms",
        "TPOT, ms",
    ]
    cells = []
    for row in rows:
        base = [r for r in rows if r["engine"] == "base" and r["concurrency"] == row["concurrency"]]
        whole = f"{row['output_throughput'] / base[0]['output_throughput']:.2f}" if base else "-"
        decoding = f"{base[0]['median_tpot_ms'] / row['median_tpot_ms']:.2f}" if base else "-"
        counts = [str(row["concurrency"]), str(row["experts"]), f"{row['output_throughput']:.0f}"]
        times = [f"{row[name]:.1f}" for name in ("median_ttft_ms", "median_tpot_ms")]
        cells.append([row["engine"], *counts, whole, decoding, *times])
    return pipe(head, *cells)


def measured(data: Data) -> str:
    meta, settings = data["meta"], data["meta"]["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    note = (
        f"{settings['model']}, deltas of {settings['bits']} bits, {settings['input_len']} tokens in and "
        f"{settings['output_len']} out, the prefix cache off; medians. {meta['card']}, {versions}, {meta['date']}."
    )
    return f"{table(data['rows'])}\n\n{note}"


def main(arguments: list[str] | None = None) -> None:
    options = arguments_of(__doc__, "vllm.md", arguments)
    data = stored(FILE)
    places = {"measured": NOT_YET if data is None else measured(data)}
    update(options.doc, "benchmarks/vllm_doc.py", places, {}, check=options.check, redraw=options.redraw)


if __name__ == "__main__":
    main()
