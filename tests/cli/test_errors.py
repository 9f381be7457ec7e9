"""What goes wrong is said in one line that names the file, the field and the fix; and help costs no torch."""

import subprocess
import sys

import pytest

from meswitch import __version__
from meswitch.errors import ArtifactError

COMMANDS = [
    "chat",
    "compress",
    "diff",
    "eval",
    "extract-lora",
    "generate",
    "inspect",
    "merge",
    "route",
    "router",
    "serve",
    "verify",
]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inspect {tmp}", "{tmp}/meswitch.json: no such file"),
        ("inspect {family}/math", "this is a full checkpoint, compress it first"),
        ("verify {tmp}/x.partial", "{tmp}/x.partial: an unfinished compression"),
        ("diff --base ./nowhere --expert {family}/math", "./nowhere: no such directory"),
        (
            "merge --base {family}/code --delta {math} --out {tmp}/m",
            "against which {math} was compressed; use that base",
        ),
        ("merge --base {family}/base --delta {math} --out {tmp}", "{tmp}: already exists; choose another --out"),
        ("compress --base {family}/base", "--expert, --out: needed beside the others, or give a family.toml"),
        ("compress --base {family}/base --expert a --expert b --out {tmp}/o", "--expert: one at a time"),
        ("compress {pair} --out {math}", "{math}: already exists; use --overwrite to replace it"),
        ("compress {pair} --out {tmp}/o --group-size many", "--group-size: 'many' is neither a number nor `row`"),
        ("compress {pair} --out {tmp}/o --group-size 4", "group_size must be at least 8"),
        ("compress {pair} --out {tmp}/o --device tpu", "--device: 'tpu' is neither cpu nor cuda"),
        ("compress {pair} --out {tmp}/o --calibration {tmp}/no.txt", "{tmp}/no.txt: no such calibration file"),
        ("compress --family {tmp}/no.toml", "{tmp}/no.toml: no such file; give a family.toml"),
        ("compress --family {ready} --bits 3", "--bits: {ready} says this for its experts; change it there"),
        ("compress --family {ready} --calibration x.txt", "--calibration: {ready} names each expert's text"),
        ("compress --family {ready} --expert bob", "no expert 'bob'; this family has math, code, instruct, sql"),
        (
            "generate --family {ready} --model bob hello",
            "--model: no expert 'bob'; there are base, math, code, instruct, sql, auto",
        ),
        ("generate --family {ready} --top-p 0 hello", "top_p: 0.0 is out of range"),
        ("chat --family {ready} --model bob", "no expert 'bob'"),
        ("serve {ready} --allow-origin https://a.example/", "--allow-origin: 'https://a.example/' is no origin"),
    ],
)
def test_errors_are_one_line_with_exit_code_1(cli, family, math_delta, ready_family, tmp_path, command, message):
    pair = f"--base {family}/base --expert {family}/math"
    places = {"tmp": tmp_path, "family": family, "math": math_delta, "ready": ready_family, "pair": pair}
    assert message.format(**places) in cli.error(*command.format(**places).split())


def test_a_choice_that_is_none_is_told_with_the_choices(cli, family, tmp_path):
    result = cli("quantize", "--base", family / "base", "--to", "int3", "--out", tmp_path / "q")
    assert result.exit_code == 2
    assert "Invalid value for '--to': 'int3' is not one of 'int8', 'fp8', 'int4'." in result.stderr


def test_every_wrong_field_of_a_family_gets_its_line(cli, tmp_path):
    (tmp_path / "family.toml").write_text('[base]\npath = "b"\n[compress]\nbits = 9\n[engine]\nslotz = 4\n')
    result = cli("compress", "--family", tmp_path)
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert f"error: {tmp_path}/family.toml: compress.bits: Input should be less than or equal to 4 (got 9)" in lines
    assert f"error: {tmp_path}/family.toml: engine.slotz: no such field; did you mean slots?" in lines[1]


def test_a_family_without_a_router_says_how_to_train_one(cli, new_family):
    assert "meswitch router train" in cli.error("generate", "--family", new_family("math"), "hello")


def test_an_expert_that_is_not_compressed_says_how(cli, new_family):
    line = cli.error("generate", "--family", new_family("math"), "--model", "math", "hello")
    assert "family.toml: expert 'math': delta: " in line
    assert "no such artifact; make it with `meswitch compress --family" in line


def test_a_file_that_cannot_be_written_is_named(cli, family, tmp_path):
    (tmp_path / "file").write_text("")
    pair = ("--base", family / "base", "--expert", family / "math")
    assert str(tmp_path / "file") in cli.error("diff", *pair, "--png", tmp_path / "file" / "x.png")


def test_debugging_shows_the_traceback(cli, tmp_path):
    result = cli("inspect", tmp_path, MESWITCH_DEBUG="1")
    assert isinstance(result.exception, ArtifactError)


def test_version(cli):
    assert cli.ok("--version").stdout == f"meswitch {__version__}\n"


def test_a_wrong_option_is_exit_code_2(cli):
    assert cli("compress", "--bits", "9").exit_code == 2
    assert cli("nonsense").exit_code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example(cli, command):
    text = cli.ok(command, "--help").stdout
    assert f"meswitch {command} " in text


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from meswitch.cli import app\n"
        f"for args in [[], *([c] for c in {COMMANDS}), ['router', 'train']]:\n"
        "    result = CliRunner().invoke(app, [*args, '--help'])\n"
        "    assert result.exit_code == 0, (args, result.output)\n"
        "    if not args: print(result.stdout)\n"
        "heavy = 'torch transformers accelerate fastapi uvicorn matplotlib numpy'.split()\n"
        "print('imported:', [name for name in heavy if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "imported: []" in result.stdout
    for command in COMMANDS:
        assert f"│ {command} " in result.stdout
