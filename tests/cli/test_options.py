"""An option is stated once: command line, family.toml, Python and the manifest have the same ones."""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import meswitch
from meswitch.cli.options import option_groups
from meswitch.codec import Spec
from meswitch.compression.options import SETTINGS, Options, Solver
from meswitch.errors import ConfigError
from meswitch.family import CompressSection, Family

# a value that is not the default, with what it needs beside it
OTHER = {
    "bits": {"bits": 3},
    "target_bpw": {"target_bpw": 2.5},
    "salient": {"salient": 7},
    "group_size": {"group_size": None},
    "embeddings": {"embeddings": "exact"},
}
OTHER_SOLVERS = {"damping": 0.1, "salient_rule": "random", "scales": "normal", "feedback": False, "refit": False}
OF_THE_TEXT = {"calibration", "calibration_tokens", "distill", "distill_scope"}  # recorded as what was used of them


def test_the_command_line_has_every_option_and_its_help():
    from meswitch.cli import app

    commands = get_command(app).commands
    found = {option.name: option.help for option in commands["compress"].params}
    assert {name: found[name] for name in SETTINGS} == {name: setting.help for name, setting in SETTINGS.items()}
    planned = {option.name: option.help for option in commands["plan"].params if option.name in SETTINGS}
    assert planned == {name: SETTINGS[name].help for name in ("bits", "salient", "group_size", "embeddings")}


def test_a_family_has_every_option_that_its_experts_can_share():
    assert list(CompressSection.model_fields) == [name for name, setting in SETTINGS.items() if setting.shared]
    assert Options(**CompressSection().given()) == Options()


def test_python_takes_every_option_by_name_or_all_in_one_object(family, tmp_path):
    assert list(inspect.signature(meswitch.Options).parameters) == [*SETTINGS, "method", "parameters", "solver"]
    one = meswitch.compress(family / "base", family / "math", tmp_path / "one", bits=3, salient=0)
    both = meswitch.compress(family / "base", family / "math", tmp_path / "both", meswitch.Options(bits=3, salient=0))
    assert one.manifest.method == both.manifest.method
    with pytest.raises(TypeError, match="bites"):
        meswitch.compress(family / "base", family / "math", tmp_path / "none", bites=3)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in OF_THE_TEXT])
def test_the_manifest_tells_every_option(name):
    values = OTHER[name]
    rest = {other: value for other, value in values.items() if other != name}
    assert Options(**values).describe(None) != Options(**rest).describe(None)


@pytest.mark.parametrize("name", OTHER_SOLVERS)
def test_the_manifest_tells_every_switch_of_the_solver(name):
    switched = Options(solver=Solver(**{name: OTHER_SOLVERS[name]}))
    assert switched.describe(None) != Options().describe(None)


def test_the_defaults_of_the_solver_are_those_of_the_codec():
    assert Options().spec("linear", 512) == Spec(salient=1)


@pytest.mark.parametrize("flag", ["--method", "--rank", "--drop", "--seed", "--damping", "--scales", "--no-feedback"])
def test_what_only_compares_is_not_on_the_command_line(cli, flag):
    assert cli("compress", flag, "1").exit_code == 2


@pytest.mark.parametrize("name", ["bits", "salient"])
def test_what_a_budget_chooses_is_not_given_beside_it(cli, family, tmp_path, name):
    message = f"{name}: target_bpw chooses this for every tensor; give one of the two"
    pair = ("--base", family / "base", "--expert", family / "math", "--out", tmp_path / "delta")
    assert cli.error("compress", *pair, "--target-bpw", 2.5, f"--{name}", 1) == message
    (tmp_path / "family.toml").write_text(f'[base]\npath = "b"\n[compress]\ntarget_bpw = 2.5\n{name} = 1\n')
    with pytest.raises(ConfigError, match=message):
        Family.load(tmp_path)


@pytest.mark.parametrize("value", ["0", "5", "2.5", "all"])
def test_bits_are_a_number_or_a_word(cli, family, tmp_path, value):
    pair = ("--base", family / "base", "--expert", family / "math", "--out", tmp_path / "delta")
    result = cli("compress", *pair, "--bits", value)
    assert result.exit_code == 2
    assert f"'{value}' is neither a number from 1 to 4 nor `exact`" in result.stderr


def test_what_is_written_beside_exact_bits_is_refused_even_at_its_default(cli, family, tmp_path):
    pair = ("--base", family / "base", "--expert", family / "math", "--out", tmp_path / "delta")
    found = cli.error("compress", *pair, "--bits", "exact", "--group-size", 128)
    assert found == "group_size: bits: exact: nothing is rounded, chosen or trained; leave group_size out"
    (tmp_path / "family.toml").write_text('[base]\npath = "b"\n[compress]\nbits = "exact"\nsalient = 2\n')
    with pytest.raises(ConfigError, match="salient: bits: exact: nothing is rounded"):
        Family.load(tmp_path)


# -- options that come from a dataclass -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A group of options."""

    width: Annotated[int, typer.Option(min=1, help="Of it.")]
    depth: Annotated[int, typer.Option(help="Of it.")] = 2


def test_a_command_takes_its_options_from_dataclasses():
    got = []
    app = typer.Typer()

    @app.command()
    @option_groups
    def build(name: Annotated[str, typer.Argument()], shape: Shape, loud: bool = False) -> None:
        got.append((name, shape, loud))

    run = CliRunner().invoke
    assert run(app, ["box", "--width", "3", "--loud"]).exit_code == 0
    assert got == [("box", Shape(3, 2), True)]
    assert "Missing option '--width'" in run(app, ["box"]).stderr
    assert run(app, ["box", "--width", "0"]).exit_code == 2


def test_no_command_is_a_function_of_ten_parameters_and_more():
    import meswitch.cli

    for file in Path(meswitch.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert len(node.args.args) + len(node.args.kwonlyargs) < 10, f"{file.name}: {node.name}"
