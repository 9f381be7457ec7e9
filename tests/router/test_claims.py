"""`meswitch router train --self`: rows without labels, from experts that answer and write."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from meswitch import Engine
from meswitch.cli import app
from meswitch.router import DescribedRouter, RouteOption, RouterError, Space, evaluate_router, read_rows, train_router
from meswitch.router.data import claimed_rows, read_queries, write_queries

EXPERTS = ("math", "code", "instruct", "sql")
SAID = {
    "math": "Arithmetic word problems: how many, how much.",
    "code": "Programming: write a Python function.",
    "instruct": "General instructions on text: reverse, sort, join, rewrite.",
    "sql": "Questions about a database, answered with an SQL query.",
}


@pytest.fixture(scope="module")
def engine(family, deltas):
    with Engine(family / "base", deltas) as engine:
        yield engine


@pytest.fixture(scope="module")
def project(family, deltas, tmp_path_factory):
    """A family of one's own, with its experts' artifacts and no router."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(family / "base", root / "base")
    text = (family / "family.toml").read_text().replace("../../runs/demo", str(root))
    (root / "family.toml").write_text(text)
    for name, delta in deltas.items():
        shutil.copytree(delta, root / name)
    return root


@pytest.fixture(scope="module")
def trained(project, all_rows):
    """What the command says that trains a router on queries which nobody labelled; it also writes `rows.jsonl`."""
    log = [json.dumps({"query": row.query, "domain": "nobody's"}) for row in all_rows[::12]]
    (project / "log.jsonl").write_text("\n".join(log))
    words = ["--self", "--data", str(project / "log.jsonl"), "--rows", str(project / "rows.jsonl"), "--json"]
    done = CliRunner().invoke(app, ["router", "train", "--family", str(project), *words])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def claimed(trained, project):
    return read_rows(project / "rows.jsonl", EXPERTS)


def test_most_claims_are_right(claimed, all_rows):
    domains = {row.query: row.domain for row in all_rows}
    known = [row for row in claimed if domains[row.query] != "other"]
    assert {row.domain for row in claimed} == set(EXPERTS)
    assert sum(domains[row.query] == row.domain for row in known) > 0.65 * len(known)


def test_a_router_of_claims_is_better_than_one_of_descriptions(claimed, unseen, encoder):
    described = DescribedRouter([RouteOption(name, said) for name, said in SAID.items()], Space(encoder))
    before = evaluate_router(described, unseen).accuracy
    assert evaluate_router(train_router(claimed, EXPERTS, encoder), unseen).accuracy > before + 0.1


def test_the_clearest_claims_count_and_what_the_base_is_surest_of_is_nobodys():
    sureness = torch.zeros(24, 3, dtype=torch.float64)
    sureness[:9, 0], sureness[9:18, 1], sureness[18:, 2] = 1.0, 1.0, 3.0
    sureness[0, 0] = 5.0
    sureness[23] = torch.nan
    rows = claimed_rows([str(i) for i in range(24)], ["a", "b"], sureness)
    assert {row.domain for row in rows} == {"a", "b"}
    assert "0" in [row.query for row in rows]
    assert all(int(row.query) < 18 for row in rows)


def test_an_expert_without_claims_is_named():
    with pytest.raises(RouterError, match="'b' claims 0 of 10 queries"):
        claimed_rows(
            [str(i) for i in range(10)], ["a", "b"], torch.tensor([[1.0, 0.0, 0.0]] * 5 + [[2.0, 0.0, 0.0]] * 5)
        )


def test_experts_write_queries_and_the_seed_decides_which(engine):
    first = write_queries(engine, ["math", "sql"], 4, seed=1)
    assert 2 < len(first) <= 8
    assert first == write_queries(engine, ["math", "sql"], 4, seed=1) != write_queries(engine, ["math", "sql"], 4)


@pytest.mark.parametrize(("text", "message"), [("", "has no rows"), ('{"text": "a"}', "line 1: query: missing")])
def test_a_file_without_queries_is_refused(text, message, tmp_path):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(RouterError, match=message):
        read_queries(tmp_path / "log.jsonl")


def test_the_command_trains_on_queries_that_nobody_labelled(trained, claimed, project):
    assert sum(trained["rows"].values()) == len(claimed)
    assert set(trained["rows"]) == set(EXPERTS)
    done = CliRunner().invoke(app, ["route", "--family", str(project), "--json", claimed[0].query])
    assert json.loads(done.stdout)["scores"].keys() == set(EXPERTS)
