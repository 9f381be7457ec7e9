"""The model card: metadata that the hub reads, and the figures of the artifact and of an evaluation."""

import dataclasses
import json

import pytest
import yaml

import meswitch
from meswitch.artifact.manifest import Recipe
from meswitch.artifact.remote import About, model_card, read_quality
from meswitch.errors import ConfigError
from meswitch.evaluate import Settings, evaluate_family
from meswitch_lab.toy import task


@pytest.fixture(scope="module")
def artifact(math_delta):
    return meswitch.Artifact.open(math_delta)


@pytest.fixture(scope="module")
def quality(family, math_delta, tmp_path_factory):
    report = evaluate_family(
        family / "base", {"math": family / "math"}, {"math": math_delta}, tasks=[task("math", 20, 2)],
        settings=Settings(fidelity_n=4, max_new_tokens=56),
    )  # fmt: skip
    file = tmp_path_factory.mktemp("quality") / "eval.json"
    file.write_text(report.to_json())
    return file


def parts(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_hub_reads_base_licence_and_tags(artifact):
    about = About("me/math", base="org/base", license="apache-2.0", language=("en", "de"))
    head, body = parts(model_card(artifact, about))
    assert head == {
        "library_name": "meswitch",
        "pipeline_tag": "text-generation",
        "tags": ["meswitch", "delta-compression", "text-generation"],
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "language": ["en", "de"],
    }
    assert "meswitch merge --base org/base --delta math" in body
    assert 'delta = "hf://me/math"' in body


def test_no_value_can_end_the_metadata(artifact):
    about = About("me/math", license="other", license_name='mine"\n---\nevil: 1', license_link="https://x.example")
    head, _ = parts(model_card(artifact, about))
    assert head["license_name"] == 'mine"\n---\nevil: 1'
    assert "evil" not in head


def test_the_figures_are_the_artifacts(artifact):
    _, body = parts(model_card(artifact, About("me/math")))
    assert f"| bits per weight | {artifact.bits_per_weight:.3f}" in body
    assert f"| parameters | {artifact.manifest.expert.parameters:,} |" in body
    assert "me-switch: 2 bits, a scale for 128 weights" in body
    assert "Not measured." in body
    assert "Not stated. The licences of base and fine-tune apply to it." in body


def test_base_and_fine_tune_of_the_recipe_are_linked(artifact):
    recipe = Recipe({}, "org/base", "org/math")
    known = dataclasses.replace(artifact, manifest=dataclasses.replace(artifact.manifest, recipe=recipe))
    head, body = parts(model_card(known, About("me/math")))
    assert head["base_model"] == "org/base"
    assert "| fine-tune | [org/math](https://huggingface.co/org/math) |" in body


def test_what_eval_measured_is_a_table(artifact, quality):
    found = read_quality(quality)
    _, body = parts(model_card(artifact, About("me/math", quality=found)))
    (row,) = [line for line in body.splitlines() if line.startswith("| math |")]
    base, full, delta = found["rows"]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["math", "20", f"{base['value']:.3f}", f"{full['value']:.3f}", f"{delta['value']:.3f}"]
    assert cells[5].startswith(f"{delta['gain']['value']:.3f} [")
    assert cells[6] == f"{delta['fidelity']['kl']:.4f}"


@pytest.mark.parametrize("content", ["[]", "{}", '{"rows": [{"a": 1}]}', "not json"])
def test_another_file_is_no_quality(tmp_path, content):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(ConfigError, match=r"eval\.json"):
        read_quality(tmp_path / "eval.json")


def test_viewers_of_safetensors_see_what_it_is(math_delta):
    data = (math_delta / "delta.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {
        "format": "pt", "library": "meswitch", "artifact": "meswitch-delta 4", "base": "base", "expert": "math",
        "codec": "me-switch",
    }  # fmt: skip
