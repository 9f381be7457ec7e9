"""`meswitch extract-lora`: the nearest LoRA adapter to a full fine-tune."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli import console
from meswitch.units import format_bytes

if TYPE_CHECKING:
    from meswitch.compression.extraction import Energy, Extraction

_NAMED = 3


def extract_lora_command(
    base: Annotated[str, typer.Option(metavar="DIR|HUB_ID", help="The base checkpoint.")],
    expert: Annotated[str, typer.Option(metavar="DIR|HUB_ID", help="A full fine-tune of it.")],
    rank: Annotated[
        int,
        typer.Option(
            metavar="R",
            min=1,
            help="Of every pair: R (rows + columns) weights for each matrix. Servers take 8 to 64 gladly, more at a "
            "price in speed; a full fine-tune's delta seldom fits, and `kept` says how much does.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The adapter's directory to create.")],
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text like the expert's own inputs, as for `compress`. Pairs are then those that change the layers' "
            "outputs on it most nearly as the delta does: the same bytes keep more of what the model says. It costs a "
            "forward pass of the expert, one block in memory at a time.",
        ),
    ] = None,
    modules_to_save: Annotated[
        bool,
        typer.Option(
            "--modules-to-save",
            help="Keep embeddings, norms and routers that changed whole, and added tokens with them, as PEFT's "
            "`modules_to_save`. PEFT and meswitch read that; vLLM refuses such an adapter.",
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where singular vectors are computed, one matrix at a time.")
    ] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that exists. Other directories are never touched.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every tensor included.")] = False,
) -> None:
    """Extract the nearest LoRA adapter from a full fine-tune, for servers that have nothing else.

    Each linear layer's delta is replaced by the pair of rank R that is nearest to it: its largest singular values and
    their vectors. `kept` is the share of the delta's energy (the sum of its squares) that the pair has, `of outputs`
    the share of what it adds to the layers' outputs on --calibration text; the rest of the fine-tuning is lost. A full
    fine-tune spreads over many singular values, so compare what this keeps with what `meswitch compress` does at the
    same bytes. A LoRA has no place for norms, biases and embeddings: what of them changed is kept whole with
    --modules-to-save, or named as left out.

    Example:

        meswitch extract-lora --base B --expert B-math --rank 64 --calibration math.jsonl --out adapters/math
    """
    device = console.check_device(device)
    console.quiet()
    from meswitch.compression.extraction import LoraOptions
    from meswitch.compression.extraction import extract_lora as run

    options = LoraOptions(rank, calibration, modules_to_save)
    started = time.perf_counter()
    with console.progress("extract-lora") as progress:
        found = run(
            base,
            expert,
            out,
            options,
            device=device,
            overwrite=overwrite,
            progress=progress,
            notice=console.note,
        )
    seconds = time.perf_counter() - started
    if as_json:
        console.print_json(extraction_json(found) | {"seconds": seconds})
    else:
        _show(found, seconds)


def extraction_json(found: "Extraction") -> dict[str, Any]:
    """The whole result, with sums and shares worked out."""
    from meswitch.compression.extraction import LEFT_OUT, PAIR, WHOLE

    def plain(energy: "Energy") -> dict[str, Any]:
        return dataclasses.asdict(energy) | {"share": energy.share, "output_share": energy.output_share}

    return {
        "adapter": str(found.directory),
        "rank": found.rank,
        "bytes": found.nbytes,
        "full_bytes": found.full_bytes,
        "linear_layers": plain(found.of(PAIR)),
        "all": plain(found.of(PAIR, WHOLE, LEFT_OUT)),
        "by_type": [{"how": how, "layer": layer} | plain(energy) for (how, layer), energy in found.by_type().items()],
        "added_rows": found.added_rows,
        "added_rows_kept": found.added_kept,
        "tensors": [dataclasses.asdict(item) for item in found.tensors],
    }


def _show(found: "Extraction", seconds: float) -> None:
    from meswitch.compression.extraction import LEFT_OUT, PAIR, WHOLE

    whole = found.of(PAIR, WHOLE, LEFT_OUT)
    outputs = ["of outputs"] if whole.output_share is not None else []
    columns = ("layer type", "", "tensors", "weights", "of all change", "kept", *outputs)
    made = console.table(f"{found.directory}: rank {found.rank}", *columns)

    def add(name: str, how: str, energy: "Energy", style: str | None = None) -> None:
        of_all = f"{energy.energy / whole.energy:.1%}" if whole.energy else "-"
        kept = [f"{energy.share:.1%}"]
        if outputs:
            kept.append(f"{energy.output_share:.1%}" if how == PAIR and energy.output_share is not None else "-")
        made.add_row(name, how, str(energy.tensors), f"{energy.weights:,}", of_all, *kept, style=style)

    order = [PAIR, WHOLE, LEFT_OUT]
    for (how, layer), energy in sorted(found.by_type().items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        add(layer, how, energy)
    add("all linear layers", PAIR, found.of(PAIR), "bold")
    add("all", "", whole, "bold")
    lines = [
        f"{format_bytes(found.nbytes)} of {format_bytes(found.full_bytes)}, "
        f"{found.full_bytes / found.nbytes:.2f}x smaller, in {seconds:.1f} s"
    ]
    left = [item.name for item in found.tensors if item.how == LEFT_OUT]
    if left:
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        lines.append(f"left out, as a LoRA has no place for them: {', '.join(left[:_NAMED])}{more}")
    if found.added_rows and not found.added_kept:
        lines.append(
            f"left out: {found.added_rows} tokens that the base lacks, and with them the tokenizer; --modules-to-save "
            "keeps them"
        )
    console.show(made, *lines)
