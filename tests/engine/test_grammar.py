"""Calls that fit their schemas in an answer that may be any text."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from meswitch.engine.grammar import GrammarMatcher, is_available, marked
from meswitch.errors import MeswitchError
from meswitch.tokenizer import ChatTokenizer

pytestmark = pytest.mark.skipif(not is_available(), reason="needs llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"const": "weather"}, "city": {"enum": ["Rome", "Oslo"]}},
    "required": ["name", "city"],
}
START, END = "<tool_call>", "</tool_call>"
CALL = START + '\n{"name": "weather", "city": "Rome"}\n' + END


@pytest.fixture(params=[False, True], ids=["marks are text", "marks are tokens"])
def tokenizer(request, family, tmp_path):
    shutil.copytree(family / "base", tmp_path / "base")
    if request.param:
        grown = AutoTokenizer.from_pretrained(tmp_path / "base")
        grown.add_special_tokens({"additional_special_tokens": [START, END]})
        grown.save_pretrained(tmp_path / "base")
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": len(grown)}))
    return ChatTokenizer.open("base", tmp_path / "base")


def taken(tokenizer, text):
    """How many characters of a text, at least, the grammar lets through, and whether it all is."""
    are_tokens = {START, END} <= set(tokenizer.hidden.values())
    matcher = GrammarMatcher(marked(json.dumps(SCHEMA), START, END, are_tokens=are_tokens), tokenizer)
    done = 0
    for token in tokenizer.tokenizer.encode(text, add_special_tokens=False):
        try:
            matcher.accept(token)
        except MeswitchError:
            return done, False
        done += len(tokenizer.tokenizer.decode([token]))
    return done, True


@pytest.mark.parametrize("text", ["It is sunny.", "It is\n\n{sunny} <b>", CALL, f"So.\n{CALL}\n{CALL} and more"])
def test_text_and_right_calls_are_free(tokenizer, text):
    assert taken(tokenizer, text)[1]


@pytest.mark.parametrize(
    "wrong",
    [
        CALL.replace("Rome", "Paris"),
        CALL.replace("weather", "time"),
        CALL.replace('"Rome"', '"Rome", "more": 1'),
        CALL.replace('"Rome"}', '"Rome"'),
        START + " text",
    ],
)
@pytest.mark.parametrize("before", ["", "So. ", CALL])
def test_a_call_that_does_not_fit_is_not_written(tokenizer, wrong, before):
    done, whole = taken(tokenizer, before + wrong)
    assert not whole
    assert done >= len(before)
