"""Broken requests, artifacts and family files, many of each: one clear error, and never a wrong answer.

    python benchmarks/serving/faults.py artifacts --count 20000
    python benchmarks/serving/faults.py families --count 20000
    python benchmarks/serving/faults.py requests --count 10000 --url http://127.0.0.1:8000

Prints one JSON object with what came of them; the status is 1 if something was not refused as it should be.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch

from meswitch import Artifact, Family
from meswitch.errors import MeswitchError

FAMILY = Path(__file__).parents[2] / "examples" / "family"
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, "", "a", "\ud800", "\x00", "auto", "🙂" * 50,
    [], {}, [[]], [None], {"a": 1}, {"type": "text"}, [1, "a"], [{"role": "user"}], "../../etc/passwd", "a" * 5000,
)  # fmt: skip
VALID = (
    ("POST", "/v1/chat/completions", {"model": "math", "messages": [{"role": "user", "content": "1 + 1"}]}),
    ("POST", "/v1/completions", {"model": "base", "prompt": ["a", "b"], "n": 2, "stop": ["x"], "seed": 1}),
    ("POST", "/v1/completions", {"model": "math", "prompt": [1, 2, 3], "stream": True, "top_p": 0.5}),
    ("POST", "/v1/chat/completions", {"model": "auto", "messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("POST", "/v1/experts", {"name": "x", "path": "y"}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/y"}),
    ("POST", "/v1/experts/math/pin", {}),
    ("DELETE", "/v1/experts/math", {}),
    ("GET", "/v1/models/math", None),
    ("GET", "/v1/experts", None),
)  # fmt: skip


def spoiled_bytes(choose: random.Random, raw: bytes) -> bytes:
    """One small thing of a file is wrong."""
    if not raw:
        return b"\x00"
    at = choose.randrange(len(raw))
    length = min(choose.choice((1, 1, 1, 8, 100)), len(raw) - at)
    match choose.randrange(5):
        case 0:
            return raw[:at] + bytes([raw[at] ^ 1 << choose.randrange(8)]) + raw[at + 1 :]
        case 1:
            return raw[:at]
        case 2:
            return raw[:at] + raw[at + length :]
        case 3:
            return raw[: at + length] + raw[at:]
        case _:
            return raw[:at] + choose.randbytes(length) + raw[at + length :]


def spoiled_json(choose: random.Random, value: Any) -> Any:
    """One value of a JSON object is another, has another name, or is missing."""
    value = copy.deepcopy(value)
    spot, where = value, value
    while isinstance(spot, dict | list) and len(spot) and choose.random() < 0.75:
        where = spot
        spot = spot[choose.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))]
    if not isinstance(where, dict | list) or not len(where):
        return choose.choice(ODD)
    key = choose.choice(list(where) if isinstance(where, dict) else range(len(where)))
    match choose.randrange(4):
        case 0:
            del where[key]
        case 1 if isinstance(where, dict):
            where[choose.choice(("x", key + "s", "__class__"))] = where.pop(key)
        case 2 if isinstance(where[key], int) and not isinstance(where[key], bool):
            where[key] += choose.choice((-1, 1, 1000))
        case _:
            where[key] = choose.choice(ODD)
    return value


def contents(directory: Path) -> dict[str, Any]:
    """Every tensor of an artifact, read and checked."""
    artifact = Artifact.open(directory)
    return {name: artifact.read(name) for name in artifact.manifest.tensors}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if one is None or isinstance(one, str | int | float | bool | tuple):
        return bool(one == other)
    if type(one) is not type(other):
        return False
    names = set(getattr(one, "__slots__", None) or vars(one))
    if "group_size" in names and one.scale.shape[-1] == 1:  # one scale a row, however it is said
        names.remove("group_size")
    return all(same(getattr(one, name), getattr(other, name)) for name in names)


def artifacts(source: Path, room: Path, count: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Spoil one file of an artifact `count` times. (what came of it, what should not have come)"""
    choose, seen, wrong = random.Random(seed), Counter(), []
    whole = contents(source)
    for file in source.iterdir():
        (room / file.name).symlink_to(file)
    names = sorted(file.name for file in source.iterdir())
    for number in range(count):
        name = "meswitch.json" if choose.random() < 0.5 else choose.choice(names)
        raw = (source / name).read_bytes()
        if name.endswith(".json") and choose.random() < 0.6:
            spoiled = json.dumps(spoiled_json(choose, json.loads(raw))).encode()
        else:
            spoiled = spoiled_bytes(choose, raw)
        (room / name).unlink()
        (room / name).write_bytes(spoiled)
        try:
            found = contents(room)
        except MeswitchError as error:
            seen[type(error).__name__] += 1
        except Exception as error:  # noqa: BLE001
            wrong.append(f"{number}: {name}: {type(error).__name__}: {error}")
        else:
            good = found.keys() == whole.keys() and all(same(whole[one], found[one]) for one in whole)
            seen["loads right"] += good
            if not good:
                wrong.append(f"{number}: {name}: it loads, and is not what it was")
        (room / name).unlink()
        (room / name).symlink_to(source / name)
    return seen, wrong


def families(text: str, room: Path, count: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Spoil a family file `count` times. (what came of it, what should not have come)"""
    choose, seen, wrong = random.Random(seed), Counter(), []
    for number in range(count):
        spoiled = text.encode()
        for _ in range(choose.randint(1, 3)):
            spoiled = spoiled_bytes(choose, spoiled)
        (room / "family.toml").write_bytes(spoiled)
        try:
            Family.load(room)
            seen["loads"] += 1
        except MeswitchError as error:
            seen[type(error).__name__] += 1
            if "family.toml" not in str(error):
                wrong.append(f"{number}: the file is not named: {error}")
        except Exception as error:  # noqa: BLE001
            wrong.append(f"{number}: {type(error).__name__}: {error}")
    return seen, wrong


def requests(client: httpx.Client, count: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Send `count` broken requests, and now and then a right one. (statuses, what should not have come)

    Args:
        client: of the server, which has the experts of the example family.
    """
    choose, seen, wrong = random.Random(seed), Counter(), []
    asked = {"model": "math", "prompt": "1 + 1 =", "max_tokens": 4}
    right = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    for number in range(count):
        method, path, body = choose.choice(VALID)
        content = None
        if body is not None:
            body = spoiled_json(choose, {"max_tokens": 2} | body if "model" in body else body)
            content = json.dumps(body).encode("utf-8", "replace")
            if choose.random() < 0.2:
                content = spoiled_bytes(choose, content)
        if choose.random() < 0.1:
            path = choose.choice((path + "/x", path.upper(), "/v1/../" + path, path[:-1], path + "?a=%ff", "/" + path))
        if choose.random() < 0.1:
            method = choose.choice(("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
        headers = {
            "content-type": choose.choice(("application/json",) * 8 + ("text/plain", "x", "multipart/form-data"))
        }
        if choose.random() < 0.1:
            headers |= choose.choice(
                (
                    {"content-encoding": "gzip"},
                    {"x-meswitch-expert": "%ff"},
                    {"x-request-id": "a b"},
                    {"accept": "x" * 4000},
                )
            )
        what = f"{number}: {method} {path} {headers} {content!r:.300}"
        try:
            answer = client.request(method, path, content=content, headers=headers)
        except httpx.HTTPError as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
            continue
        seen[str(answer.status_code)] += 1
        if answer.status_code >= 500:
            wrong.append(f"{what}: {answer.status_code} {answer.text:.300}")
        elif answer.status_code >= 400 and method != "HEAD" and "error" not in answer.json():
            wrong.append(f"{what}: no error object: {answer.text:.300}")
        if number % 50 == 0 and client.post("/v1/completions", json=asked).json()["choices"][0]["text"] != right:
            wrong.append(f"{number}: the right request has another answer now")
    health = client.get("/health").json()
    if health["status"] != "ok":
        wrong.append(f"/health: {health}")
    return seen, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("artifacts", "families", "requests"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory) / "room"
        room.mkdir()
        if options.what == "artifacts":
            import meswitch

            meswitch.compress(FAMILY / "base", FAMILY / "math", Path(directory) / "math")
            seen, wrong = artifacts(Path(directory) / "math", room, options.count, options.seed)
        elif options.what == "families":
            seen, wrong = families((FAMILY / "family.toml").read_text(), room, options.count, options.seed)
        else:
            with httpx.Client(base_url=options.url, timeout=300) as client:
                seen, wrong = requests(client, options.count, options.seed)
    print(json.dumps({"what": options.what, "count": options.count, "seen": seen, "wrong": wrong[:20]}, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
