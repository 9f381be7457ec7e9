import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from meswitch.compression.merge import load_merged
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.evaluate import Text, layer_errors
from meswitch_lab.toy import own_answers

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def texts(math_expert: Loaded) -> list[Text]:
    return own_answers(*math_expert, "math", 8, 7)


def test_a_model_has_no_error_against_itself(math_expert: Loaded, texts: list[Text]) -> None:
    found = layer_errors(math_expert[0], math_expert[0], texts)
    assert len(found) == 6 * 7 + 1
    assert set(found.values()) == {0.0}


def test_an_error_shows_in_its_own_layer_only(math_expert: Loaded, texts: list[Text]) -> None:
    damaged = copy.deepcopy(math_expert[0])
    name = "model.layers.2.mlp.up_proj"
    damaged.get_submodule(name).weight.data *= 1.25  # an output a quarter too large
    found = layer_errors(math_expert[0], damaged, texts)
    assert found.pop(name) == pytest.approx(0.25, rel=1e-4)
    assert set(found.values()) == {0.0}


def test_a_compressed_expert_is_nearer_than_the_base_in_every_layer(
    base: Loaded, math_expert: Loaded, family: Path, math_delta: Path, texts: list[Text]
) -> None:
    near = layer_errors(math_expert[0], load_merged(family / "base", math_delta), texts)
    far = layer_errors(math_expert[0], base[0], texts)
    assert list(near) == list(far)
    assert all(near[name] < far[name] for name in near)


def test_padding_does_not_count(base: Loaded, math_expert: Loaded, texts: list[Text]) -> None:
    together = layer_errors(math_expert[0], base[0], texts, batch_tokens=100_000)
    alone = layer_errors(math_expert[0], base[0], texts, batch_tokens=1)
    assert together == pytest.approx(alone, rel=1e-4)


def test_the_hooks_are_gone_afterwards(base: Loaded, math_expert: Loaded, texts: list[Text]) -> None:
    layer_errors(math_expert[0], base[0], texts)
    assert not any(module._forward_hooks for module in math_expert[0].modules())


def test_another_shape_is_refused_with_the_layers_name(math_expert: Loaded, texts: list[Text]) -> None:
    other = copy.deepcopy(math_expert[0])
    other.lm_head = torch.nn.Linear(128, 2050, bias=False)
    with pytest.raises(IncompatibleError, match="lm_head: not the same linear layer"):
        layer_errors(math_expert[0], other, texts)


def test_no_text_is_an_error(base: Loaded, math_expert: Loaded) -> None:
    with pytest.raises(ConfigError, match="no token to compare"):
        layer_errors(math_expert[0], base[0], [])
