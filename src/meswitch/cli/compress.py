"""`meswitch compress`: a fine-tune becomes an artifact of its difference from the base."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from meswitch.cli import console
from meswitch.cli.compress_run import compress_family, compress_one
from meswitch.errors import ConfigError
from meswitch.units import format_bytes


def compress(
    base: Annotated[
        str | None, typer.Option(metavar="DIR|HUB_ID", help="The base checkpoint, as a directory or a hub id.")
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|HUB_ID|NAME",
            help="The full fine-tune of the base. With `--family`: the name of an expert to compress, repeatable; "
            "all experts if left out.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The directory to create. It gets its name only when everything in it is complete."
        ),
    ] = None,
    family: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A family.toml: compress its experts to where it says, with the settings of its `[compress]`. "
            "Experts that are compressed already are kept.",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4,
            help="Bits of a code, 2 by default. Each bit more costs one bit a weight and leaves less than half of the "
            "error: 1 does for small deltas, 4 is close to exact.",
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            min=0,
            help="Instead of --bits and --salient: a budget in bits a weight for the whole file of tensors. Bits and "
            "salient channels of every tensor are chosen within it, by what rounding that tensor does to the model's "
            "output on the calibration text.",
        ),
    ] = None,
    salient: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=0,
            help="Input channels of each linear layer that stay 16 bit, the ones whose rounding costs most. By default "
            "one in 512, at least one: 0.03 bits a weight.",
        ),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            metavar="G|row",
            help="Input channels that share a 16-bit scale, 128 by default. It costs 16/G bits a weight: a smaller G "
            "follows the weights better; `row` is one scale a row.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|self|none",
            help="Text like the expert's own inputs (.txt: one a line; .jsonl: `text`, `messages` or `prompt`). "
            "It chooses the salient channels and corrects rounding errors, in one forward pass of the expert. "
            "`self` lets the expert write the text, `self:FILE` lets it answer the file's questions, `FILE+self` lets "
            "it fill up a short file; all three load the full expert into memory. "
            "`none`, the default without `--family`, is data-free: faster, and worse at 1 and 2 bits.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Use at most so many tokens of it; more cost time, not bytes. Default: 524288 of a file, 32768 that "
            "the expert writes.",
        ),
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            min=0,
            help="Train codes, scales, salient weights and norms against the full expert on the calibration text for "
            "so many steps; 0 does not. It costs no bytes, closes most of the gap at 1 and 2 bits, and needs both "
            "models in memory. Default: 300 with calibration text if the expert has at most 256 MB, else 0; at 1 bit "
            "1000 pay.",
        ),
    ] = None,
    distill_scope: Annotated[
        Literal["model", "block"] | None,
        typer.Option(
            help="`model`, the default, trains end to end. `block` trains one decoder block after the other, each for "
            "--distill steps (100 by default), with one block's weights in memory: for experts of any size.",
        ),
    ] = None,
    embeddings: Annotated[
        Literal["quantised", "exact"] | None,
        typer.Option(
            help="`quantised`, the default, treats embedding and head like every other matrix; `exact` keeps them as "
            "they are, at their full size. Rows of added tokens are exact either way.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="`me-switch`, the default, or another method to compare it with: `rtn`, `bitdelta`, `svd`, "
            "`per-axis`, `delta-come`, `deltazip`, `dare`. All but `rtn` can be merged and evaluated, not served.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", min=1, help="Of `svd`. Default: what fits in the bytes of the default method."),
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(metavar="P", min=0, max=1, help="Share of weights that `dare` drops, 0.9 by default."),
    ] = None,
    salient_rule: Annotated[
        Literal["error", "magnitude", "activation", "random"],
        typer.Option(help="How salient channels are chosen; all but `error` are there to compare."),
    ] = "error",
    scales: Annotated[
        Literal["mse", "absmax", "normal"], typer.Option(help="The search that starts scales, to compare.")
    ] = "mse",
    feedback: Annotated[
        bool, typer.Option(help="Let later columns absorb the rounding errors of earlier ones (needs calibration).")
    ] = True,
    refit: Annotated[bool, typer.Option(help="Solve for scales once the codes are chosen (needs calibration).")] = True,
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where the arithmetic runs. One tensor at a time is there.")
    ] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact that exists. Other directories are never touched.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compress a full fine-tune into its difference from the base.

    The artifact holds everything that makes the expert: packed deltas, norms, added tokens, tokenizer, chat
    template. An interrupted run goes on where it stopped when the same command is given again, and leaves nothing
    that could be mistaken for a whole artifact.

    Examples:

        meswitch compress --base B --expert B-math --out deltas/math
        meswitch compress --base B --expert B-math --out deltas/math \\
            --target-bpw 2.3 --calibration math.jsonl
        meswitch compress --family family.toml
    """
    settings = {
        "--bits": bits, "--salient": salient, "--group-size": group_size, "--embeddings": embeddings, "--out": out,
        "--base": base, "--distill": distill,
        "--distill-scope": distill_scope, "--method": method, "--rank": rank, "--drop": drop,
        "--target-bpw": target_bpw,
    }  # fmt: skip
    if family is not None:
        for option, value in settings.items():
            if value is not None and option in ("--method", "--rank", "--drop"):
                raise ConfigError(f"{option}: a family is served, by the default method; compress a single --expert")
            if value is not None:
                raise ConfigError(f"{option}: {family} says this for its experts; change it there")
        if calibration not in (None, "none", "self"):
            raise ConfigError(
                f"--calibration: {family} names each expert's text; change it there, or give `self` or `none`"
            )
    else:
        if base is None or out is None or not expert:
            raise ConfigError("--base, --expert and --out are needed, or --family; see `meswitch compress --help`")
        if len(expert) > 1:
            raise ConfigError("--expert: one at a time; a family.toml (--family) compresses several")
        for option, value in (("--bits", bits), ("--salient", salient)):
            if target_bpw is not None and value is not None:
                raise ConfigError(f"{option}: --target-bpw chooses this for every tensor; give one of the two")
    options: dict[str, Any] = {
        "calibration_tokens": calibration_tokens,
        "salient_rule": salient_rule,
        "scales": scales,
        "feedback": feedback,
        "refit": refit,
        "device": console.check_device(device),
        "overwrite": overwrite,
    }
    console.quiet()
    if family is not None:
        rows = compress_family(family, expert or [], calibration, options)
        result: Any = rows
    else:
        options |= {
            "bits": 2 if bits is None else bits,
            "target_bpw": target_bpw,
            "salient": salient,
            "group_size": parse_group_size(group_size),
            "embeddings": embeddings,
            "method": method or "me-switch",
            "rank": rank,
            "drop": drop,
            "distill": distill,
            "distill_scope": distill_scope,
            "calibration": None if calibration in (None, "none") else calibration,
        }
        assert expert is not None
        result = compress_one(Path(expert[0]).name, str(base), expert[0], Path(str(out)), options)
        rows = [result]
    if as_json:
        console.print_json(result)
    else:
        console.show(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Any:
    made = console.table("", "expert", "full", "compressed", "smaller", "bits/weight", "all files", "seconds")
    for row in rows:
        made.add_row(
            row["expert"],
            format_bytes(row["full_bytes"]),
            format_bytes(row["tensor_bytes"]),
            f"{row['ratio']:.2f}x" if row["ratio"] else "-",
            f"{row['bits_per_weight']:.3f}",
            format_bytes(row["disk_bytes"]),
            "kept" if row["skipped"] else f"{row['seconds']:.1f}",
        )
    return made


def parse_group_size(text: str | None) -> int | None:
    if text == "row":
        return None
    if text is not None and not text.isdigit():
        raise ConfigError(f"--group-size: {text!r} is neither a number nor `row`")
    return 128 if text is None else int(text)
