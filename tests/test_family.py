"""`family.toml`: what is valid, and errors that name the field."""

import pytest

from meswitch.errors import ConfigError, UnknownExpertError
from meswitch.family import Family

MINIMAL = '[base]\npath = "b"\n[[expert]]\nname = "math"\ndelta = "d/math"\n'


def load(tmp_path, text):
    (tmp_path / "family.toml").write_text(text)
    return Family.load(tmp_path / "family.toml")


def test_the_example_family_is_valid_and_its_paths_exist(family):
    example = Family.load(family)
    assert example.names == ["math", "code", "instruct", "sql"]
    for section in example.expert:
        assert example.resolve(section.calibration).is_file()
        assert (example.resolve(section.source) / "model.safetensors").is_file()


def test_a_minimal_file_has_sensible_defaults(tmp_path):
    found = load(tmp_path, MINIMAL)
    assert (found.base.name, found.compress.bits, found.compress.group_size, found.router.fallback) == (
        "base",
        2,
        128,
        "base",
    )
    assert found.deltas() == {"math": tmp_path / "d" / "math"}
    assert found.resolve_model("org/name") == "org/name"


def test_a_directory_stands_for_the_file_in_it(tmp_path):
    load(tmp_path, MINIMAL)
    assert Family.load(tmp_path).names == ["math"]


def test_sizes_may_be_written_with_units(tmp_path):
    assert load(tmp_path, MINIMAL + '[engine]\nhost_bytes = "2GiB"\n').engine.host_bytes == 2 << 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "[engine]\nslots = 0\n", r"engine\.slots: .*greater than or equal to 1.*\(got 0\)"),
        (
            MINIMAL + "[engine]\nslot = 4\n",
            r"engine\.slot: no such field; did you mean slots\? all .* docs/use/family\.md",
        ),
        (MINIMAL.replace("[[expert]]", "[[experts]]"), r"experts: no such field; did you mean expert\?"),
        (MINIMAL + "[router]\nzebra = 1\n", r"router\.zebra: no such field; all fields are in docs/use/family\.md"),
        (MINIMAL + "[compress]\nbits = 5\n", r"compress\.bits: "),
        (MINIMAL + '[server]\nallow_origins = ["https://a.example/"]\n', r"server\.allow_origins\.0: "),
        (MINIMAL + '[server]\nallow_origins = ["a.example"]\n', r"server\.allow_origins\.0: "),
        (
            MINIMAL + '[compress]\ngroup_size = "column"\n',
            r"compress\.group_size: 'column' is neither a number nor 'row'",
        ),
        (MINIMAL + '[engine]\nhost_bytes = "lots"\n', r"engine\.host_bytes: 'lots' is not a size"),
        (MINIMAL + '[router]\nfallback = "poetry"\n', r"router\.fallback: 'poetry' is none of base, math"),
        (MINIMAL + MINIMAL.partition("\n")[2].partition("\n")[2], "expert.name: 'math' is used twice"),
        (MINIMAL.replace("math", "auto"), "expert.name: 'auto' is reserved"),
        (MINIMAL.replace("math", "other"), "expert.name: 'other' is reserved"),
        (MINIMAL.replace('"math"', '"a b"'), r"expert\.0\.name: 'a b': letters, digits"),
        (MINIMAL.replace('delta = "d/math"\n', ""), r"expert\.0\.delta: this field is required"),
        ("[base\n", "not valid TOML"),
        ("", "base: this field is required"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=rf"family\.toml: .*{message}|{message}"):
        load(tmp_path, text)


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    text = MINIMAL.replace("path", "pth") + '[engine]\nhost_bytes = "lots"\nslots = "many"\n[server]\nport = 80000\n'
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    named = [line.split(": ")[1] for line in str(raised.value).splitlines()]
    assert sorted(named) == ["base.path", "base.pth", "engine.host_bytes", "engine.slots", "server.port"]


def test_a_missing_file_and_an_unknown_expert_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"family\.toml: no such file"):
        Family.load(tmp_path)
    with pytest.raises(UnknownExpertError, match="no expert 'poetry'; this family has math"):
        load(tmp_path, MINIMAL).get("poetry")
