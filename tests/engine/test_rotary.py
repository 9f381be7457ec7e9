"""Rotary embeddings that depend on how long a text is: no answer depends on the texts beside it."""

import pytest

from meswitch.engine.turns import longest_unturned
from tests.architectures import tiny
from tests.architectures.course import follow


def rope(pretrained: int, long: float = 2.0) -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [long] * 8,
        "original_max_position_embeddings": pretrained,
    }


@pytest.mark.parametrize(
    ("pretrained", "runner"),
    [
        (8, "turns"),  # the prompts are shorter, as long and longer, and answers cross it
        (4096, "batch"),  # no text that the engine takes is longer
    ],
)
def test_a_text_longer_than_those_of_pretraining_turns_no_other(pretrained, runner, tmp_path, family):
    fields = {"rope_parameters": rope(pretrained), "original_max_position_embeddings": pretrained}
    outcome = follow("phi3", tmp_path, family / "base", **fields)
    assert (outcome.wrong, outcome.right, outcome.runner) == ([], 9, runner)
    assert all("longrope" in reason for reason in outcome.reasons)


@pytest.mark.parametrize(("fields", "limit"), [(rope(64), 64), (rope(64, long=1.0), None), (None, None)])
def test_only_two_sets_of_frequencies_turn(fields, limit):
    config = tiny.config_of("phi3", original_max_position_embeddings=64, rope_parameters=fields)
    assert longest_unturned(config) == limit
