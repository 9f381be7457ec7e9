"""`meswitch serve`: the OpenAI-compatible server of a family."""

import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from meswitch.cli import console
from meswitch.cli.options import option_groups
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from meswitch.engine import Engine
    from meswitch.family import Family
    from meswitch.server.process import Listening


@dataclass(frozen=True, slots=True)
class Address:
    """Where and how the server listens, in place of what the family says."""

    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Address to listen on, instead of the family's.")
    ] = None
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port, instead of the family's; 0 picks a free one.")
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="A site whose pages may ask from a browser, such as https://chat.example, instead of the family's; "
            "repeatable, `*` for all.",
        ),
    ] = None
    root_path: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where a proxy serves it, such as /llm, instead of the family's.")
    ] = None
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of the certificate, instead of the family's.")
    ] = None
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of its key, instead of the family's.")
    ] = None


@dataclass(frozen=True, slots=True)
class Log:
    """What is logged."""

    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="warning, or info for a line per request.")] = (
        "warning"
    )
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Of the log on stderr; json has one object a line.")
    ] = "text"


@option_groups
def serve_command(
    family: Annotated[Path, typer.Argument(metavar="FILE", help="A family.toml, or the directory that holds one.")],
    address: Address = Address(),
    slots: Annotated[
        int | None, typer.Option(min=1, help="Experts on the device at a time, instead of the family's.")
    ] = None,
    engine_name: Annotated[
        Literal["embedded", "vllm"],
        typer.Option("--engine", help="embedded, or vllm: run `vllm serve` with the deltas (docs/use/vllm.md)."),
    ] = "embedded",
    print_command: Annotated[
        bool, typer.Option("--print-command", help="With --engine vllm: print its command line and end.")
    ] = False,
    log: Log = Log(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON.")] = False,
) -> None:
    """Serve the base and all experts of a family over HTTP, in OpenAI's protocol.

    `model` of a request is an expert's name, the base's, or `auto` for the router's choice. If the environment has
    MESWITCH_API_KEY, clients must send it. Ctrl-C lets running answers finish, a second one ends them. SIGHUP reads
    the family again.

    Example:

        meswitch serve family.toml --port 8000
    """
    console.quiet()
    if log.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"--log-level {log.log_level}: use debug, info, warning or error")
    from meswitch.family import ORIGIN, Family

    config = Family.load(family)
    wrong = next((origin for origin in address.allow_origin or () if not re.match(ORIGIN, origin)), None)
    if wrong is not None:
        raise ConfigError(f"--allow-origin: {wrong!r} is no origin; give one such as https://chat.example, or `*`")
    files = {
        name: None if file is None else str(file.absolute())
        for name, file in (("tls_cert", address.tls_cert), ("tls_key", address.tls_key))
    }
    config = _with_server(config, {"allow_origins": address.allow_origin, "root_path": address.root_path, **files})
    if slots is not None:
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"slots": slots})})
    where = address.host or config.server.host, config.server.port if address.port is None else address.port
    if engine_name == "vllm":
        _vllm(config, *where, print_command)
        return
    # bound before anything is loaded: a taken port should not cost a minute
    listener = _bind(*where)

    listening = _listening(config)

    from meswitch.launch import (
        app_from_family,
        engine_from_family,
        experts_from_family,
        keys_from_family,
        policy_from_family,
    )
    from meswitch.server.keys import Keys
    from meswitch.server.logs import set_up_logging
    from meswitch.server.process import Server

    set_up_logging(log.log_level, log.log_format)
    keys = Keys(keys_from_family(config))
    with engine_from_family(config) as engine:
        auto, problem = policy_from_family(config, engine)
        experts = experts_from_family(config, engine, auto)

        def reload() -> None:
            keys.replace(keys_from_family(Family.load(family)))
            experts.reread()

        app = app_from_family(config, engine, auto, keys, experts)
        server = Server(app, engine, listening, reload=reload)
        listener.listen(server.config.backlog)  # from here on clients may connect, so only now is the address printed
        _show(_summary(config, engine, listener, problem, listening, bool(keys)), as_json)
        server.run(sockets=[listener])


def _with_server(config: "Family", overrides: dict[str, Any]) -> "Family":
    """The family with what the command line says about its server.

    Raises:
        ConfigError: a value that `[server]` does not take.
    """
    from pydantic import ValidationError

    given = {name: value for name, value in overrides.items() if value not in (None, [])}
    try:
        section = type(config.server).model_validate(config.server.model_dump() | given)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        flag = {"allow_origins": "--allow-origin"}.get(field, f"--{field.replace('_', '-')}")
        raise ConfigError(f"{flag}: {given[field]!r}: {error.errors()[0]['msg']}; see docs/use/family.md") from None
    return config.model_copy(update={"server": section})


def _listening(config: "Family") -> "Listening":
    """How the server listens.

    Raises:
        ConfigError: TLS files that are not there, or one without the other.
    """
    from meswitch.server.process import Listening

    section = config.server
    named = {"tls_cert": section.tls_cert, "tls_key": section.tls_key}
    files = {name: config.resolve(file) for name, file in named.items() if file}
    for name, file in files.items():
        if not file.is_file():
            raise ConfigError(f"server.{name}: {file}: no such file; give a PEM file")
    if len(files) == 1:
        raise ConfigError("server.tls_cert, server.tls_key: give both, or neither")
    return Listening(section.connections, section.grace_seconds, files.get("tls_cert"), files.get("tls_key"))


def _vllm(config: "Family", host: str, port: int, print_only: bool) -> None:
    """Become `vllm serve`, or print its command line."""
    import importlib.util
    import shlex

    from meswitch.vllm.command import argv, command, environment

    if config.server.keys is not None:
        raise ConfigError("server.keys: vLLM's server has one key, MESWITCH_API_KEY; leave the field out")
    arguments = command(config, host, port, config.engine.slots)
    if print_only:
        typer.echo(shlex.join(["vllm", *arguments]))
        return
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("--engine vllm: vLLM is not installed; install meswitch[vllm] (a CPU: docs/use/vllm.md)")
    run = argv(arguments)
    os.execve(run[0], run, environment(config))


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: not an address of this machine ({error})") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; choose another, or port 0") from None
    return listener


def _summary(
    family: "Family",
    engine: "Engine",
    listener: socket.socket,
    problem: str | None,
    listening: "Listening",
    asks_key: bool,
) -> dict[str, Any]:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    sizes = {row.expert: row.bytes for row in engine.store.residency()}
    return {
        "url": f"{'https' if listening.tls_cert else 'http'}://{shown}:{port}{family.server.root_path}/v1",
        "host": host,
        "port": port,
        "base": {"name": engine.base_name, "path": family.resolve_model(family.base.path)},
        "experts": [{"name": e.name, "bytes": sizes[e.name], "description": e.description} for e in family.expert],
        "runner": "turns" if engine.takes_turns else "batch",
        "by_turns": list(engine.by_turns),
        "faster_engine": _faster(engine.model.device.type),
        "proof_seconds": round(engine.proof_seconds, 2),
        "slots": engine.store.slot_count,
        "memory": engine.memory(),
        "merged_budget": engine.merged_budget,
        "auto": problem is None,
        "auto_problem": problem,
        "api_key": asks_key,
    }


def _faster(device_type: str) -> str | None:
    """What serves many users faster here, if it is installed."""
    import importlib.util

    if device_type != "cuda" or importlib.util.find_spec("vllm") is None:
        return None
    return "vLLM is installed: --engine vllm answers many users at a time several times faster on a GPU"


def _show(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary), flush=True)
        return
    from meswitch.units import format_bytes

    memory = summary["memory"]
    base = format_bytes(memory["base"])
    table = console.table(f"meswitch serves {summary['url']}", "model", "bytes", "what it is")
    table.columns[2].justify = "left"
    table.add_row(summary["base"]["name"], base, summary["base"]["path"])
    for expert in summary["experts"]:
        table.add_row(expert["name"], format_bytes(expert["bytes"]), expert["description"])
    table.add_row("auto", "", "the router's choice" if summary["auto"] else f"off: {summary['auto_problem']}")
    slots = "1 slot" if summary["slots"] == 1 else f"{summary['slots']} slots"
    sizes = f"{slots} {format_bytes(memory['slots'])}, KV cache {format_bytes(memory['kv_cache'])}"
    if summary["merged_budget"]:
        sizes += f", merged weights at most {format_bytes(summary['merged_budget'])}"
    page = f"{summary['url'].removesuffix('/v1')}/"
    console.show(
        table, f"Memory: base {base}, {sizes}\nTry it in a browser: {page}; in another terminal: meswitch top {page}"
    )
    if summary["runner"] == "turns":
        console.note(
            "experts take turns, which is slower than one batch for all"
            + "".join(f"\n  {reason}" for reason in summary["by_turns"])
        )
    if summary["faster_engine"]:
        console.note(f"{summary['faster_engine']} (docs/use/serve.md, which engine when)")
    if not summary["api_key"] and summary["host"] not in ("127.0.0.1", "::1"):
        console.note("open to the network without a key; set MESWITCH_API_KEY to ask for one")
