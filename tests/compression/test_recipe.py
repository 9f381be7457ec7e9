"""An artifact says how it was made, and the same can be done again."""

import json
from pathlib import Path

import pytest

import meswitch
from meswitch.artifact.manifest import Manifest
from meswitch.compression.options import Options, Solver, TrainingRecipe, read_recipe, recipe_of
from meswitch.compression.text import TextSource
from meswitch.errors import ConfigError
from tests.support.command_line import Cli


@pytest.fixture(scope="module")
def first(family, tmp_path_factory) -> Path:
    """An artifact with many options away from their defaults."""
    out = tmp_path_factory.mktemp("recipe") / "first"
    text = family / "calibration" / "math.jsonl"
    meswitch.compress(
        family / "base", family / "math", out, bits=3, salient=2, group_size=None, calibration=text,
        calibration_tokens=2048, distill=2, embeddings="exact",
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def plain(family, tmp_path_factory) -> str:
    """The manifest of an artifact that is all at defaults."""
    out = tmp_path_factory.mktemp("recipe") / "plain"
    return (meswitch.compress(family / "base", family / "math", out).directory / "meswitch.json").read_text()


@pytest.fixture(scope="module")
def cli() -> Cli:
    return Cli()


def stored(artifact: Path) -> dict[str, str]:
    tensors = json.loads((artifact / "meswitch.json").read_text())["tensors"]
    return {name: json.dumps(entry["stored"]) for name, entry in tensors.items()}


def again(cli, family, first, out, *options):
    pair = ("--base", family / "base", "--expert", family / "math")
    return cli.ok("compress", *pair, "--out", out, "--recipe", first, *options)


def test_the_recipe_alone_makes_the_same_bytes(cli, family, first, tmp_path, monkeypatch):
    monkeypatch.chdir(family / "calibration")  # the file's name is kept, not where it was
    again(cli, family, first, tmp_path / "second")
    assert stored(tmp_path / "second") == stored(first)
    assert read_recipe(tmp_path / "second").options == read_recipe(first).options


def test_an_option_beside_it_counts_instead(cli, family, first, tmp_path):
    text = family / "calibration" / "code.jsonl"
    result = again(cli, family, first, tmp_path / "other", "--bits", 1, "--calibration", text, "--distill", 0)
    method = meswitch.Artifact.open(tmp_path / "other").manifest.method
    assert (method.bits, method.salient, method.group_size, method.embeddings) == (1, 2, None, "exact")
    assert method.distillation is None
    assert f"{text}: is not the text that {first}/meswitch.json was calibrated on" in result.stderr


def test_calibration_text_that_is_not_here_is_asked_for(cli, family, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = ("--base", family / "base", "--expert", family / "math", "--out", tmp_path / "none")
    error = cli.error("compress", *pair, "--recipe", first)
    assert error == f"{first}/meswitch.json: recipe: calibration: math.jsonl is not here; give --calibration FILE"


def test_no_path_of_a_machine_is_in_it(first, family):
    assert str(family) not in (first / "meswitch.json").read_text()


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(bits="exact"),
        Options(target_bpw=2.25, embeddings="exact"),
        Options(group_size=None, salient=0),
        Options(calibration="self:questions.txt", calibration_tokens=99, distill=7, distill_scope="block"),
        Options(calibration=TextSource(text=Path("self"), own=True)),
        Options(calibration="text.txt", distill=TrainingRecipe(steps=3, betas=(0.5, 0.9), length=64)),
        Options(solver=Solver(salient_rule="random", refit=False), calibration="text.txt"),
        Options(method="svd", parameters={"rank": 4.0}),
    ],
)
def test_every_option_comes_back_as_it_was(options, plain, tmp_path):
    recipe = recipe_of(options, "org/base", tmp_path)
    data = json.loads(plain) | {"recipe": {"options": recipe.options, "base": recipe.base}}
    (tmp_path / "meswitch.json").write_text(json.dumps(data))
    found = read_recipe(tmp_path)
    assert (found.base, found.expert, recipe.expert) == ("org/base", None, None)
    back = Options(**found.options)
    assert back.source == options.source
    differing = {name for name in options.given() | back.given() if getattr(back, name) != getattr(options, name)}
    assert differing <= {"calibration"}  # a text and the source that it names


def test_options_can_be_in_a_file_of_ones_own(tmp_path):
    (tmp_path / "two.toml").write_text('bits = 2\ngroup_size = "row"\ncalibration = "mine.txt"\ndistill = 50\n')
    expected = {"bits": 2, "group_size": None, "calibration": str(tmp_path / "mine.txt"), "distill": 50}
    assert read_recipe(tmp_path / "two.toml").options == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bites = 2", "recipe: bites: no such option; there are bits, target_bpw"),
        ('bits = "many"', "recipe: bits: 'many' is not a value that it takes"),
        ('embeddings = "gone"', "recipe: embeddings: 'gone' is not a value"),
        ("bits = [1]", r"bits: \[1\] is neither a text nor a number"),
        ("bits", "not valid TOML"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_its_field(tmp_path, text, message):
    (tmp_path / "two.toml").write_text(text)
    with pytest.raises(ConfigError, match=f"two.toml: {message}"):
        read_recipe(tmp_path / "two.toml")


def test_what_has_no_recipe_is_refused(plain, tmp_path):
    with pytest.raises(ConfigError, match="no such file; give an artifact's directory"):
        read_recipe(tmp_path / "nowhere")
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"--recipe: .*rows.jsonl: give an artifact's directory or a TOML file"):
        read_recipe(tmp_path / "rows.jsonl")
    data = json.loads(plain)
    del data["recipe"]
    (tmp_path / "meswitch.json").write_text(json.dumps(data | {"version": 3}))
    assert Manifest.from_json((tmp_path / "meswitch.json").read_text(), tmp_path).recipe is None  # still read
    with pytest.raises(ConfigError, match="recipe: there is none, because an earlier version wrote it"):
        read_recipe(tmp_path)
