"""A configuration that cannot be used is told in one line, and no code of a repository is run or offered to be."""

import builtins
import json

import pytest

from meswitch.architecture import architecture_of
from meswitch.configuration import read_config
from meswitch.errors import CheckpointError
from tests.support.models import edit_config


@pytest.fixture
def model(pair):
    return pair()[1]


def refused(source) -> str:
    with pytest.raises(CheckpointError) as raised:
        read_config(source)
    line = str(raised.value)
    assert "\n" not in line
    return line


def test_a_directory_and_a_file_say_the_same(model, tmp_path):
    (tmp_path / "other.json").write_text((model / "config.json").read_text())
    of_both = [read_config(source).to_dict() for source in (model, tmp_path / "other.json")]
    assert [fields.pop("_name_or_path") for fields in of_both] == [str(model), str(tmp_path / "other.json")]
    assert of_both[0] == of_both[1]


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
def test_an_attention_that_is_not_installed_is_no_obstacle(model, field):
    edit_config(model, **{field: "flash_attention_2"})
    assert architecture_of(read_config(model)).parts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama9000"}, "model_type: 'llama9000' is none that transformers 5"),
        ({"model_type": None}, "model_type: missing: this is no model's configuration"),
        ({"model_type": ["llama"]}, "model_type: ['llama'] is none that transformers"),
        ({"hidden_size": "large"}, "does not take it as 'mistral': "),
        ({"num_hidden_layers": None, "rope_parameters": 3}, "does not take it as 'mistral': "),
    ],
)
def test_what_is_wrong_is_named(model, fields, message):
    edit_config(model, **fields)
    line = refused(model)
    assert line.startswith(f"{model / 'config.json'}: ")
    assert message in line


def test_custom_code_is_neither_run_nor_offered(model, monkeypatch):
    def asked(*args):
        raise AssertionError("a prompt")

    monkeypatch.setattr(builtins, "input", asked)
    (model / "configuration_x.py").write_text("raise SystemExit('code was run')")
    edit_config(model, model_type="x", auto_map={"AutoConfig": "configuration_x.XConfig"})
    assert "auto_map: 'x' is code of the checkpoint's own (configuration_x.XConfig), which meswitch does not run" in (
        refused(model)
    )


def test_a_type_that_transformers_has_needs_no_custom_code(model, monkeypatch):
    (model / "configuration_x.py").write_text("raise SystemExit('code was run')")
    edit_config(model, auto_map={"AutoConfig": "configuration_x.XConfig"})
    assert type(read_config(model)).__name__ == "MistralConfig"


def test_an_adapters_configuration_is_no_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "this is an adapter's configuration" in refused(tmp_path)


def test_a_directory_without_one_says_so(tmp_path):
    assert refused(tmp_path) == f"{tmp_path / 'config.json'}: no such file; a checkpoint needs its configuration"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 0}, "transformers cannot lay out a MistralForCausalLM from it"),
        (
            {"pad_token_id": 9000},
            "transformers cannot lay out a MistralForCausalLM from it: pad_token_id: 9000 is ",
        ),
        ({"model_type": "vit"}, "model_type: 'vit': transformers"),
    ],
)
def test_a_model_that_cannot_be_laid_out_is_named_by_its_file(model, fields, message):
    edit_config(model, **fields)
    with pytest.raises(CheckpointError) as raised:
        architecture_of(read_config(model))
    assert str(raised.value).startswith(f"{model}/config.json: {message}")
