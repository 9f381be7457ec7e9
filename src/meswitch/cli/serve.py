"""`meswitch serve` and what goes with a server: `deploy` on several machines, `key` for users, `top` to watch."""

import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from meswitch.cli import console
from meswitch.cli.options import option_groups
from meswitch.errors import ConfigError
from meswitch.units import format_bytes, plural

if TYPE_CHECKING:
    from rich.console import Group

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
        "base": {"name": engine.base_name, "path": family.base_source()},
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

    memory = summary["memory"]
    base = format_bytes(memory["base"])
    table = console.table(f"meswitch serves {summary['url']}", "model", "bytes", "what it is")
    table.columns[2].justify = "left"
    table.add_row(summary["base"]["name"], base, summary["base"]["path"])
    for expert in summary["experts"]:
        table.add_row(expert["name"], format_bytes(expert["bytes"]), expert["description"])
    table.add_row("auto", "", "the router's choice" if summary["auto"] else f"off: {summary['auto_problem']}")
    slots = plural(summary["slots"], "slot")
    sizes = f"{slots} {format_bytes(memory['slots'])}, KV cache {format_bytes(memory['kv_cache'])}"
    for name, purpose in (("CUDA graphs", "graphs"), ("scratch", "scratch")):
        sizes += f", {name} {format_bytes(memory[purpose])}" if memory[purpose] else ""
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


deploy_app = typer.Typer(no_args_is_help=True, help="Serve a family from several replicas behind one endpoint.")


@deploy_app.callback()
def _deploy() -> None:
    """Serve a family from several replicas behind one endpoint."""


@deploy_app.command()
def ray(
    family: Annotated[Path, typer.Argument(metavar="FILE", help="A family.toml that every node can read.")],
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the base, each with its own experts resident.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that Ray reserves for a replica.")] = 0,
    cpus: Annotated[float, typer.Option(min=0, help="CPU cores that Ray reserves for a replica.")] = 1,
    ongoing: Annotated[
        int, typer.Option(min=1, help="Requests that a replica takes at a time; more go to others.")
    ] = 64,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8000,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A running Ray cluster, `auto` for this machine's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON.")] = False,
) -> None:
    """Serve a family from several replicas on Ray Serve; needs `pip install 'meswitch[ray]'`.

    A request goes to a replica that has its expert on the device, if that one has room; a request whose replica is
    lost before it answered goes to another. Ctrl-C ends the application and, unless `--address` is given, Ray with it.

    Example:

        meswitch deploy ray family.toml --replicas 2 --gpus 1
    """
    console.quiet()
    try:
        import ray as cluster
        from ray import serve
    except ImportError:
        raise ConfigError("deploy ray: Ray is not installed; run `pip install 'meswitch[ray]'`") from None
    from meswitch.deploy.ray_app import Arguments, build

    arguments = Arguments(family=family, replicas=replicas, gpus=gpus, cpus=cpus, ongoing=ongoing)
    application = build(arguments)  # before the cluster is started: a typing error shows at once
    cluster.init(address=address, log_to_driver=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application, name="meswitch", route_prefix="/")
        summary = {"url": f"http://{host}:{port}/v1", "replicas": replicas}
        text = f"meswitch serves {summary['url']} from {plural(replicas, 'replica')} of {family}"
        print(json.dumps(summary) if as_json else text, flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.note("stopping")
    finally:
        serve.delete("meswitch")
        if address is None:
            serve.shutdown()
            cluster.shutdown()


def key_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the key, for logs: letters, digits, `._-`.")],
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A model that it may ask for, `auto` among them; repeatable, default all."),
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time; default no limit.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may load and unload experts.")] = False,
) -> None:
    """Make an API key: the key goes to stderr, its table for the file that `server.keys` names to stdout.

    The table holds a hash, so it is no secret. SIGHUP makes a running server read the file again.

    Example:

        meswitch key team-a --model auto --model math --concurrency 8 >> keys.toml
    """
    from pydantic import ValidationError

    from meswitch.server.keys import ApiKey, key_digest, new_key

    text = new_key()
    try:
        made = ApiKey(
            name=name,
            sha256=key_digest(text),
            models=tuple(model) if model else None,
            concurrency=concurrency,
            admin=admin,
        )
    except ValidationError as error:
        raise ConfigError(f"NAME: {name!r}: {error.errors()[0]['msg']}") from None
    lines = ["[[key]]", f'name = "{made.name}"', f'sha256 = "{made.sha256}"']
    if made.models is not None:
        lines.append(f"models = [{', '.join(_quoted(one) for one in made.models)}]")
    if made.concurrency is not None:
        lines.append(f"concurrency = {made.concurrency}")
    if made.admin:
        lines.append("admin = true")
    console.note(f"the key of {made.name}, shown this once: {text}")
    typer.echo("\n".join([*lines, ""]))


def _quoted(text: str) -> str:
    return json.dumps(text)  # a basic string of TOML is written as one of JSON


_TIMEOUT = 10.0


def top_command(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server's address.")] = "http://127.0.0.1:8000",
    seconds: Annotated[float, typer.Option(min=0.1, help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end; throughput needs two looks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the server says as one line of JSON.")] = False,
) -> None:
    """Show a server's experts, memory and throughput, until Ctrl-C.

    The key of MESWITCH_ADMIN_KEY or MESWITCH_API_KEY is sent, if one is set.

    Example:

        meswitch top http://127.0.0.1:8000
    """
    from rich.console import Console
    from rich.live import Live

    found = _ask(url)
    if as_json:
        print(json.dumps(found))
        return
    if once:
        Console().print(view(found, None))
        return
    before, when = found, time.monotonic()
    with Live(view(found, None), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            found, now = _ask(url), time.monotonic()
            made = found["engine"]["generated_tokens"] - before["engine"]["generated_tokens"]
            live.update(view(found, made / (now - when)), refresh=True)
            before, when = found, now


def view(found: dict[str, Any], rate: float | None) -> "Group":
    """What `GET /v1/experts` says, to look at.

    Args:
        found: its object.
        rate: tokens a second since the look before, None at the first.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    engine, memory = found["engine"], found["engine"]["memory"]
    device = engine["device_bytes"]
    taken = sum(row["slot"] is not None for row in found["data"])
    head = f"{engine['base']}: {engine['running']} running, {engine['waiting']} waiting"
    head += "" if rate is None else f", {rate:.1f} tokens/s"
    head += f", {format_bytes(device)} on the device"
    bars = Table.grid(padding=(0, 2))
    for name, used, total, text in (
        ("base", memory["base"], device, format_bytes(memory["base"])),
        ("slots", taken, engine["slots"], f"{taken} of {engine['slots']}, {format_bytes(memory['slots'])}"),
        (
            "KV cache",
            engine["kv_used_tokens"],
            engine["kv_tokens"],
            f"{engine['kv_used_tokens']} of {engine['kv_tokens']} tokens, {format_bytes(memory['kv_cache'])}",
        ),
        *(
            (name, memory[purpose], device, format_bytes(memory[purpose]))
            for name, purpose in (("merged", "merged"), ("graphs", "graphs"), ("scratch", "scratch"))
            if memory[purpose] or purpose == "merged"
        ),
        ("host", memory["host"], engine["host_budget"] or 2 * memory["host"] or 1, format_bytes(memory["host"])),
    ):
        bars.add_row(name, ProgressBar(total=max(total, 1), completed=used, width=30), text)
    counted = ("running", "requests", "hits", "loads", "evictions", "failures")
    table = Table(
        "expert", "where", "bytes", *counted, "version", box=SIMPLE_HEAD, padding=0, pad_edge=False
    )  # fits 80 columns
    for column in table.columns[1:]:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for row in found["data"]:
        name = f"{row['id']} (pinned)" if row["pinned"] else row["id"]
        table.add_row(
            name, row["place"], format_bytes(row["bytes"]), *(str(row[field]) for field in counted), row["version"][:8]
        )
    return Group(head, "", bars, "", table)


def _ask(url: str) -> dict[str, Any]:
    """Raises ConfigError: the server does not answer, or not to us."""
    import urllib.error
    import urllib.request

    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/experts"
    key = os.environ.get("MESWITCH_ADMIN_KEY") or os.environ.get("MESWITCH_API_KEY")
    try:
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        fix = "set MESWITCH_API_KEY" if error.code == 401 else "is it a server of meswitch?"
        raise ConfigError(f"{address}: status {error.code}; {fix}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"{address}: no answer ({reason}); is `meswitch serve` running there?") from None
    return found
