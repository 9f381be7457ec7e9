"""`meswitch serve --engine vllm`: vLLM's own server, the family's experts as models, `auto`, loading at run time."""

import itertools
import json
import shlex
import shutil
import sys

import pytest
from safetensors.torch import load_file

from meswitch import Family, compress
from meswitch.errors import ArtifactError, IncompatibleError
from meswitch.router import Encoder, Row, train_router
from meswitch.vllm.command import command
from tests.support.adapters import pairs, write_adapter
from tests.support.vllm_engines import EXPERTS, PROMPT
from tests.support.vllm_http import ask, completion, free_port, serving

SERVE = "import typer; from meswitch.cli.serve import serve_command; typer.run(serve_command)"
SERVED = ("math", "code")


@pytest.fixture(scope="module")
def family_file(family, deltas, tmp_path_factory):
    """math and code, with a router of 120 real queries."""
    rows: dict[str, list[Row]] = {name: [] for name in (*SERVED, "other")}
    for line in (family / "routing.jsonl").read_text().splitlines():
        data = json.loads(line)
        domain = data["domain"] if data["domain"] in SERVED else "other"
        if len(rows[domain]) < 40:
            rows[domain].append(Row(data["query"], domain))
    directory = tmp_path_factory.mktemp("vllm-family")
    router = train_router([row for some in rows.values() for row in some], SERVED, Encoder.load(family / "base"))
    router.save(directory / "router")
    text = f'[base]\npath = "{family / "base"}"\n[router]\npath = "router"\n[engine]\nslots = 2\ndtype = "float32"\n'
    for name in SERVED:
        text += f'[[expert]]\nname = "{name}"\ndelta = "{deltas[name]}"\n'
    (directory / "family.toml").write_text(text)
    return directory / "family.toml"


def test_an_adapter_is_served_by_vllm_s_own_lora_beside_deltas(family, deltas, tmp_path):
    tensors = pairs(family / "base", "q_proj", rank=12)
    adapter = write_adapter(tmp_path / "poet", tensors, target_modules=["q_proj"], r=12)
    text = f'[base]\npath = "{family / "base"}"\n'
    for name, delta in (("math", deltas["math"]), ("poet", adapter)):
        text += f'[[expert]]\nname = "{name}"\ndelta = "{delta}"\n'
    (tmp_path / "family.toml").write_text(text)
    arguments = command(Family.load(tmp_path), "127.0.0.1", 8123, 2)
    line = shlex.join(arguments)
    assert f"--lora-modules math={deltas['math']} poet={adapter} --max-lora-rank 16" in line
    settings = json.loads(arguments[arguments.index("--additional-config") + 1])["meswitch"]
    assert (settings["experts"], settings["lora"]) == ([str(deltas["math"])], True)
    tensors |= {"model.norm.weight": load_file(family / "base" / "model.safetensors")["model.norm.weight"]}
    write_adapter(adapter, tensors, target_modules=["q_proj"], r=12, modules_to_save=["norm"])
    with pytest.raises(IncompatibleError, match=r"poet: model\.norm\.weight: vLLM serves low-rank pairs only"):
        command(Family.load(tmp_path), "127.0.0.1", 8123, 2)


def test_a_template_with_tools_switches_their_parser_on(family, tmp_path):
    for name in ("base", "math"):
        shutil.copytree(family / name, tmp_path / name)
        text = "{% if tools %}<tool_call>{% endif %}{{ messages }}"
        (tmp_path / name / "chat_template.jinja").write_text(text)
    compress(tmp_path / "base", tmp_path / "math", tmp_path / "delta")
    (tmp_path / "family.toml").write_text('[base]\npath = "base"\n[[expert]]\nname = "math"\ndelta = "delta"\n')
    arguments = command(Family.load(tmp_path), "127.0.0.1", 8123, 2)
    assert arguments[arguments.index("--enable-auto-tool-choice") + 1 :][:2] == ["--tool-call-parser", "hermes"]


def test_the_command_line_of_a_family(family_file, family, deltas):
    arguments = command(Family.load(family_file), "127.0.0.1", 8123, 2)
    assert arguments[:2] == ["serve", str(family / "base")]
    line = shlex.join(arguments)
    assert f"--lora-modules math={deltas['math']} code={deltas['code']} --additional-config" in line
    assert "--worker-cls meswitch.vllm.DeltaWorker --enable-lora --max-loras 2 --max-cpu-loras 2" in line
    names = ("Conformance", "Prefetch", "AutoRouting")
    assert line.endswith(" ".join(f"--middleware meswitch.vllm.middleware.{name}" for name in names))
    options = dict(itertools.pairwise(arguments))
    assert json.loads(options["--override-generation-config"]) == {"temperature": 0.0}
    assert json.loads(options["--structured-outputs-config"])["disable_any_whitespace"]
    assert "--tool-call-parser" not in options  # the family's template knows no tools
    assert "--specialize-active-lora" in arguments
    settings = json.loads(arguments[arguments.index("--additional-config") + 1])
    assert settings == {"meswitch": {"experts": [str(deltas["math"]), str(deltas["code"])], "lora": False}}


def test_a_family_that_vllm_cannot_serve_is_refused(family_file, family, deltas, tmp_path):
    text = family_file.read_text().replace(str(deltas["code"]), str(tmp_path / "nowhere"))
    (tmp_path / "family.toml").write_text(text)
    with pytest.raises(ArtifactError, match=r"'code': .*no such artifact; make it with `meswitch compress"):
        command(Family.load(tmp_path), "127.0.0.1", 8123, 2)
    other = tmp_path / "code"
    other.mkdir()
    for file in deltas["code"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "chat_template.jinja").write_text("another")
    (tmp_path / "family.toml").write_text(family_file.read_text().replace(str(deltas["code"]), str(other)))
    with pytest.raises(IncompatibleError, match="one template for all models of a server"):
        command(Family.load(tmp_path), "127.0.0.1", 8123, 2)


@pytest.fixture(scope="module")
def url(family_file):
    port = free_port()
    arguments = [sys.executable, "-c", SERVE, str(family_file), "--engine", "vllm", "--port", str(port)]
    with serving(arguments, port) as address:
        yield address


@pytest.mark.vllm
def test_experts_are_models_of_vllms_server(url, expected):
    assert {model["id"] for model in ask(url, "/v1/models")[2]["data"]} == {"base", *SERVED}
    for name in ("math", "base", "code", "math"):
        status, _, answer = completion(url, name)
        assert (status, answer["model"]) == (200, name)
        assert tuple(answer["choices"][0]["token_ids"]) == expected[name, len(PROMPT)]


@pytest.mark.vllm
def test_auto_is_the_routers_choice(url):
    question = "Ravi shares 8 books equally among 4 friends. How many books does each friend get?"
    body = {"model": "auto", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 60}
    status, headers, answer = ask(url, "/v1/chat/completions", body)
    assert (status, headers["x-meswitch-expert"], answer["model"]) == (200, "math", "math")
    assert answer["choices"][0]["message"]["content"].endswith("#### 2")
    assert ask(url, "/v1/chat/completions", body | {"model": "nobody"})[0] == 404


@pytest.mark.vllm
def test_experts_come_and_go_at_run_time(url, deltas, expected):
    assert "sql" in EXPERTS
    status, _, problem = ask(url, "/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "/nowhere/sql"})
    assert status >= 400
    assert completion(url, "sql")[0] == 404
    status, _, problem = ask(url, "/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": str(deltas["sql"])})
    assert status == 200, problem
    assert tuple(completion(url, "sql")[2]["choices"][0]["token_ids"]) == expected["sql", len(PROMPT)]
    assert ask(url, "/v1/unload_lora_adapter", {"lora_name": "sql"})[0] == 200
    assert completion(url, "sql")[0] == 404
    assert tuple(completion(url, "math")[2]["choices"][0]["token_ids"]) == expected["math", len(PROMPT)]
