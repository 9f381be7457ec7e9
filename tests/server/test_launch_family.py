"""From a family.toml to an engine, a router and a server process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from meswitch import Family, compress
from meswitch.errors import ArtifactError
from meswitch.launch import engine_from_family, policy_from_family, router_from_family
from meswitch.router import RouterError
from tests.support.http_server import QUESTIONS, ask_with, user
from tests.support.models import make_pair

SERVE = "import typer; from meswitch.cli.serve import serve_command; typer.run(serve_command)"


def changed(family_file, directory, *changes):
    """The family with other text in its file: (old, new) pairs."""
    text = family_file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (directory / "family.toml").write_text(text)
    return Family.load(directory)


def test_an_expert_that_is_not_compressed_yet_names_the_command(family_file, deltas, tmp_path):
    config = changed(family_file, tmp_path, (str(deltas["code"]), "nowhere/code"))
    with pytest.raises(ArtifactError, match=r"'code': .*nowhere/code: .*`meswitch compress --family .* --expert code`"):
        engine_from_family(config)


def test_the_engine_section_reaches_the_engine(family_file, tmp_path):
    options = 'slots = 1\nmax_queue = 7\nhost_bytes = "1GB"\ndtype = "bfloat16"'
    config = changed(
        family_file,
        tmp_path,
        ("[base]", f'[engine]\n{options}\n[base]\nname = "foundation"'),
        ('fallback = "base"', 'fallback = "foundation"'),
    )
    with engine_from_family(config) as engine:
        assert engine.names == ["foundation", "math", "code"]
        assert (engine.max_queue, engine.store.slot_count, engine.store.host.budget) == (7, 1, 10**9)
        assert str(engine.model.dtype) == "torch.bfloat16"


def test_the_router_reads_with_the_engines_weights_and_scores_the_same(family_file, engine):
    config = Family.load(family_file)
    shared, loaded = router_from_family(config, engine), router_from_family(config)
    ours = {parameter.data_ptr() for parameter in engine.model.parameters()}
    assert {parameter.data_ptr() for parameter in shared.encoder.model.parameters()} <= ours
    queries = [*QUESTIONS.values(), "hello"]
    assert [route.scores for route in shared.route_batch(queries)] == [
        pytest.approx(route.scores) for route in loaded.route_batch(queries)
    ]


def test_the_family_decides_threshold_and_fallback(family_file, tmp_path):
    config = changed(family_file, tmp_path, ('fallback = "base"', 'fallback = "code"\nthreshold = 1.0'))
    router = router_from_family(config)
    assert router.route("hello").choice == "code"
    assert router.route(QUESTIONS["math"]).reason == "abstained"


def test_a_missing_router_costs_auto_alone(family_file, router_directory, engine, tmp_path, caplog):
    unsaid = ('description = "all about math"\n', "")
    config = changed(family_file, tmp_path, (str(router_directory), "no-router"), unsaid)
    with pytest.raises(RouterError, match="meswitch router train"):
        router_from_family(config)
    auto, problem = policy_from_family(config, engine)
    assert "experts are told apart" not in caplog.text
    assert "meswitch router train" in problem
    assert str(tmp_path) in problem
    assert not auto.has_router
    told = auto.unknown("auto").message
    assert "meswitch router train" in told
    assert str(tmp_path) not in told


def test_a_family_without_a_router_serves_auto_by_its_descriptions(family_file, router_directory, engine, tmp_path):
    config = changed(family_file, tmp_path, (str(router_directory), "no-router"))
    _, problem = policy_from_family(config, engine)
    assert problem is None
    assert set(router_from_family(config, engine).route("hello").scores) == {"math", "code", "other"}


def test_a_base_without_sdpa_is_read_beside_the_engine(family, tmp_path):
    base, expert = make_pair(tmp_path, family / "base", "gemma2", dtype=torch.float32)
    compress(base, expert, tmp_path / "delta")
    lines = 'description = "Mathematics."\nexamples = ["What is 3 + 4?", "Halve 18.", "Is 7 a prime?"]'
    file = tmp_path / "family.toml"
    file.write_text(f'[base]\npath = "base"\n[[expert]]\nname = "math"\ndelta = "delta"\n{lines}\n')
    config = Family.load(file)
    alone = router_from_family(config).route("What is 17 + 25?")
    with engine_from_family(config) as engine:
        auto, problem = policy_from_family(config, engine)
        assert problem is None
        assert auto.has_router
        beside = router_from_family(config, engine).route("What is 17 + 25?")
    assert beside.scores == pytest.approx(alone.scores, abs=1e-5)


def test_experts_with_a_description_alone_are_named(family_file, router_directory, engine, tmp_path, caplog):
    config = changed(family_file, tmp_path, (str(router_directory), "none/here"))
    policy_from_family(config, engine)
    bare = [expert.name for expert in config.expert if not expert.examples]
    assert f"(of {', '.join(bare)} a description alone" in caplog.text


def test_a_router_of_other_experts_costs_auto_alone(family_file, engine, tmp_path):
    config = changed(family_file, tmp_path, ('name = "code"', 'name = "python"'))
    _, problem = policy_from_family(config, engine)
    assert "does not know python" in problem


def start(*arguments, **environment):
    command = [sys.executable, "-c", SERVE, *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_serve_prints_where_it_listens_answers_and_stops_on_a_signal(family_file):
    process = start(family_file, "--port", 0, "--slots", 1, "--json", MESWITCH_API_KEY="k")
    try:
        summary = json.loads(process.stdout.readline())
        assert summary["slots"] == 1
        assert [expert["name"] for expert in summary["experts"]] == ["math", "code"]
        assert all(expert["bytes"] > 100_000 for expert in summary["experts"])
        assert (summary["auto"], summary["api_key"]) == (True, True)
        client = ask_with(summary["url"].removesuffix("/v1"), "k")
        answer = client.chat.completions.create(model="auto", messages=user(QUESTIONS["math"]))
        assert (answer.model, answer.choices[0].message.content[-6:]) == ("math", "#### 2")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(family_file):
    from meswitch.cli import app

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", str(family_file), "--port", str(port)])
    assert result.exit_code == 1
    assert re.search(f"--port {port}: .*choose another", " ".join(result.output.split()))


@pytest.mark.parametrize(
    ("device", "installed", "says"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_a_faster_engine_is_named_where_it_is_there(monkeypatch, device, installed, says):
    import importlib.util

    from meswitch.cli.serve import _faster

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert bool(_faster(device)) == says
