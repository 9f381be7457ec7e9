"""`meswitch plan`: what an expert will take, and what fits, before anything is downloaded or compressed.

`support` says what can be done with a base of some architecture: `meswitch diff` shows it too.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from meswitch.cli import console
from meswitch.cli.artifacts import EXACT, EXACT_MEANS, LORA, layer_table, lora_parameters
from meswitch.cli.options import takes
from meswitch.compression.options import Options, given_options
from meswitch.errors import ConfigError
from meswitch.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from meswitch.adapter import Adapter
    from meswitch.artifact import Artifact
    from meswitch.checkpoint import Checkpoint
    from meswitch.compression.plan import Memory


# Columns of the table of contents: what a tensor is for.
_MATRICES, _TABLES, _REST = "linear layers", "embedding, head", "norms, biases, rest"
_KV_TOKENS = 32768  # what the engine reserves by default


@takes("bits", "salient", "group_size", "embeddings")
def plan_command(
    base: Annotated[
        str,
        typer.Option(
            metavar="DIR|FILE|HUB_ID",
            help="The base: a checkpoint, a directory or file with only its config.json, or a hub id, of which only "
            "the configuration is fetched.",
        ),
    ],
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
    given: Mapping[str, Any] = {},
    experts: Annotated[
        int, typer.Option(metavar="N", min=1, help="Experts on the device at a time: slots beside the base.")
    ] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="GB", help="Memory of the device: how many experts fit? A number of GB, or a size such as 24GiB."
        ),
    ] = None,
    kv_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Tokens of the KV cache beside them, as engine.kv_cache_tokens."),
    ] = _KV_TOKENS,
    backend: Annotated[
        Literal["auto", "triton", "cpu", "reference"],
        typer.Option(help="What computes the deltas, as engine.backend: its layout of a slot. auto is that of a GPU."),
    ] = "auto",
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
    """
    limit = None if memory is None else _size(memory)
    console.quiet()
    from meswitch.adapter import Adapter, is_adapter
    from meswitch.compression.plan import outline

    options = given_options(given)
    source = outline(base)
    target: Checkpoint | Adapter = source
    if expert is not None and is_adapter(expert):
        if vocab_size is not None:
            raise ConfigError(f"--vocab-size: {expert} is a PEFT adapter, whose tensors say it; leave it out")
        target = Adapter.open(expert)
    elif expert is not None or vocab_size is not None or source.is_quantised:
        target = outline(expert or base, vocab_size=vocab_size, unquantised=expert is None)
    found = plan_report(source, target, options, experts=experts, limit=limit, kv_tokens=kv_tokens, backend=backend)
    if as_json:
        console.print_json(found)
    else:
        _show(found)


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
    import torch

    from meswitch.artifact import account
    from meswitch.compression.plan import Memory, base_bytes, kv_bytes, predict, widest_dtype
    from meswitch.ops import uses_kernels
    from meswitch.slots.layout import Layout

    kernel = uses_kernels(None if backend == "auto" else backend, torch.device("cuda"), widest_dtype(base))
    planned = predict(base, expert, options)
    manifest = planned.manifest
    slot = Layout.of(planned, kernel=kernel).nbytes
    kv = kv_bytes(base, kv_tokens) if kv_tokens else 0
    full = manifest.expert.bytes
    held, scratch = base_bytes(base) if kernel else (base.nbytes, 0)
    memory = Memory(held, slot, full, kv, experts, limit, scratch)
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
        "memory": _memory(memory, kv_tokens),
    }  # fmt: skip


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


def _memory(memory: "Memory", kv_tokens: int) -> dict[str, int | None]:
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
    salient = "one salient channel in 512" if method["salient"] is None else f"{method['salient']} salient channels"
    group = "a row" if method["group_size"] is None else f"{method['group_size']} weights"
    how = f"{method['bits']} bits, a scale for {group}, {salient}, embeddings {method['embeddings']}"
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


def _memory_table(memory: dict[str, Any]) -> Any:
    rows = {
        "base": format_bytes(memory["base"])
        + (f", and {format_bytes(memory['scratch'])} to restore its layers" if memory["scratch"] else ""),
        "a slot": format_bytes(memory["slot"]),
        "KV cache": f"{format_bytes(memory['kv_cache'])} for {memory['kv_tokens']} tokens",
        f"base + {_count(memory['experts'], 'expert')}": f"{format_bytes(memory['compressed'])}; as full models "
        f"{format_bytes(memory['full_models'])}, {memory['full_models'] / memory['compressed']:.2f}x",
    }
    if memory["limit"] is not None:
        room = memory["limit"] >= memory["base"] + memory["scratch"] + memory["kv_cache"]
        ours = f"the base and {_count(memory['experts_that_fit'], 'expert')}"
        rows[f"in {format_bytes(memory['limit'])} fit"] = (
            f"{ours if room else 'not even the base and its KV cache'}; "
            f"or {_count(memory['full_models_that_fit'], 'full model')}"
        )
    return console.pairs("device memory, without activations", rows)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
