"""Chat completions as the openai client sees them."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.support.http_server import QUESTIONS, user


@pytest.mark.parametrize("model", ["math", "code", "base"])
def test_an_expert_answers_like_the_engine_and_is_named(client, engine, model):
    messages = user(QUESTIONS[model])
    raw = client.chat.completions.with_raw_response.create(model=model, messages=messages, max_tokens=24)
    answer = raw.parse()
    (alone,) = engine.generate([messages], model=model, max_new_tokens=24)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (alone.text, alone.finish_reason)
    assert choice.message.role == "assistant"
    assert answer.model == raw.headers["x-meswitch-expert"] == model
    assert answer.usage.prompt_tokens == alone.prompt_tokens
    assert answer.usage.completion_tokens == len(alone.tokens)
    assert answer.usage.total_tokens == alone.prompt_tokens + len(alone.tokens)


def test_the_answer_stops_by_itself_or_at_max_tokens(client):
    whole = client.chat.completions.create(model="math", messages=user(QUESTIONS["math"]))
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].message.content.endswith("#### 2")
    for name in ("max_tokens", "max_completion_tokens"):
        cut = client.chat.completions.create(model="math", messages=user(QUESTIONS["math"]), **{name: 3})
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage.completion_tokens == 3
        assert whole.choices[0].message.content.startswith(cut.choices[0].message.content)


def test_streamed_text_equals_unstreamed_text(client):
    asked = {"model": "math", "messages": user(QUESTIONS["math"]), "max_tokens": 30}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.with_streaming_response.create(**asked, stream=True) as response:
        assert response.headers["x-meswitch-expert"] == "math"
        assert response.headers["content-type"].startswith("text/event-stream")
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert len(pieces) > 5
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert {chunk.model for chunk in chunks} == {"math"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert last.choices == []
    assert last.usage == whole.usage


def test_usage_is_streamed_only_on_request(client):
    chunks = client.chat.completions.create(model="math", messages=user(QUESTIONS["math"]), max_tokens=4, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_concurrent_requests_of_all_experts_equal_each_experts_answer_alone(client, engine):
    jobs = [(model, question) for question in QUESTIONS.values() for model in QUESTIONS]
    alone = [engine.generate([user(q)], model=m, max_new_tokens=16)[0].text for m, q in jobs]

    def ask(job):
        model, question = job
        answer = client.chat.completions.create(model=model, messages=user(question), max_tokens=16)
        assert answer.model == model
        return answer.choices[0].message.content

    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(ask, jobs))
    assert together == alone
    assert len(set(alone)) == len(alone)  # every expert says something else, so a mix-up would show


def test_n_answers_have_seeds_of_their_own_and_can_be_repeated(client, engine):
    asked = {"model": "base", "messages": user(QUESTIONS["base"]), "max_tokens": 8, "temperature": 1.0, "seed": 7}
    answer = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    again = [
        engine.generate([user(QUESTIONS["base"])], max_new_tokens=8, temperature=1.0, seed=7 + i)[0] for i in range(3)
    ]
    assert texts == [completion.text for completion in again]
    assert answer.usage.prompt_tokens == again[0].prompt_tokens  # once, not three times
    assert answer.usage.completion_tokens == sum(len(completion.tokens) for completion in again)

    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_without_temperature_the_answer_is_greedy(client):
    asked = {"model": "code", "messages": user(QUESTIONS["code"]), "max_tokens": 12}
    answers = {client.chat.completions.create(**asked, **more).choices[0].message.content for more in [{}, {}]}
    answers.add(client.chat.completions.create(**asked, temperature=0).choices[0].message.content)
    answers.add(
        client.chat.completions.create(**asked, temperature=2, extra_body={"top_k": 1}).choices[0].message.content
    )
    assert len(answers) == 1


@pytest.mark.parametrize("stop", ["####", ["never", "####"]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client, stop, stream):
    messages = user(QUESTIONS["math"])
    whole = client.chat.completions.create(model="math", messages=messages).choices[0].message.content
    answer = client.chat.completions.create(model="math", messages=messages, stop=stop, stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index("####")], "stop")


def test_text_parts_are_joined_and_fields_without_effect_are_accepted(client, engine):
    parts = [{"type": "text", "text": "Ravi shares 8 books equally among 4 friends."}, {"type": "text", "text": "How?"}]
    answer = client.chat.completions.create(
        model="math",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
        ],
        max_tokens=8,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        presence_penalty=0,
        frequency_penalty=0.0,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        logit_bias=None,
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"{parts[0]['text']}\n{parts[1]['text']}"},
    ]
    assert answer.choices[0].message.content == engine.generate([messages], model="math", max_new_tokens=8)[0].text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "warm"),
        ("temperature", 2.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -3),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("n", 0),
        ("n", 17),
        ("seed", 2**64),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", 3),
        ("messages", []),
        ("messages", "hello"),
        ("messages[0]", [{"role": "tool", "content": "4"}]),
        ("messages[0].role", [{"role": "function", "content": "4"}]),
        ("messages[0].content", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages[1].content", [{"role": "user", "content": "a"}, {"role": "assistant"}]),
        (
            "messages[0].tool_calls",
            [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}],
        ),
        ("stream_options", {"include_usage": True}),
        ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),  # this template shows none
        ("tools[0].function.name", [{"type": "function", "function": {"name": "f g"}}]),
        ("tools[0].type", [{"type": "web_search", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("logprobs", 2),
        ("top_logprobs", 2),
        ("response_format.type", {"type": "xml"}),
        ("response_format.json_schema", {"type": "json_schema"}),
        ("logit_bias", {"99999": 10}),
        ("logit_bias", {"a": 10}),
        ("logit_bias[5]", {"5": 101}),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("min_p", 1.5),
        ("min_tokens", -1),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 3}),
        ("stop_token_ids", [99999]),
        ("stop_token_ids[0]", [-1]),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}),
        ("structured_outputs.choice", {"choice": []}),
        ("structured_outputs.pattern", {"pattern": "a"}),
        ("chat_template_kwargs.enable_thinking", {"enable_thinking": True}),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
        ("echo", True),
        ("best_of", 2),
        ("functions", [{"name": "f"}]),
        ("reasoning_effort", "high"),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("use_beam_search", True),
        ("prompt_logprobs", 1),
        ("bad_words", ["a"]),
        ("no_such_field", 1),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, field, value):
    name = field.partition("[")[0]
    body = {"model": "math", "messages": user("hello")}
    name = name.partition(".")[0]
    body |= value if isinstance(value, dict) and "max_tokens" in value else {name: value}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    error = caught.value
    assert error.param in (field, f"{field}[0]")
    assert error.message.count(field) >= 1
    assert error.type == "invalid_request_error"


def test_a_prompt_that_fills_the_context_is_refused(client):
    with pytest.raises(openai.BadRequestError, match=r"messages: .* leave no room") as caught:
        client.chat.completions.create(model="math", messages=user("many words " * 1100))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("model", ["nobody", "MATH", "math ", "mäth"])
def test_an_unknown_model_is_not_found(client, model):
    with pytest.raises(openai.NotFoundError, match="there are base, math, code, auto") as caught:
        client.chat.completions.create(model=model, messages=user("hello"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
