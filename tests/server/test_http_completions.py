"""Plain completions: texts and token ids."""

import openai
import pytest

TEXTS = ["def add(a, b):\n    return", "The sea is"]


def test_texts_token_ids_and_lists_of_them_give_the_engines_answers(client, engine):
    alone = [c.text for c in engine.generate(TEXTS, model="code", max_new_tokens=8)]
    ids = [engine.tokenizers["code"].encode(text) for text in TEXTS]
    for prompts in (TEXTS, ids):
        together = client.completions.create(model="code", prompt=prompts, max_tokens=8)
        assert [choice.text for choice in together.choices] == alone
        assert [choice.index for choice in together.choices] == [0, 1]
        assert together.usage.prompt_tokens == sum(len(tokens) for tokens in ids)
        one = client.completions.create(model="code", prompt=prompts[0], max_tokens=8)
        assert one.choices[0].text == alone[0]
        assert one.model == "code"


def test_streamed_text_equals_unstreamed_text(client):
    asked = {"model": "base", "prompt": TEXTS, "max_tokens": 12, "n": 2}
    whole = client.completions.create(**asked)
    texts, reasons = [""] * 4, [None] * 4
    for chunk in client.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        assert chunk.model == "base"
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices] == ["length"] * 4


def test_sixteen_tokens_without_max_tokens(client):
    answer = client.completions.create(model="base", prompt="Once upon a time")
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", []),
        ("prompt", ""),
        ("prompt", [[]]),
        ("prompt", ["a", [1]]),
        ("prompt", [999999]),
        ("prompt", [-1]),
        ("prompt", [1, "a"]),
        ("prompt", {"text": "a"}),
        ("prompt", "word " * 2100),
        ("prompt", ["a"] * 2000),
        ("logprobs", 21),
        ("echo", 1),
        ("suffix", "end"),
        ("best_of", 0),
        ("max_tokens", -1),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("top_logprobs", 3),
        ("messages", [{"role": "user", "content": "a"}]),
        ("max_completion_tokens", 3),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, engine, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": "base", "prompt": "a"} | {field: value}, cast_to=object)
    assert caught.value.param == field
    assert field in caught.value.message
    assert engine.load() == {"waiting": 0, "running": 0}
