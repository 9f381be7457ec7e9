"""`meswitch route` and `meswitch router`, as a person runs them."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from meswitch.cli import app


@pytest.fixture(scope="module")
def project(family, all_rows, tmp_path_factory):
    """A copy of the family whose router goes beside it, and some of its routing data."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(family / "base", root / "base")
    text = (family / "family.toml").read_text()
    (root / "family.toml").write_text(text.replace("../../runs/demo/router", "router"))
    lines = (family / "routing.jsonl").read_text().splitlines()
    (root / "train.jsonl").write_text("\n".join(lines[::6]))
    (root / "dev.jsonl").write_text("\n".join(lines[1::12]))
    return root


def run(project, *words):
    return CliRunner().invoke(app, [word.replace("@", f"{project}/") for word in words])


@pytest.fixture(scope="module")
def trained(project):
    done = run(project, "router", "train", "--family", "@family.toml", "--data", "@train.jsonl", "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_training_writes_the_familys_router_and_says_how_good_it_is(trained, project):
    assert (project / "router" / "router.json").is_file()
    assert trained["router"] == str((project / "router").resolve())
    assert trained["held_out"]["accuracy"] > 0.95
    assert trained["held_out"]["rows"] == sum(count for name, count in trained["rows"].items() if name != "other")
    assert sum(trained["rows"].values()) == len((project / "train.jsonl").read_text().splitlines())


def test_an_accuracy_of_a_handful_of_rows_says_so(project):
    rows = [
        {"query": f"{words} {number}", "domain": domain}
        for domain, words in (("math", "How many are"), ("code", "Write a function"), ("other", "What is the time"))
        for number in ("one", "two", "three", "four", "five", "six")
    ]
    (project / "two.toml").write_text(
        "".join(
            [f'base = {{ path = "{project}/base" }}\nrouter = {{ path = "few" }}\n']
            + [f'[[expert]]\nname = "{name}"\ndelta = "nowhere"\n' for name in ("math", "code")]
        )
    )
    (project / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run(project, "router", "train", "--family", "@two.toml", "--data", "@few.jsonl", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["held_out"]["rows"] == 12
    assert "accuracy was measured on 12 rows only" in done.stderr


def test_eval_prints_only_json(trained, project):
    done = run(project, "router", "eval", "--family", "@", "--data", "@dev.jsonl", "--json")
    assert done.exit_code == 0, done.stderr
    assert set(json.loads(done.stdout)) == {
        "accuracy",
        "per_domain",
        "per_source",
        "confusion",
        "ece",
        "auroc",
        "coverage",
        "latency_ms",
        "risk_coverage",
        "reliability",
        "accepted_other",
        "unlabelled",
        "bytes",
    }


def test_eval_prints_tables(trained, project):
    done = run(project, "router", "eval", "--family", "@", "--data", "@dev.jsonl")
    assert "accuracy" in done.stdout
    assert "templates" in done.stdout


def test_eval_writes_a_report_with_its_plots(trained, project):
    pytest.importorskip("matplotlib")
    words = ("router", "eval", "--family", "@", "--data", "@dev.jsonl")
    done = run(project, *words, "--out", "@reports/router.md", "--plots", "@reports/plots", "--json")
    assert done.exit_code == 0, done.stderr
    figures, page = json.loads(done.stdout), (project / "reports" / "router.md").read_text()
    assert f"| accuracy | {figures['accuracy']:.4f} |" in page
    assert all(f"| {source} | {share:.4f} |" in page for source, share in figures["per_source"].items())
    links = [line.split("](")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert links == ["plots/risk-coverage.svg", "plots/reliability.svg"]
    assert all((project / "reports" / link).read_text().rstrip().endswith("</svg>") for link in links)


def test_eval_writes_its_json_to_a_file(trained, project):
    words = ("router", "eval", "--family", "@", "--data", "@dev.jsonl", "--json")
    done = run(project, *words, "--out", "@figures.json")
    assert json.loads((project / "figures.json").read_text()) == json.loads(done.stdout)
    refused = run(project, *words, "--out", "@figures.txt")
    assert refused.exit_code == 1
    assert "use .json or .md" in refused.stderr


def test_route_prints_scores_and_the_choice(trained, project):
    done = run(project, "route", "--family", "@family.toml", "Write a Python function that doubles a number.")
    assert done.exit_code == 0, done.stderr
    assert "choice: code" in done.stdout
    assert all(name in done.stdout for name in ("math", "code", "instruct", "sql"))


def test_route_as_json_and_with_a_threshold(trained, project):
    words = ("route", "--family", "@family.toml", "--threshold", "1", "--json", "Write a Python function.")
    route = json.loads(run(project, *words).stdout)
    assert (route["choice"], route["reason"], route["threshold"]) == ("base", "abstained", 1.0)
    assert sum(route["scores"].values()) == pytest.approx(1)


def test_an_untrained_family_says_how_to_train(project):
    done = run(project, "route", "--family", "@family.toml", "--router", "@nowhere", "hello")
    assert done.exit_code == 1
    assert "meswitch router train" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bits", "5"), "--bits: 5 is neither 8 nor 32"),
        (("--bits", "8"), "--bits: 8 is for a sentence encoder"),
        (("--out", "@train.jsonl/router"), "train.jsonl/router: cannot be written"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_trained(project, options, said):
    done = run(project, "router", "train", "--family", "@family.toml", "--data", "@train.jsonl", *options)
    assert done.exit_code == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_bad_row_is_named(project):
    (project / "bad.jsonl").write_text('{"query": "x", "domain": "math"}\n{"query": "x", "domain": "chess"}\n')
    done = run(project, "router", "train", "--family", "@family.toml", "--data", "@bad.jsonl")
    assert done.exit_code == 1
    assert "bad.jsonl: line 2: domain: 'chess'" in done.stderr
