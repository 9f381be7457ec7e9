"""Artifacts on a hub: `huggingface_hub` itself talks to a stand-in, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import meswitch
from meswitch.artifact import remote
from meswitch.artifact.manifest import Manifest
from meswitch.artifact.remote import GENERATED, RemoteName, files_of, remote_name
from meswitch.errors import ArtifactError, ConfigError
from tests.support.command_line import Cli
from tests.support.hub_server import TOKEN, HubServer


@pytest.fixture
def hub():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def run(hub, tmp_path, monkeypatch):
    """`run("push", ...)` runs a command that sees the stand-in as its hub, and none of this machine's cache."""
    from huggingface_hub import constants

    patched = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in patched.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    remote._snapshot.cache_clear()
    yield Cli()
    remote._snapshot.cache_clear()


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_what_is_pulled_is_what_was_pushed(hub, run, math_delta, family, tmp_path):
    said = run.json("push", math_delta, "org/math-delta", "--base", "org/base", "--private")
    repository = hub.repositories["org/math-delta"]
    assert repository.visibility == "private"
    assert repository.messages == ["meswitch push: math"]
    assert said["pushed"]["commit"] == repository.branches["main"][-1][0]
    there = repository.files()
    assert {name: there[name] for name in contents(math_delta)} == contents(math_delta)

    found = run.json("pull", "org/math-delta", "--out", "deltas/math")
    assert found["commit"] == said["pushed"]["commit"]
    pulled = contents(tmp_path / "deltas" / "math")
    card = pulled.pop("README.md").decode()
    assert pulled == contents(math_delta)
    assert GENERATED in card
    assert not list((tmp_path / "deltas").glob("*.partial"))
    run.ok("verify", "deltas/math", "--base", family / "base")


def test_the_environment_says_which_hub_it_is(hub, run, math_delta, tmp_path):
    assert run.ok("push", math_delta, "org/math-delta").stdout.startswith(f"{hub.url}/org/math-delta/commit/")
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    command = [sys.executable, "-m", "meswitch", "pull", "org/math-delta"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert done.stdout.startswith("math-delta: math, ")


def test_a_repository_is_taken_in_place_of_a_directory(hub, run, math_delta, family, tmp_path):
    run.ok("push", math_delta, "org/math-delta")
    hub.repositories["org/math-delta"].branches["main"][-1][1]["secret.bin"] = b"not the artifact's"
    merged = tmp_path / "merged"
    run.ok("merge", "--base", family / "base", "--delta", "hf://org/math-delta", "--out", merged)
    assert "secret.bin" not in hub.asked
    local = meswitch.merge(family / "base", math_delta, tmp_path / "local")
    assert (merged / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    assert run.json("inspect", "hf://org/math-delta")["expert"]["name"] == "math"
    (tmp_path / "family.toml").write_text(
        f'[base]\npath = "{family}/base"\n[[expert]]\nname = "math"\ndelta = "hf://org/math-delta"\n'
    )
    asked = "Kim has 32 beads. Kim buys 9 bags with 9 beads each. How many beads does Kim have now?"
    answer = run.ok("generate", "--family", tmp_path, "--model", "math", asked).stdout
    assert "#### 113" in answer


def test_an_artifact_over_a_quantised_base_comes_back_for_that_base_alone(hub, run, math_delta, family, tmp_path):
    run.ok("quantize", "--base", family / "base", "--to", "int4", "--out", "base-int4")
    run.ok("compress", "--base", "base-int4", "--expert", family / "math", "--out", "made")
    run.ok("push", "made", "org/math-over-int4", "--base", "org/base-int4")
    card = hub.repositories["org/math-over-int4"].files()["README.md"].decode()
    assert "base_model: org/base-int4" in card.replace('"', "")
    assert "meswitch merge --base org/base-int4 --delta math-over-int4" in card
    run.ok("pull", "org/math-over-int4", "--out", "pulled")
    assert contents(tmp_path / "pulled").keys() >= contents(tmp_path / "made").keys()
    run.ok("verify", "pulled", "--base", "base-int4")
    refused = run.error("verify", "hf://org/math-over-int4", "--base", family / "base")
    assert "give its base, which was called 'base-int4'" in refused
    for delta, out in (("made", "here"), ("hf://org/math-over-int4", "there")):
        run.ok("merge", "--base", "base-int4", "--delta", delta, "--out", out)
    assert contents(tmp_path / "here")["model.safetensors"] == contents(tmp_path / "there")["model.safetensors"]
    wrong = run.error("merge", "--base", "base-int4", "--delta", math_delta, "--out", "wrong")
    assert "compress again against this quantised one" in wrong


def test_what_was_fetched_once_is_there_without_the_hub(hub, run, math_delta, monkeypatch):
    from huggingface_hub import constants

    run.ok("push", math_delta, "org/math-delta")
    found = run.json("inspect", "hf://org/math-delta")
    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remote._snapshot.cache_clear()
    assert run.json("inspect", "hf://org/math-delta") == found
    assert "hf://org/other: the hub cannot be reached" in run.error("inspect", "hf://org/other")


def test_a_hub_that_cannot_be_reached_is_one_line(hub, run, math_delta):
    hub.close()
    error = run.error("push", math_delta, "org/math-delta")
    assert "hf://org/math-delta: the hub cannot be reached" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("status", [429, 502])
@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_hub_that_is_out_of_order_says_so_and_not_that_the_name_is_wrong(
    hub, run, math_delta, monkeypatch, status, command
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's library asks again, later each time
    hub.status = status
    done = run("push", math_delta, "org/math") if command == "push" else run("pull", "org/math")
    assert done.exit_code == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: hf://org/math: the hub answers with an error of its own (status {status}: ")
    assert said.endswith("; try again later")


def test_a_smaller_artifact_leaves_nothing_of_a_larger_one(hub, run, math_delta):
    run.ok("push", math_delta, "org/math-delta")
    files = hub.repositories["org/math-delta"].branches["main"][-1][1]
    files |= {"delta-00001.safetensors": b"old", "delta.safetensors.index.json": b"old", "notes.md": b"mine"}
    said = run.json("push", math_delta, "org/math-delta")
    assert sorted(said["pushed"]["removed"]) == ["delta-00001.safetensors", "delta.safetensors.index.json"]
    assert hub.repositories["org/math-delta"].files()["notes.md"] == b"mine"


def test_a_card_that_somebody_wrote_stays(hub, run, math_delta):
    run.ok("push", math_delta, "org/math-delta")
    repository = hub.repositories["org/math-delta"]
    run.ok("push", math_delta, "org/math-delta", "--license", "mit")
    assert b'license: "mit"' in repository.files()["README.md"]
    repository.branches["main"][-1][1]["README.md"] = b"# By hand"
    shown = run.ok("push", math_delta, "org/math-delta").stdout
    assert repository.files()["README.md"] == b"# By hand"
    assert "own README.md stays" in shown


def test_a_branch_is_pushed_to_and_pulled_from(hub, run, math_delta, tmp_path):
    run.ok("push", math_delta, "org/math-delta@v2")
    repository = hub.repositories["org/math-delta"]
    assert "meswitch.json" not in repository.files("main")
    assert "meswitch.json" in repository.files("v2")
    run.ok("pull", "org/math-delta@v2")
    assert (tmp_path / "math-delta" / "meswitch.json").is_file()
    error = run.error("pull", "org/math-delta", "--out", "other")
    assert "hf://org/math-delta: has no meswitch.json, so it is not an artifact" in error


def test_a_damaged_artifact_is_not_pushed(hub, run, math_delta, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, content in contents(math_delta).items():
        (broken / name).write_bytes(content)
    file = broken / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert "checksum" in run.error("push", broken, "org/broken")
    assert hub.repositories == {}


def test_what_was_tampered_with_on_the_hub_is_not_taken(hub, run, math_delta, tmp_path):
    run.ok("push", math_delta, "org/math-delta")
    files = hub.repositories["org/math-delta"].branches["main"][-1][1]
    files["delta.safetensors"] = files["delta.safetensors"][:-1] + b"\xff"
    assert "checksum" in run.error("pull", "org/math-delta")
    assert not (tmp_path / "math-delta").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("pull", "org/nothing"), {}, "hf://org/nothing: the hub refuses"),
        (("pull", "nothing"), {}, "a repository of the hub is named hf://org/name"),
        (("push", "{delta}", "org/x"), {"HF_TOKEN": "hf_wrong"}, "hf://org/x: the hub refuses"),
        (("push", "{delta}", "org/x", "--license", "Apache 2.0"), {}, "an identifier such as apache-2.0"),
        (("push", "{delta}", "org/x", "--license-name", "mine"), {}, "are for `--license other`"),
        (("push", "{delta}", "org/x", "--quality", "{delta}/meswitch.json"), {}, "what `meswitch eval --out"),
        (
            ("merge", "--base", "{family}/base", "--delta", "hf://name", "--out", "o"),
            {},
            "hf:/name: a repository",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(run, math_delta, family, arguments, environment, message):
    arguments = [argument.format(delta=math_delta, family=family) for argument in arguments]
    error = run.error(*arguments, **environment)
    assert message in error
    assert TOKEN not in error


def test_a_manifest_cannot_reach_out_of_its_directory(math_delta):
    data = json.loads((math_delta / "meswitch.json").read_text())
    for name in ("../evil", "/etc/passwd", "*", ".cache"):
        manifest = Manifest.from_json(json.dumps(data | {"companions": {name: "0"}}), Path("meswitch.json"))
        with pytest.raises(ArtifactError, match="is no plain file name"):
            files_of(manifest)


def test_names_of_repositories(tmp_path):
    assert remote_name("hf://org/name") == RemoteName("org/name")
    assert remote_name(Path("hf://org/name@v1.0/x")) == RemoteName("org/name", "v1.0/x")
    assert remote_name("org/name") is None
    assert remote_name(tmp_path) is None
    for text in ("hf://name", "hf://org/name/file", "hf://org/../x", "hf://org/name@"):
        with pytest.raises(ConfigError, match="is named hf://org/name"):
            remote_name(text)
