"""`meswitch router` for the kinds beside the embedding router, as a person runs it."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meswitch.cli import app
from meswitch.router import LlmSettings

DOCS = Path(__file__).parents[2] / "docs"
LLM = ("llm", "--weights", "full", "--steps", "2", "--batch", "2", "--max-tokens", "16")


@pytest.fixture(scope="module")
def project(family, tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(family / "base", root / "base")
    text = (family / "family.toml").read_text()
    (root / "family.toml").write_text(text.replace("../../runs/demo/router", "router"))
    lines = (family / "routing.jsonl").read_text().splitlines()
    (root / "train.jsonl").write_text("\n".join(lines[::16]))
    (root / "dev.jsonl").write_text("\n".join(lines[1::32]))
    (root / "rules.toml").write_text('[[rule]]\nchoose = "sql"\nfield = "text"\npattern = "(?i)select"\n')
    return root


def run(project, *words):
    return CliRunner().invoke(app, [word.replace("@", f"{project}/") for word in words])


def train(project, *words):
    done = run(project, "router", "train", *words, "--family", "@", "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def llm(project):
    return train(project, *LLM, "--data", "@train.jsonl", "--eval-data", "@dev.jsonl", "--out", "@llm")


@pytest.fixture(scope="module")
def embedding(project):
    return train(project, "--data", "@train.jsonl")


def test_an_llm_router_is_trained_and_its_checkpoint_removed(llm, project):
    assert llm["kind"] == "llm"
    assert set(llm["leaked"]) == {"exact", "normalised", "near", "conflicts"}
    assert sorted(path.name for path in (project / "llm").iterdir()) == ["router.json", "router.safetensors"]
    assert not (project / "llm.training").exists()


def test_an_llm_router_is_evaluated_and_asked(llm, project):
    done = run(project, "router", "eval", "--family", "@", "--router", "@llm", "--data", "@dev.jsonl", "--json")
    assert set(json.loads(done.stdout)) >= {"accuracy", "per_domain", "ece", "auroc", "latency_ms"}
    done = run(project, "route", "--family", "@", "--router", "@llm", "--model", "@base", "--json", "What is 17 + 25?")
    assert sum(json.loads(done.stdout)["scores"].values()) == pytest.approx(1)


def test_a_new_expert_is_described_not_trained(llm, project):
    text = (project / "family.toml").read_text()
    start = text.index('[[expert]]\nname = "sql"')
    law = text[start : text.index("[router]")].replace("sql", "law").replace("a database", "contracts and statutes")
    (project / "more.toml").write_text(text.replace("[router]", law + "[router]"))
    done = run(project, "route", "--family", "@more.toml", "--router", "@llm", "hello")
    assert "does not know law" in done.stderr
    words = ("--family", "@more.toml", "--router", "@llm", "--out", "@more")
    assert json.loads(run(project, "router", "update", *words, "--json").stdout)["new"] == ["law"]
    done = run(project, "route", "--family", "@more.toml", "--router", "@more", "--json", "hello")
    assert "law" in json.loads(done.stdout)["scores"]


def test_an_embedding_router_learns_a_new_expert_from_examples(embedding, project):
    text = (project / "family.toml").read_text()
    law = '\n[[expert]]\nname = "law"\ndelta = "law"\ndescription = "Legal questions."\n'
    (project / "examples.toml").write_text(text + law)
    queries = [f"Is clause {i} of the tenancy agreement enforceable under contract law?" for i in range(8)]
    rows = [json.dumps({"query": query, "domain": "law"}) for query in queries]
    (project / "law.jsonl").write_text("\n".join(rows))
    words = ("router", "update", "--family", "@examples.toml", "--router", "@router", "--out", "@with-law", "--json")
    told = json.loads(run(project, *words, "--examples", "@law.jsonl").stdout)
    assert (told["new"], told["gone"]) == (["law"], [])
    asked = "Is clause 12 of the lease enforceable under contract law?"
    done = run(project, "route", "--family", "@examples.toml", "--router", "@with-law", "--json", asked)
    assert json.loads(done.stdout)["choice"] == "law"
    without = run(project, *words)
    assert "give a file of them" in without.stderr
    (project / "law.jsonl").write_text(rows[0].replace("law", "sql"))
    assert "has no rows of 'law'" in run(project, *words, "--examples", "@law.jsonl").stderr


def test_rules_are_not_updated(embedding, project):
    train(project, "rules", "--rules", "@rules.toml", "--out", "@plain-rules")
    done = run(project, "router", "update", "--family", "@", "--router", "@plain-rules")
    assert done.exit_code == 1
    assert "only LLM and embedding routers" in done.stderr


def test_a_cascade_of_two_trained_routers(llm, embedding, project):
    words = ("--first", "@router", "--second", "@llm", "--asked", "0.1", "--out", "@cascade")
    told = train(project, "cascade", "--data", "@dev.jsonl", *words)
    assert 0 <= told["held_out"]["weight"] <= 1
    question = "Ravi shares 8 books equally among 4 friends. How many books does each friend get?"
    done = run(project, "route", "--family", "@", "--router", "@cascade", "--json", question)
    assert json.loads(done.stdout)["choice"] == "math"


def test_rules_before_a_router(embedding, project):
    train(project, "rules", "--rules", "@rules.toml", "--first", "@router", "--out", "@rules")
    choice = [
        json.loads(run(project, "route", "--family", "@", "--router", "@rules", "--json", query).stdout)["choice"]
        for query in ("SELECT a poem", "If I have 3 apples and buy 4, how many do I have?")
    ]
    assert choice == ["sql", "math"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--data: a router of kind embedding"),
        (("--data", "@train.jsonl", "--rows", "@rows"), "--rows: only with --self"),
        (("--self", "--data", "@train.jsonl", "--encoder", "@no-encoder"), "no-encoder: no such"),
        (("--kind", "llm"), "Missing option '--data'"),
        (("cascade", "--data", "@dev.jsonl"), "Missing option '--first'"),
        (("rules",), "Missing option '--rules'"),
        (("tree",), "No such command 'tree'"),
        (
            ("--data", "@train.jsonl", "--eval-data", "@train.jsonl", "--leaks", "refuse"),
            "queries of the training data",
        ),
        (("--data", "@train.jsonl", "--eval-data", "@train.jsonl"), "has 0 distinct queries"),
    ],
)
def test_what_is_missing_is_named(project, words, message):
    done = run(project, "router", "train", *words, "--family", "@", "--out", "@nowhere")
    assert done.exit_code != 0
    assert message in done.stderr


def test_a_rule_for_no_expert_is_named_with_its_file(project):
    file = project / "chess.toml"
    file.write_text('[[rule]]\nchoose = "chess"\nfield = "text"\npattern = "rook"\n')
    done = run(project, "router", "train", "rules", "--rules", "@chess.toml", "--family", "@", "--out", "@nowhere")
    assert done.exit_code == 1
    assert f"{file}: rule[0].choose: 'chess' is none of" in done.stderr


def test_check_counts_what_two_files_share(project):
    done = run(project, "router", "check", "--family", "@", "--data", "@train.jsonl", "--eval-data", "@train.jsonl")
    assert done.exit_code == 1
    words = ("--data", "@train.jsonl", "--eval-data", "@train.jsonl", "--json")
    told = json.loads(run(project, "router", "check", "--family", "@", *words).stdout)
    assert told["exact"] == told["rows"] == len(told["queries"])
    assert told["conflicts"] == 0


TRAIN = [f"router train {kind}" for kind in ("embedding", "llm", "cascade", "rules")]


@pytest.mark.parametrize("command", ["route", *TRAIN, "router eval", "router update", "router check"])
def test_every_option_is_documented(command):
    from typer.main import get_command

    found = get_command(app)
    for word in command.split():
        found = found.commands[word]
    page = (DOCS / "use" / "cli.md").read_text()
    general, text = page.split("\n## ")[0], page.split(f"\n## {' '.join(command.split()[:2])}\n")[1].split("\n## ")[0]
    for option in found.params:
        name = option.opts[0]
        if name.startswith("--") and name != "--help":
            assert name in text or name in general, name


def test_the_command_trains_an_llm_router_with_the_settings_of_the_python_api():
    from typer.main import get_command

    command = get_command(app).commands["router"].commands["train"].commands["llm"]
    options = {option.name: option.default for option in command.params}
    plain = LlmSettings()
    for name in ("steps", "batch", "rank", "top", "settle", "max_tokens", "permutations"):
        assert options[name] == getattr(plain, name), name
    assert (plain.weights, plain.learning_rate, plain.top) == ("lora", 1e-3, 0.5)
