"""Who answers the turns of a conversation: the rule alone, and a trained router over written dialogues."""

import tomllib
from pathlib import Path

import pytest

from meswitch.router import train_router
from meswitch.router.base import asks_for_nothing, next_holder, refers_back

EXPERTS = ("math", "code", "instruct", "sql")
DIALOGUES = tomllib.loads((Path(__file__).parent / "dialogues.toml").read_text())["dialogue"]


@pytest.fixture(scope="module")
def taught(all_rows, encoder):
    """Trained on all of the family's routing data, as `meswitch router train` does."""
    return train_router(all_rows[::2], EXPERTS, encoder)


def talk(dialogue):
    """Every prefix of a dialogue as chat messages, with who should answer its last turn."""
    messages = []
    for text, expert in dialogue["turns"]:
        messages.append({"role": "user", "content": text})
        yield list(messages), expert
        messages.append({"role": "assistant", "content": "..."})


def test_the_dialogues_are_many_turns():
    assert sum(len(dialogue["turns"]) for dialogue in DIALOGUES) >= 50


def test_a_trained_router_answers_nearly_every_turn_as_written(taught):
    turns = [turn for dialogue in DIALOGUES for turn in talk(dialogue)]
    routes = taught.route_batch([messages for messages, _ in turns])
    wrong = [
        (messages[-1]["content"], route.choice, expert)
        for route, (messages, expert) in zip(routes, turns, strict=True)
        if route.choice != expert
    ]
    assert len(wrong) <= len(turns) * 0.1, wrong


def test_small_talk_never_changes_who_answers(taught):
    for dialogue in DIALOGUES:
        before = None
        for messages, _ in talk(dialogue):
            choice = taught.route(messages).choice
            if before not in (None, "base") and asks_for_nothing(messages[-1]["content"]):
                assert choice == before, messages[-1]["content"]
            before = choice


def scores(**known):
    return {name: known.get(name, 0.0) for name in (*EXPERTS, "other")}


@pytest.mark.parametrize(
    ("holder", "text", "found", "after"),
    [
        (None, "thanks", scores(code=0.9), ("code", "scored")),
        (None, "hello", scores(code=0.2), (None, "abstained")),
        ("math", "thanks", scores(code=0.9), ("math", "kept")),
        ("math", "and now in Python", scores(code=0.95, math=0.02), ("code", "scored")),
        ("math", "and now in Python", scores(code=0.7, math=0.3), ("math", "kept")),
        ("math", "Write a sorted list of all the prime numbers below fifty in a program", scores(code=0.7, math=0.3),
         ("code", "scored")),
        ("math", "make it shorter", scores(other=0.9), ("math", "kept")),
        ("math", "Please book the usual table for two people on Friday night at seven", scores(other=0.9),
         (None, "abstained")),
        ("math", "How many apples are left after lunch on the second day of school", scores(math=0.8),
         ("math", "scored")),
    ],
)  # fmt: skip
def test_a_newcomer_must_lead_and_small_talk_must_not(holder, text, found, after):
    assert next_holder(holder, text, found, EXPERTS, 0.5) == after


def test_small_talk_and_follow_ups_are_told_from_requests():
    assert all(map(asks_for_nothing, ["Thanks!", "ok, great", "That's perfect, thank you so much"]))
    assert not any(map(asks_for_nothing, ["", "ok, now sort it", "great?", "thanks, and the second one"]))
    assert all(map(refers_back, ["and now in Python", "make it shorter", "why?", "What about the second one?"]))
    assert not refers_back("How many singers are there in the band from the north of France?")


def test_a_long_conversation_is_read_from_its_last_turns(taught):
    long = [{"role": "user", "content": "word " * 50}] * 30
    question = {"role": "user", "content": "Write a Python function that returns the largest number of a list."}
    assert taught.route([*long, question]).choice == "code"
