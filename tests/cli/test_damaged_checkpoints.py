"""Whatever command is given a damaged or foreign checkpoint says so in one line, before any work."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import edit_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14483464192\n"
COMMANDS = {
    "compress": "compress --base {base} --expert {bad} --out {tmp}/out --calibration none",
    "compress against it": "compress --base {bad} --expert {math} --out {tmp}/out --calibration none",
    "diff": "diff --base {base} --expert {bad}",
    "plan": "plan --base {bad}",
    "merge": "merge --base {bad} --delta {delta} --out {tmp}/out",
    "verify": "verify {delta} --base {bad}",
    "generate": "generate --family {tmp}/family.toml --model base --max-tokens 1 hello",
    "serve": "serve {tmp}/family.toml --port 0",
}
OF_CONFIG = [name for name in COMMANDS if name not in ("merge", "verify")]  # which need the base's tensors alone
OF_WEIGHTS = [name for name in COMMANDS if name != "plan"]  # which needs the configuration alone


def pointer(directory):
    (directory / "model.safetensors").write_text(POINTER)


def cut(directory):
    file = directory / "config.json"
    file.write_text(file.read_text()[:100])


def pickled(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def unknown(directory):
    edit_config(directory, model_type="llama9000")


def own_code(directory):
    (directory / "modeling_x.py").write_text("raise SystemExit('code was run')")
    edit_config(directory, model_type="x", auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})


def index(directory):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {')


def trainer(directory):
    inner = directory / "checkpoint-100"
    inner.mkdir()
    for file in [*directory.glob("*.json"), *directory.glob("*.safetensors")]:
        shutil.move(file, inner / file.name)


@pytest.fixture
def bad(family, tmp_path, math_delta):
    """`bad(damage)` gives the places that commands name; the base of the family is the damaged checkpoint."""

    def make(damage):
        shutil.copytree(family / "base", tmp_path / "bad")
        damage(tmp_path / "bad")
        (tmp_path / "family.toml").write_text(
            f'[base]\npath = "{tmp_path}/bad"\n[[expert]]\nname = "math"\ndelta = "{math_delta}"\n'
        )
        return {"base": family / "base", "math": family / "math", "delta": math_delta, "tmp": tmp_path,
                "bad": tmp_path / "bad"}  # fmt: skip

    return make


@pytest.mark.parametrize("command", OF_CONFIG)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unknown, "bad/config.json: model_type: 'llama9000' is none that transformers"),
        (own_code, "bad/config.json: auto_map: 'x' is code of the checkpoint's own"),
    ],
)
def test_a_model_that_transformers_lacks_is_told_by_every_command_that_runs_it(cli, bad, command, damage, message):
    assert message in cli.error(*COMMANDS[command].format(**bad(damage)).split())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "bad/config.json: is cut off after 100 bytes"), (trainer, "bad/checkpoint-100, or the best")],
)
def test_a_directory_that_is_no_model_is_told_by_every_command(cli, bad, command, damage, message):
    assert message in cli.error(*COMMANDS[command].format(**bad(damage)).split())


@pytest.mark.parametrize("command", OF_WEIGHTS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pointer, "bad/model.safetensors: is a Git LFS pointer"),
        (pickled, "bad: no model.safetensors, but weights as a pickle"),
        (index, "bad/model.safetensors.index.json: is cut off after 16 bytes"),
    ],
)
def test_weights_that_cannot_be_read_are_told_by_every_command_that_reads_them(cli, bad, command, damage, message):
    assert message in cli.error(*COMMANDS[command].format(**bad(damage)).split())
