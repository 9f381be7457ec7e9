"""`meswitch plan`: what an expert will take, and what fits, before anything is downloaded or compressed.

`support` says what can be done with a base of some architecture: `meswitch diff` shows it too.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from meswitch.cli import console
from meswitch.cli.artifacts import EXACT, EXACT_MEANS, LORA, layer_table, lora_parameters
from meswitch.cli.options import flag, option_groups, takes
from meswitch.compression.options import Options, given_options
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.units import format_bytes, parse_bytes, plural

if TYPE_CHECKING:
    from meswitch.adapter import Adapter
    from meswitch.artifact import Artifact
    from meswitch.checkpoint import Checkpoint
    from meswitch.family import ExpertSection, Family


# Columns of the table of contents: what a tensor is for.
_MATRICES, _TABLES, _REST = "linear layers", "embedding, head", "norms, biases, rest"
_KV_TOKENS = 32768  # what the engine reserves by default


@dataclass(frozen=True, slots=True)
class Device:
    """What is on the device; None is as a family has it."""

    experts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Experts on the device at a time: slots beside the base.",
            show_default="1; of a family its engine.slots",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="GB", help="Memory of the device: how many experts fit? A number of GB, or a size such as 24GiB."
        ),
    ] = None
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Tokens of the KV cache beside them, as engine.kv_cache_tokens.",
            show_default=f"{_KV_TOKENS}, or the family's",
        ),
    ] = None
    backend: Annotated[
        Literal["auto", "triton", "cpu", "reference"] | None,
        typer.Option(
            help="What computes the deltas, as engine.backend: its layout of a slot. auto is that of a GPU.",
            show_default="auto, or the family's",
        ),
    ] = None


@takes("bits", "salient", "group_size", "embeddings")
@option_groups
def plan_command(
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE|HUB_ID",
            help="The base: a checkpoint, a directory or file with only its config.json, or a hub id, of which only "
            "the configuration is fetched.",
        ),
    ] = None,
    expert: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE|HUB_ID", help="The fine-tune, given likewise. Left out: one of the base's own shapes."
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of the expert, where its configuration is not at hand."),
    ] = None,
    family: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead of these: a family.toml, whose base and experts are planned with its `[compress]` and "
            "`[engine]`. An artifact that is there already is counted as it is.",
        ),
    ] = None,
    given: Mapping[str, Any] = {},
    device: Device = Device(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Predict an artifact's bytes and what fits on a device, from configurations alone.

    Nothing is compressed and no weights are read, so this works before a download. The bytes are those that
    `compress` writes and `inspect` shows, for a fine-tune that changed every row of every tensor: what equals the
    base's costs nothing, which only the weights can tell.

    Examples:

        meswitch plan --base mistralai/Mistral-7B-v0.1 --vocab-size 32002
        meswitch plan --base base/config.json --expert math/config.json \\
            --bits 1 --experts 16 --memory 80
        meswitch plan --family family.toml --memory 24GiB
    """
    limit = None if device.memory is None else _size(device.memory)
    console.quiet()
    if family is not None:
        whose = {"--base": base, "--expert": expert, "--vocab-size": vocab_size}
        beside = [*(name for name, value in whose.items() if value is not None), *map(flag, given)]
        if beside:
            raise ConfigError(f"{beside[0]}: {family} says this for its experts; change it there, or omit --family")
        found = family_report(
            family, experts=device.experts, limit=limit, kv_tokens=device.kv_tokens, backend=device.backend
        )
    elif base is None:
        raise ConfigError("--base or --family: whose shapes? give a base, or a family.toml")
    else:
        found = plan_report(
            *_pair(base, expert, vocab_size),
            given_options(given),
            experts=device.experts or 1,
            limit=limit,
            kv_tokens=_KV_TOKENS if device.kv_tokens is None else device.kv_tokens,
            backend=device.backend or "auto",
        )
    if as_json:
        console.print_json(found)
    elif family is not None:
        _show_family(found)
    else:
        _show(found)


def _pair(base: str, expert: str | None, vocab_size: int | None) -> "tuple[Checkpoint, Checkpoint | Adapter]":
    """The base, and the expert over it or one of the base's own shapes."""
    from meswitch.adapter import Adapter, is_adapter
    from meswitch.compression.plan import outline

    source = outline(base)
    if expert is not None and is_adapter(expert):
        if vocab_size is not None:
            raise ConfigError(f"--vocab-size: {expert} is a PEFT adapter, whose tensors say it; leave it out")
        return source, Adapter.open(expert)
    if expert is not None or vocab_size is not None or source.is_quantised:
        return source, outline(expert or base, vocab_size=vocab_size, unquantised=expert is None)
    return source, source


def plan_report(
    base: "Checkpoint",
    expert: "Checkpoint | Adapter",
    options: Options,
    *,
    experts: int = 1,
    limit: int | None = None,
    kv_tokens: int = _KV_TOKENS,
    backend: str = "auto",
) -> dict[str, Any]:
    """Everything that `plan` shows. limit: bytes of the device. `bytes` is as in `inspect`, with `by_role` beside."""
    from meswitch.artifact import account
    from meswitch.compression.plan import predict
    from meswitch.slots.layout import Layout

    kernel = _has_kernels(base, backend)
    planned = predict(base, expert, options)
    manifest = planned.manifest
    full = manifest.expert.bytes
    slot = Layout.of(planned, kernel=kernel).nbytes
    return {
        "expert": dataclasses.asdict(manifest.expert),
        "base": {"name": manifest.base.name, "bytes": base.nbytes, "vocab_size": manifest.base.vocab_size},
        "method": dataclasses.asdict(manifest.method),
        "architecture": support(base.config),
        "bytes": {
            **account(planned).to_dict(),
            "by_role": _by_role(planned),
            "tensors": planned.nbytes,
        },
        "bits_per_weight": planned.bits_per_weight,
        "ratio": full / planned.nbytes,
        "memory": _memory(base, slot, full, experts, limit, kv_tokens, kernel),
    }  # fmt: skip


def family_report(
    file: Path,
    *,
    experts: int | None = None,
    limit: int | None = None,
    kv_tokens: int | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Everything that `plan --family` shows. What is None is as `[engine]` of the family has it.

    An artifact of another base is counted with a note: vLLM serves some.

    Raises:
        ConfigError: a family without experts, or an expert that is neither made nor has a `source`.
        MeswitchError: an artifact is damaged, or an expert does not fit the base.
    """
    from meswitch.artifact import fingerprint
    from meswitch.compression.plan import Outline, outline
    from meswitch.family import Family
    from meswitch.slots.layout import Layout

    family = Family.load(file)
    if not family.expert:
        raise ConfigError(f"{file}: expert: there is none; a family of a base alone needs no plan")
    options = family.engine
    base = outline(family.base_source())
    kernel = _has_kernels(base, backend or options.backend)
    # of a configuration alone nobody can tell whether it is an artifact's base
    content = None if isinstance(base, Outline) else fingerprint(base)
    rows: list[dict[str, Any]] = []
    for section in family.expert:
        artifact, made = _of_family(file, family, section, base)
        if made and content is not None and artifact.manifest.method.name != LORA:
            try:
                artifact.check_base(base, known=content)
            except IncompatibleError as error:
                console.note(f"{section.name}: {error}")
        expert = artifact.manifest.expert
        rows.append(
            {
                "name": section.name,
                "made": made,
                "expert": dataclasses.asdict(expert),
                "method": dataclasses.asdict(artifact.manifest.method),
                "bytes": {"tensors": artifact.nbytes},
                "bits_per_weight": artifact.bits_per_weight,
                "ratio": expert.bytes / artifact.nbytes,
                "slot": Layout.of(artifact, kernel=kernel).nbytes,
            }
        )
    grows = family.server.experts_dir is not None
    slots = experts or (options.slots if grows else min(options.slots, len(rows)))
    return {
        "base": {"name": family.base.name, "bytes": base.nbytes},
        "architecture": support(base.config),
        "experts": rows,
        "bytes": {"tensors": sum(row["bytes"]["tensors"] for row in rows)},
        "host": {"experts": sum(row["slot"] for row in rows), "budget": options.host_bytes},
        "memory": _memory(
            base,
            max(row["slot"] for row in rows),
            max(row["expert"]["bytes"] for row in rows),
            slots,
            limit,
            options.kv_cache_tokens if kv_tokens is None else kv_tokens,
            kernel,
        ),
    }


def _of_family(file: Path, family: "Family", section: "ExpertSection", base: "Checkpoint") -> "tuple[Artifact, bool]":
    """An expert's artifact as it is or as it will be, and whether it is there already."""
    from meswitch.adapter import Adapter, is_adapter
    from meswitch.artifact import Artifact
    from meswitch.artifact.manifest import MANIFEST_NAME
    from meswitch.compression.plan import outline, predict

    if section.source is None or not section.delta.startswith("hf://"):  # else nothing is fetched for a plan
        directory = family.resolve(section.delta)
        if is_adapter(directory):
            return predict(base, Adapter.open(directory)), True
        if (directory / MANIFEST_NAME).is_file():
            return Artifact.open(directory), True
        if section.source is None:
            raise ConfigError(
                f"{file}: expert {section.name!r}: source: is needed to plan it, for {directory} is no artifact yet"
            )
    source = family.source_of(section)
    if is_adapter(source):
        return predict(base, Adapter.open(source)), False
    sizes = {name: value for name, value in family.compress.given().items() if not name.startswith("distill")}
    return predict(base, outline(source), given_options(sizes)), False


def _has_kernels(base: "Checkpoint", backend: str) -> bool:
    """Whether the kernels of a GPU compute: they have a layout of a slot of their own, and read a base's codes."""
    import torch

    from meswitch.compression.plan import widest_dtype
    from meswitch.ops import uses_kernels

    return uses_kernels(None if backend == "auto" else backend, torch.device("cuda"), widest_dtype(base))


def _by_role(planned: "Artifact") -> dict[str, dict[str, int]]:
    """What a tensor is for -> kind of content -> bytes: `account` of the tensors of one role at a time."""
    from meswitch.artifact import account

    tensors = planned.manifest.tensors
    found = {}
    for role in sorted({entry.role for entry in tensors.values()}):
        own = {name: entry for name, entry in tensors.items() if entry.role == role}
        part = dataclasses.replace(planned, manifest=dataclasses.replace(planned.manifest, tensors=own))
        found[role] = account(part).by_content
    return found


def _memory(
    base: "Checkpoint", slot: int, full: int, experts: int, limit: int | None, kv_tokens: int, kernel: bool
) -> dict[str, int | None]:
    """For JSON: the device's bytes. slot: of the largest expert. full: of the largest full fine-tune."""
    from meswitch.compression.plan import Memory, base_bytes, kv_bytes

    held, scratch = base_bytes(base) if kernel else (base.nbytes, 0)
    kv = kv_bytes(base, kv_tokens) if kv_tokens else 0
    memory = Memory(held, slot, full, kv, experts, limit, scratch)
    return {
        "experts": memory.experts,
        "base": memory.base,
        "scratch": memory.scratch,
        "slot": memory.slot,
        "kv_tokens": kv_tokens,
        "kv_cache": memory.kv,
        "compressed": memory.compressed,
        "full_models": memory.full_models,
        "limit": memory.limit,
        "experts_that_fit": memory.experts_that_fit,
        "full_models_that_fit": memory.full_models_that_fit,
    }


def _show(found: dict[str, Any]) -> None:
    expert, method = found["expert"], found["method"]
    salient = (
        "one salient channel in 512" if method["salient"] is None else plural(method["salient"], "salient channel")
    )
    group = "a row" if method["group_size"] is None else f"{method['group_size']} weights"
    how = f"{plural(method['bits'], 'bit')}, a scale for {group}, {salient}, embeddings {method['embeddings']}"
    bound = "For a fine-tune that changed every row of every tensor; what equals the base's costs nothing."
    if method["name"] == LORA:
        how, bound = f"a PEFT adapter, {lora_parameters(method)}", "What equals the base's costs nothing."
    if method["name"] == EXACT:
        how = EXACT_MEANS
        bound = (
            "An upper bound: only the weights can tell how far they moved. A full fine-tune of a 16-bit model takes "
            "about a third of it, one that changed a tenth of the weights a fifteenth. What equals the base's costs "
            "nothing."
        )
    own = expert["name"] == found["base"]["name"]
    console.show(
        console.pairs(
            f"an expert of {expert['name']}'s shapes" if own else f"{expert['name']} over {found['base']['name']}",
            {
                "method": how,
                "full checkpoint": f"{format_bytes(expert['bytes'])}, {expert['parameters']:,} parameters in "
                f"{expert['dtype']}, vocabulary {expert['vocab_size']}",
                "compressed": f"{format_bytes(found['bytes']['tensors'])} of tensors, {found['ratio']:.2f}x smaller, "
                f"{found['bits_per_weight']:.3f} bits a weight",
            }
            | statements(found["architecture"]),
        ),
        _content_table(found),
        layer_table(found["bytes"]),
        _memory_table(found["memory"]),
        bound,
    )


def _content_table(found: dict[str, Any]) -> Any:
    parameters, bytes_ = found["expert"]["parameters"], found["bytes"]
    columns = (_MATRICES, _TABLES, _REST)
    made = console.table("bytes by content", "", *columns, "all", "bits/weight")
    sums = {name: dict.fromkeys(columns, 0) for name in bytes_["by_content"]}
    for role, contents in bytes_["by_role"].items():
        for name, count in contents.items():
            sums[name][_group(role)] += count

    def add(name: str, row: dict[str, int], style: str | None = None) -> None:
        total = sum(row.values())
        cells = (f"{row[column]:,}" if row[column] else "-" for column in columns)
        made.add_row(name, *cells, f"{total:,}", f"{total * 8 / parameters:.4f}", style=style)

    for name, row in sorted(sums.items(), key=lambda item: -sum(item[1].values())):
        add(name, row)
    add("all", {column: sum(row[column] for row in sums.values()) for column in columns}, "bold")
    return made


def _group(role: str) -> str:
    """The column of a tensor of this role."""
    from meswitch.architecture import EMBEDDING, HEAD, LINEAR, STACKS, TRANSPOSED

    if role in (EMBEDDING, HEAD):
        return _TABLES
    return _MATRICES if role in (LINEAR, TRANSPOSED, *STACKS) else _REST


def _show_family(found: dict[str, Any]) -> None:
    table = console.table("", "expert", "", "full", "compressed", "smaller", "bits/weight", "in a slot")
    for row in found["experts"]:
        table.add_row(
            row["name"],
            "made" if row["made"] else "planned",
            format_bytes(row["expert"]["bytes"]),
            format_bytes(row["bytes"]["tensors"]),
            f"{row['ratio']:.2f}x",
            f"{row['bits_per_weight']:.3f}",
            format_bytes(row["slot"]),
        )
    host, budget = found["host"]["experts"], found["host"]["budget"]
    console.show(
        console.pairs(
            f"{plural(len(found['experts']), 'expert')} over {found['base']['name']}",
            {
                "on disk": f"{format_bytes(found['bytes']['tensors'])} of tensors",
                "host memory": f"{format_bytes(host)} for all of them"
                + ("" if budget is None else f"; engine.host_bytes keeps {format_bytes(budget)} at most"),
            }
            | statements(found["architecture"]),
        ),
        table,
        _memory_table(found["memory"]),
    )
    if not all(row["made"] for row in found["experts"]):
        console.note(
            "planned: for a fine-tune that changed every row of every tensor; what equals the base's costs nothing"
        )


def _memory_table(memory: dict[str, Any]) -> Any:
    rows = {
        "base": format_bytes(memory["base"])
        + (f", and {format_bytes(memory['scratch'])} to restore its layers" if memory["scratch"] else ""),
        "a slot": format_bytes(memory["slot"]),
        "KV cache": f"{format_bytes(memory['kv_cache'])} for {memory['kv_tokens']} tokens",
        f"base + {plural(memory['experts'], 'expert')}": f"{format_bytes(memory['compressed'])}; as full models "
        f"{format_bytes(memory['full_models'])}, {memory['full_models'] / memory['compressed']:.2f}x",
    }
    if memory["limit"] is not None:
        room = memory["limit"] >= memory["base"] + memory["scratch"] + memory["kv_cache"]
        ours = f"the base and {plural(memory['experts_that_fit'], 'expert')}"
        rows[f"in {format_bytes(memory['limit'])} fit"] = (
            f"{ours if room else 'not even the base and its KV cache'}; "
            f"or {plural(memory['full_models_that_fit'], 'full model')}"
        )
    return console.pairs("device memory, without activations and CUDA graphs", rows)


def _size(text: str) -> int:
    try:
        return parse_bytes(f"{text}GB" if text.replace(".", "", 1).isdigit() else text)
    except ConfigError as error:
        raise ConfigError(f"--memory: {error}") from None


def support(config: Any) -> dict[str, Any]:
    """For JSON: the model type, the class that is served, what was tried with it, and why vLLM does not serve it.

    `tried` is None for a model type that nobody tried: whether it can be calibrated is found out when compression
    starts, and what serves it is proven when an engine opens. See `meswitch.architecture.Tried` for its fields.
    """
    from meswitch.architecture import architecture_of, model_class, tried
    from meswitch.vllm.support import vllm_support

    known = tried(config.model_type)
    return {
        "model_type": config.model_type,
        "class": model_class(config, text_only=True).__name__,
        "tried": known and dataclasses.asdict(known),
        "vllm": vllm_support(architecture_of(config)),  # reasons why not, none if it is served
    }


def statements(found: dict[str, Any]) -> dict[str, str]:
    """What `support` found, as lines to read; all reasons for each no."""
    import transformers

    known, name = found["tried"], found["class"]
    in_vllm = "\n".join(f"no: {reason}" for reason in found["vllm"]) or "yes"
    if known is None:
        return {
            "compresses": f"{name}: not tried with this model type; what cannot be compressed or calibrated is refused "
            "before any work",
            "served here": "not tried with this model type; proven when an engine opens, which names what it refuses",
            "served in vLLM": in_vllm,
        }
    ways = {
        "batch": "all experts in one running batch",
        "turns": f"experts by turns, slower: {known['reason']}",
        None: f"no: {known['reason']}",
    }
    version = known["transformers"]
    other = "" if version == transformers.__version__ else f" (with transformers {version})"
    return {
        "compresses": f"{name}: " + ("yes" if known["compressed"] else f"no: {known['reason']}"),
        "calibrates": "yes" if known["calibrated"] else f"no: {known['uncalibrated']}",
        "served here": ways[known["runner"]] + other,
        "served in vLLM": in_vllm,
    }
