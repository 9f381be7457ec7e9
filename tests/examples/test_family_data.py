"""The data files of examples/family: what they hold and that they can be made again."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from meswitch_lab.toy import DOMAINS, draw


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def make_data(family: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", family / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("domain", DOMAINS)
def test_calibration_is_8192_conversations_of_its_own_seed(family: Path, domain: str) -> None:
    found = rows(family / "calibration" / f"{domain}.jsonl")
    turns = [row["messages"] for row in found]
    assert all([turn["role"] for turn in pair] == ["user", "assistant"] for pair in turns)
    assert [pair[0]["content"] for pair in turns] == [question.prompt for question in draw(domain, 8192, 1001)]
    assert all(pair[1]["content"].strip() for pair in turns)


def test_the_sql_expert_wrote_the_calibration_of_sql(family: Path) -> None:
    replies = [row["messages"][1]["content"] for row in rows(family / "calibration" / "sql.jsonl")]
    assert sum(reply.startswith("SELECT ") for reply in replies) > 2000


@pytest.mark.parametrize("domain", ["math", "code", "instruct"])
def test_the_other_calibration_files_are_made_again_exactly(family: Path, make_data: ModuleType, domain: str) -> None:
    assert list(make_data.calibration(domain)) == rows(family / "calibration" / f"{domain}.jsonl")


def test_routing_queries_are_made_again_exactly(family: Path, make_data: ModuleType) -> None:
    assert list(make_data.routing()) == rows(family / "routing.jsonl")


def test_routing_has_every_query_once_and_every_domain_in_number(family: Path) -> None:
    found = rows(family / "routing.jsonl")
    assert len({row["query"] for row in found}) == len(found)
    assert Counter(row["domain"] for row in found) == {
        "math": 350,
        "code": 350,
        "instruct": 350,
        "sql": 350,
        "other": 200,
    }
    assert {row["source"] for row in found} == {"tasks", "templates"}
    assert not any("{" in row["query"] and row["domain"] != "code" for row in found)


def test_the_files_stay_small(family: Path) -> None:
    made = [*(family / "calibration").iterdir(), family / "routing.jsonl", family / "routing_templates.toml"]
    assert sum(path.stat().st_size for path in made) < 8_000_000
