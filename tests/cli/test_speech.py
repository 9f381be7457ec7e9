"""What an expert speaks with is opened when it is compressed and when it is verified, not first when it is served."""

import hashlib
import json
import shutil

import pytest

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14483464192\n"
DAMAGE = {
    "tokenizer.json": (POINTER, "is a Git LFS pointer"),
    "tokenizer_config.json": ("{", "is cut off"),
    "generation_config.json": ("", "is empty"),
    "chat_template.jinja": ("{% for m in messages %}{{ m.content }}", "line 1 of the chat template: Unexpected end"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_before_any_work(cli, family, tmp_path, name):
    text, reason = DAMAGE[name]
    expert = shutil.copytree(family / "sql", tmp_path / "sql")
    (expert / name).write_text(text)
    said = cli.error("compress", "--base", family / "base", "--expert", expert, "--out", tmp_path / "out")
    assert said.startswith(f"{expert / name}: {reason}")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_opens_them_again(cli, family, math_delta, tmp_path, name):
    """The files are what was written, by a version that did not look."""
    text, reason = DAMAGE[name]
    copy = shutil.copytree(math_delta, tmp_path / "math")
    (copy / name).write_text(text)
    manifest = json.loads((copy / "meswitch.json").read_text())
    manifest["companions"][name] = hashlib.sha256(text.encode()).hexdigest()
    (copy / "meswitch.json").write_text(json.dumps(manifest))
    assert f"{copy / name}: {reason}" in cli.error("verify", copy)


def test_verify_says_what_it_opened(cli, math_delta):
    assert cli.json("verify", math_delta)["tokenizer"] == {"tokens": 2048, "chat_template": True, "ends": ["<|end|>"]}
    line = "  tokenizer    opened; its chat template shows a user's message; answers end at <|end|>"
    assert line in cli.ok("verify", math_delta).stdout.splitlines()


def test_an_expert_without_a_tokenizer_can_be_compressed_and_this_is_said(cli, family, tmp_path):
    expert = shutil.copytree(family / "sql", tmp_path / "sql")
    (expert / "tokenizer.json").unlink()
    done = cli.ok("compress", "--base", family / "base", "--expert", expert, "--out", tmp_path / "out")
    assert f"{expert} has no tokenizer's files: what is made can be merged, not served" in done.stderr
    assert "none: the artifact can be merged, not served" in cli.ok("verify", tmp_path / "out").stdout
