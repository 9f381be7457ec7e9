"""Every decoder-only model type of transformers: compressed, merged and served right, or refused as the table says."""

import dataclasses
import json
from importlib.resources import files

import pytest
import transformers

from meswitch.architecture import tried
from tests.architectures.course import follow
from tests.architectures.left_out import ALL, TRIED, VISION_LANGUAGE, reason_left_out

# One of each kind of layer and of each way to be served, or refused: they are in every run of the tests.
OFTEN = (
    *("llama", "gemma3", "gpt2", "mixtral", "phi3", "cohere2", "qwen3_vl"),  # in one batch
    *("bloom", "deepseek_v32", "falcon_h1", "gemma4", "gpt_oss", "jamba", "llama4", "qwen3_next"),  # by turns
    *("modernbert-decoder", "cpmant", "dory"),  # not calibrated, refused, both
)
FACTS = json.loads(files("meswitch").joinpath("architectures.json").read_text())


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in TRIED]
)
def test_it_is_served_right_or_refused_as_the_table_says(model_type, tmp_path, family):
    outcome = follow(model_type, tmp_path, family / "base")
    assert outcome.wrong == []
    assert outcome.compressed
    assert outcome.distance < 0.6  # of what fine-tuning changed, at 4 bits
    assert (outcome.runner is None) == (outcome.error is not None)
    assert outcome.right == (9 if outcome.runner else 0)
    if transformers.__version__ == FACTS["transformers"]:
        assert outcome.facts() == FACTS["model_types"][model_type]


def test_what_is_in_every_run_is_of_all_kinds():
    often = {name: FACTS["model_types"][name] for name in OFTEN}
    assert {fact["runner"] for fact in often.values()} == {"batch", "turns", None}
    assert {fact["calibrated"] for fact in often.values()} == {True, False}
    assert {name in VISION_LANGUAGE for name in often} == {True, False}


def test_the_table_has_every_model_type_that_is_tried():
    assert set(FACTS["model_types"]) == set(TRIED)
    assert set(VISION_LANGUAGE) <= set(TRIED)
    assert all(reason_left_out(model_type) for model_type in set(ALL) - set(TRIED))


def test_most_are_served_and_every_vision_language_model():
    served = {name for name, fact in FACTS["model_types"].items() if fact["runner"]}
    assert set(VISION_LANGUAGE) <= served
    assert len(served) >= 0.95 * len(TRIED)


def test_a_plan_says_what_the_table_says():
    for model_type, fact in FACTS["model_types"].items():
        found = tried(model_type)
        assert found is not None
        assert dataclasses.asdict(found).items() <= (fact | {"transformers": FACTS["transformers"]}).items()
    assert tried("a-model-of-tomorrow") is None
