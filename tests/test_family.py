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


def test_a_base_of_another_name_is_the_fallback(tmp_path):
    text = MINIMAL.replace("path =", 'name = "mistral"\npath =', 1)
    assert load(tmp_path, text).router.fallback == "mistral"
    assert load(tmp_path, text + "[router]\nthreshold = 0.5\n").router.fallback == "mistral"
    assert load(tmp_path, text + '[router]\nfallback = "math"\n').router.fallback == "math"
    with pytest.raises(ConfigError, match=r"router\.fallback: 'base' is none of mistral, math, error"):
        load(tmp_path, text + '[router]\nfallback = "base"\n')


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
        (MINIMAL + 'examples = "one"\n', r"expert 'math': examples: 'one' is not a list"),
        (MINIMAL + '[engine]\ndevice = "gpu"\n', r"engine\.device: 'gpu' is none of auto, cpu, cuda, cuda:1"),
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
        (MINIMAL.replace('"math"', '"a b"'), r"expert 'a b': name: 'a b': letters, digits"),
        (MINIMAL.replace('delta = "d/math"\n', ""), r"expert 'math': delta: this field is required"),
        (MINIMAL + 'sorce = "x"\n', r"expert 'math': sorce: no such field; did you mean source\?"),
        (MINIMAL + '[[expert]]\ndelta = "d"\n', r"expert number 2: name: this field is required"),
        (MINIMAL + 'examples = ["a", ""]\n', r"expert 'math': examples\.1: "),
        ('expert = ["math"]\n[base]\npath = "b"\n', r"expert number 1: Input should be"),
        (MINIMAL.replace("[[expert]]", "[expert]"), r"expert: is one table; write \[\[expert\]\] above each"),
        ('directory = "d"\n' + MINIMAL, "directory: no such field; paths are relative to the file"),
        ('expert = "math"\n[base]\npath = "b"\n', r"expert: 'math' is not a list"),
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


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "../a/b", "/nowhere/b", "a/b/c"])
def test_a_model_that_is_no_directory_and_no_hub_id_is_refused_by_field(tmp_path, source):
    file = tmp_path / "family.toml"
    found = load(tmp_path, MINIMAL.replace('"b"', f'"{source}"') + f'source = "{source}"\n')
    where = (tmp_path / source).resolve()
    with pytest.raises(ConfigError) as raised:
        found.base_source()
    assert str(raised.value).startswith(f"{file}: base.path: {where}: no such directory; give a checkpoint's directory")
    with pytest.raises(ConfigError) as raised:
        found.source_of(found.get("math"))
    assert str(raised.value).startswith(f"{file}: expert 'math': source: {where}: no such directory")


def test_a_hub_that_does_not_give_a_model_is_refused_by_field(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = load(tmp_path, MINIMAL.replace('"b"', '"org/absent"'))
    with pytest.raises(ConfigError, match=r"family\.toml: base\.path: org/absent: .* the hub cannot be reached"):
        found.base_source()


def test_a_directory_beside_the_file_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load(tmp_path, MINIMAL.replace('"b"', '"org/name"')).base_source() == str(tmp_path / "org" / "name")


def test_an_expert_without_a_source_is_named(tmp_path):
    found = load(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match=r"family\.toml: expert 'math': source: is missing; name the full fine-tune"):
        found.source_of(found.get("math"))
