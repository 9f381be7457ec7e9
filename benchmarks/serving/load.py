"""Many streaming clients against one `meswitch serve`: every answer is checked, and nothing may grow.

    python benchmarks/serving/load.py --clients 256 32 --seconds 600

Each client asks one of the family's models or `auto` again and again, and compares each answer with the one that was
given to the same question alone. The example family's experts are compressed first, and each number of clients gets a
server of its own. Prints one JSON object; the status is 1 if an answer was wrong, something grew or a limit was passed.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

import meswitch

FAMILY = Path(__file__).parents[2] / "examples" / "family"
EXPERTS = ("math", "code", "sql", "instruct")
QUESTIONS = (
    "Ravi shares 8 books equally among 4 friends. How many books does each friend get?",
    "Write a Python function that returns the sum of a list.",
    "How many singers are there?",
    "Tell me about the sea.",
    "Lena has 12 apples and gives 5 away. How many are left?",
)
TOKENS = 48
HEALTH_SECONDS = 0.1  # the p99 that is allowed
GAP_SECONDS = 2.0  # without a token, of at most GAP_CLIENTS streams
GAP_CLIENTS = 32
POOL = min(32, (os.cpu_count() or 1) + 4)  # asyncio's: it begins a thread only when all it has are busy


@dataclass
class Seen:
    """What the clients saw.

    Args:
        right: answers as they were alone. wrong: the others. failed: errors, by text.
        gaps: seconds, the longest without a piece of each stream.
        first: seconds to the first piece of each.
    """

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


def family_in(directory: Path, slots: int) -> Path:
    """A family of the example's experts and a router over them; gives its file."""
    from meswitch.router import Encoder, Row, train_router

    text = f'[base]\npath = "{FAMILY / "base"}"\n[engine]\nslots = {slots}\n[router]\npath = "router"\n'
    for name in EXPERTS:
        meswitch.compress(FAMILY / "base", FAMILY / name, directory / name)
        text += f'[[expert]]\nname = "{name}"\ndelta = "{name}"\n'
    rows = [json.loads(line) for line in (FAMILY / "routing.jsonl").read_text().splitlines()]
    random.Random(0).shuffle(rows)
    known = [Row(row["query"], row["domain"] if row["domain"] in EXPERTS else "other") for row in rows[:400]]
    train_router(known, EXPERTS, Encoder.load(FAMILY / "base")).save(directory / "router")
    (directory / "family.toml").write_text(text)
    return directory / "family.toml"


def resources(pid: int) -> dict[str, float]:
    """RSS in MB, threads and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "rss_mb": int(lines["VmRSS"].split()[0]) / 1024,
        "threads": int(lines["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


async def answer(client: httpx.AsyncClient, model: str, question: str, seen: Seen | None = None) -> tuple[str, str]:
    """(who answered, text) of one streamed answer."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "stream": True}
    began = last = time.perf_counter()
    longest, text, expert = 0.0, "", ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread()).decode()[:200]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            now = time.perf_counter()
            if expert:
                longest = max(longest, now - last)
            elif seen is not None:
                seen.first.append(now - began)
            last, expert = now, event["model"]
            text += event["choices"][0]["delta"].get("content", "") if event["choices"] else ""
    if seen is not None:
        seen.gaps.append(longest)
    return expert, text


async def ask_again_and_again(url: str, right: dict, until: float, seed: int, seen: Seen) -> None:
    choose = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        while time.monotonic() < until:
            model, question = choose.choice(["base", *EXPERTS, "auto"]), choose.choice(QUESTIONS)
            try:
                expert, text = await answer(client, model, question, seen)
            except (RuntimeError, httpx.HTTPError) as error:
                said = f"{type(error).__name__}: {error}"
                seen.failed[said] = seen.failed.get(said, 0) + 1
                await asyncio.sleep(1)
                continue
            if (model in ("auto", expert)) and text == right[expert, question]:
                seen.right += 1
            else:
                seen.wrong.append(f"{model} ({expert}): {question!r}: {text!r}")


def look(url: str, pid: int, seconds: float, every: float) -> tuple[list[float], list[dict[str, float]], list[float]]:
    """(seconds of each look at `/health`, what the server took then, how late this process woke up before each look).

    In a process that does nothing else: how late it wakes up is what the machine's load costs anybody.
    """
    taken, found, late, until = [], [], [], time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < until:
            began = time.perf_counter()
            client.get("/health")
            taken.append(time.perf_counter() - began)
            if len(taken) % 40 == 1:
                found.append(resources(pid))
            began = time.perf_counter()
            time.sleep(every)
            late.append(time.perf_counter() - began - every)
    return taken, found, late


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


async def run(url: str, pid: int, clients: int, seconds: float) -> dict:
    seen = Seen()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        right = {}
        for model in ("base", *EXPERTS):
            for question in QUESTIONS:
                right[model, question] = (await answer(client, model, question))[1]
        before = resources(pid)
        until = time.monotonic() + seconds
        asking = [ask_again_and_again(url, right, until, seed, seen) for seed in range(clients)]
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            looking = asyncio.get_running_loop().run_in_executor(pool, look, url, pid, seconds, 0.05)
            await asyncio.gather(*asking)
            health, curve, late = await looking
        await asyncio.sleep(7)  # connections that were kept alive are closed
        after = resources(pid)
        state = (await client.get("/v1/experts")).json()["engine"]
    middle = curve[len(curve) // 2]
    return {
        "clients": clients,
        "seconds": seconds,
        "right": seen.right,
        "wrong": seen.wrong[:5],
        "failed": seen.failed,
        "tokens_per_second": round(state["generated_tokens"] / seconds, 1),
        "first_piece_p50_s": round(statistics.median(seen.first), 3),
        "longest_gap_s": round(max(seen.gaps), 3),
        "health_p50_s": round(statistics.median(health), 4),
        "health_p99_s": round(p99(health), 4),
        "wake_up_p99_s": round(p99(late), 4),
        "load_average": round(os.getloadavg()[0], 1),
        "nice": os.nice(0),
        "before": before,
        "middle": middle,
        "after": after,
        "left": {name: state[name] for name in ("running", "waiting", "kv_used_tokens")},
    }


def faults(found: dict) -> list[str]:
    """What must not be."""
    said = []
    if found["wrong"] or found["failed"] or not found["right"]:
        said.append("answers are wrong or failed")
    if any(found["left"].values()):
        said.append("something is left in the engine")
    if found["after"]["threads"] > found["middle"]["threads"] + POOL:
        said.append("threads grow")
    if found["after"]["files"] > found["before"]["files"] + 4:
        said.append("files grow")
    if found["after"]["rss_mb"] > 1.1 * found["middle"]["rss_mb"] + 20:
        said.append("memory grows")
    if found["health_p99_s"] > HEALTH_SECONDS:
        said.append(f"p99 of /health is over {HEALTH_SECONDS} s")
    if found["clients"] <= GAP_CLIENTS and found["longest_gap_s"] > GAP_SECONDS:
        said.append(f"a stream stood still for over {GAP_SECONDS} s")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        file = family_in(Path(directory), options.slots)
        rows = [served(file, clients, options.seconds) for clients in options.clients]
    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "slots": options.slots,
        "tokens": TOKENS,
        "versions": {name: version(name) for name in ("meswitch", "torch", "uvicorn", "uvloop")},
    }
    text = json.dumps({"meta": meta, "rows": rows}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    sys.exit(any(row["faults"] for row in rows))


def served(file: Path, clients: int, seconds: float) -> dict[str, Any]:
    """What so many clients saw of a server of its own, what it took, and what must not be of it."""
    command = [sys.executable, "-m", "meswitch", "serve", str(file), "--port", "0", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(server.stdout.readline())["url"].removesuffix("/v1")
        found = asyncio.run(run(url, server.pid, clients, seconds))
        found["cpu_s"] = sum(cpu_seconds(server.pid))
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=60)
    found["faults"] = faults(found) + ([f"the server ends with status {status}"] if status else [])
    return found


def cpu_seconds(pid: int) -> tuple[float, float]:
    """In the program and in the system, of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / ticks, int(fields[12]) / ticks


if __name__ == "__main__":
    main()
