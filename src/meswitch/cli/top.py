"""`meswitch top`: what a running server does, in the terminal."""

import json
import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Group

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

    from meswitch.units import format_bytes

    engine, memory = found["engine"], found["engine"]["memory"]
    device = sum(memory[name] for name in ("base", "slots", "kv_cache", "merged"))
    taken = sum(row["slot"] is not None for row in found["data"])
    head = f"{engine['base']}: {engine['running']} running, {engine['waiting']} waiting"
    head += "" if rate is None else f", {rate:.1f} tokens/s"
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
        ("merged", memory["merged"], device, format_bytes(memory["merged"])),
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
