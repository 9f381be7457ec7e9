"""support: what `plan` and `diff` say of an architecture is what was tried, with the reason for each no."""

import pytest
from transformers import AutoConfig

from meswitch.cli.plan import statements, support


@pytest.mark.parametrize(
    ("model_type", "calibrates", "served"),
    [
        ("llama", "yes", "all experts in one running batch"),
        ("falcon", "yes", "experts by turns, slower: "),
        ("dory", "no: model.layers.0 is not given what the block before it gives", "no: "),
    ],
)
def test_what_was_tried_is_said(model_type, calibrates, served):
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError:
        pytest.skip(f"this transformers has no {model_type}")
    said = statements(support(config))
    assert said["compresses"].endswith(": yes")
    assert said["calibrates"].startswith(calibrates)
    assert said["served here"].startswith(served)
    assert said["served in vLLM"]


def test_a_type_that_nobody_tried_is_not_judged(monkeypatch):
    monkeypatch.setattr("meswitch.architecture._facts", lambda: {"model_types": {}})
    found = support(AutoConfig.for_model("llama"))
    assert found["tried"] is None
    said = statements(found)
    assert "not tried" in said["compresses"]
    assert "not tried" in said["served here"]
    assert "calibrates" not in said
