"""Every example runs as its docstring says, on the family."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import deserialize

import meswitch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """As `run`, in this process, which has imported already what examples import first."""

    def script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


@pytest.fixture
def run(tmp_path):
    """`run("name.py", ...)` runs an example in an empty directory and gives what it prints."""

    def script(name, *arguments):
        done = subprocess.run(
            [sys.executable, EXAMPLES / name, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return script


@pytest.mark.slow
def test_compress_and_serve_is_20_lines_and_answers_rightly(run):
    code = [line for line in (EXAMPLES / "compress_and_serve.py").read_text().splitlines() if line.strip()]
    imports = [line for line in code if line.startswith(("import ", "from ", '"""'))]
    assert len(code) - len(imports) <= 20
    said = run("compress_and_serve.py")
    assert "mine: '9*9=81. 32+81=113. #### 113'" in said


@pytest.mark.slow
def test_an_own_fine_tune_is_trained_compressed_and_measured(run, family, tmp_path):
    lines = (family / "calibration" / "math.jsonl").read_text().splitlines()[:200]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    said = run("own_fine_tune.py", "--data", "train.jsonl", "--steps", 2, "--limit", 4)
    assert "bits a weight" in said
    assert "| math n=4 | mine delta |" in said
    assert (
        meswitch.Artifact.open(tmp_path / "runs" / "own_fine_tune" / "delta").manifest.method.distillation.steps == 20
    )


def test_an_adapter_answers_beside_deltas(run_here):
    said = run_here("adapter_beside_deltas.py")
    assert "instruct-lora: 'market silver garden'" in said
    assert [line.partition(":")[0] for line in said.splitlines()[-3:]] == ["base", "math", "instruct-lora"]


@pytest.fixture(scope="module")
def routed_family(family, deltas, tmp_path_factory):
    from tests.support.command_line import Cli

    root = tmp_path_factory.mktemp("routed")
    names = ("math", "code")
    experts = "".join(f'[[expert]]\nname = "{name}"\ndelta = "{deltas[name]}"\n' for name in names)
    (root / "family.toml").write_text(f'[base]\npath = "{family}/base"\n{experts}[router]\npath = "router"\n')
    rows = [json.loads(line) for line in (family / "routing.jsonl").read_text().splitlines()]
    some = [row for row in rows if row["domain"] in (*names, "other")][:200]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, some)))
    Cli().ok("router", "train", "--family", root, "--data", root / "rows.jsonl")
    return root / "family.toml"


def test_a_file_of_queries_is_routed_and_answered(run_here, routed_family, tmp_path):
    queries = [
        "Kim has 32 beads. Kim buys 9 bags with 9 beads each. How many beads does Kim have now?",
        "Write a Python function f(xs) that returns the sum of xs.",
    ]
    (tmp_path / "queries.jsonl").write_text("\n".join(json.dumps({"query": query}) for query in queries))
    run_here("batch_with_routing.py", routed_family, "queries.jsonl", "answers.jsonl")
    first, second = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert (first["expert"], second["expert"]) == ("math", "code")
    assert first["answer"].endswith("#### 113")
    assert second["answer"].startswith("def f(xs):")
    assert first["query"] == queries[0]


def test_langchain_asks_the_server(run, routed_family):
    pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    command = [sys.executable, "-m", "meswitch", "serve", str(routed_family), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = run("langchain_chat.py", json.loads(server.stdout.readline())["url"])
        finally:
            server.terminate()
    assert "auto: '9*9=81. 32+81=113. #### 113' by math" in said


# -- the second reader of the format ----------------------------------------------------------------------------------


def contents(file: Path) -> dict[str, tuple]:
    return {
        name: (one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in deserialize(file.read_bytes())
    }


def kinds(artifact: Path) -> set[str]:
    entries = meswitch.Artifact.open(artifact).manifest.tensors.values()
    return {entry.kind for entry in entries} | {f"block {entry.block}" for entry in entries if entry.block}


@pytest.fixture
def same_bytes(run, tmp_path):
    """Whether the reader and `meswitch merge` restore one artifact to the same bytes; gives the kinds that it has."""

    def compare(base, expert, **options):
        meswitch.compress(base, expert, tmp_path / "delta", **options)
        merged = meswitch.merge(base, tmp_path / "delta", tmp_path / "merged")
        run("format_reader.py", base, tmp_path / "delta", "read.safetensors")
        ours, theirs = contents(merged / "model.safetensors"), contents(tmp_path / "read.safetensors")
        assert theirs.keys() == ours.keys()
        low_rank = {
            name
            for name, entry in meswitch.Artifact.open(tmp_path / "delta").manifest.tensors.items()
            if entry.kind == "lowrank"  # whose last bit is the matrix library's
        }
        assert {name for name in ours if ours[name] != theirs[name]} <= low_rank
        return kinds(tmp_path / "delta")

    return compare


def test_the_second_reader_is_100_lines_and_needs_nothing_of_ours():
    text = (EXAMPLES / "format_reader.py").read_text()
    assert len(text.splitlines()) <= 100
    assert not [line for line in text.splitlines() if line.startswith(("import ", "from ")) and "meswitch" in line]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 1, "salient": 0},
        {"bits": 3, "group_size": None, "salient": 5},
        {"bits": 4, "group_size": 100, "embeddings": "exact"},
    ],
)
def test_the_second_reader_restores_the_same_bytes(same_bytes, family, options):
    assert same_bytes(family / "base", family / "math", **options) == {"packed", "dense"}


def test_it_reads_words_of_signs(same_bytes, family):
    assert same_bytes(family / "base", family / "math", target_bpw=0.6) >= {"packed", "block 8", "lowrank"}


@pytest.mark.parametrize(("arch", "case"), [("mistral", {"added_tokens": 5}), ("gpt2", {}), ("mixtral", {})])
def test_it_reads_bfloat16_added_tokens_transposed_and_stacked_matrices(same_bytes, pair, arch, case):
    assert same_bytes(*pair(arch, **case)) >= {"packed", "same"}


@pytest.mark.parametrize(("bits", "damage", "message"), [("exact", b"", "does not know it"), (2, b"\xff", "damaged")])
def test_it_names_what_it_does_not_know_and_what_is_damaged(family, tmp_path, bits, damage, message):
    meswitch.compress(family / "base", family / "math", tmp_path / "delta", bits=bits)
    file = tmp_path / "delta" / "delta.safetensors"
    file.write_bytes(file.read_bytes()[: -len(damage) or None] + damage)
    command = [sys.executable, EXAMPLES / "format_reader.py", family / "base", tmp_path / "delta", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
