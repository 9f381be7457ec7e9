"""What real clients do against a server: openai, LangChain, LiteLLM, instructor, Anthropic and lm-eval.

By default against the embedded engine, with an expert whose chat template knows tools and thoughts. To run them against
another server, name it: `MESWITCH_CLIENTS_URL=http://127.0.0.1:8000` and `MESWITCH_CLIENTS_MODEL=name`. If it is
`meswitch serve --engine vllm`, also `MESWITCH_CLIENTS_ENGINE=vllm`: what vLLM does in another way is expected then.
Tests of a client that is not installed are skipped.
"""

import asyncio
import json
import os
import shutil
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

import meswitch
from meswitch import Engine
from meswitch.engine.grammar import is_available
from meswitch.launch import encoder_opener
from meswitch.server import OnDemandModels, create_app
from meswitch.server.keys import ApiKey, Keys
from tests.support.http_server import serving, user

TEMPLATE = """{{ bos_token }}{% if tools %}<|user|>You may call
{% for tool in tools %}{{ tool.function | tojson }}
{% endfor %}as <tool_call>{"name": ..., "arguments": ...}</tool_call><|end|>{% endif %}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}<|assistant|>{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>
{%- else -%}<|user|>{{ m.content }}<|end|>{%- endif -%}
{%- endfor -%}
{% if add_generation_prompt %}<|assistant|>{% if thoughtful %}<think>{% endif %}{% endif %}{# </think> #}"""
QUESTION = "What is the weather in Rome?"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/Days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"Days": {"enum": [1, 2]}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "It.", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "weather"}}
SPACES = "xgrammar lets spaces stand between the parts of a call, without a limit; the toy model writes nothing else"
VLLM = {  # what vLLM 0.32 does in another way; docs/use/api.md lists it
    "test_a_demanded_call_is_made": SPACES,
    "test_a_demanded_call_is_streamed": SPACES,
    "test_calls_are_read_where_the_model_chooses_to_make_them": "structured_outputs beside tools is refused",
    "test_strict_tools_bind_calls_that_the_model_chooses_to_make": "text beside strict tools is another",
    "test_results_of_calls_are_sent_back": SPACES,
    "test_thoughts_are_told_from_the_answer": "needs --reasoning-parser, and the field is called reasoning",
    "test_openai_responses": "an answer that was cut ends with response.completed",
    "test_openai_responses_with_tools_and_schemas": SPACES,
    "test_openai_embeddings": "no /v1/embeddings",
    "test_what_cannot_be_tokenized_is_refused": "messages go before a prompt, and a token that there is not is no text",
    "test_anthropic_calls_tools": SPACES,
    "test_anthropic_takes_a_few_stop_sequences": "takes any number",
    "test_litellm": SPACES,
}
needs_grammar = pytest.mark.skipif(not is_available(), reason="needs llguidance")


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2]


@pytest.fixture(autouse=True)
def known_difference(request):
    reason = VLLM.get(request.node.originalname) if os.environ.get("MESWITCH_CLIENTS_ENGINE") == "vllm" else None
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(scope="module")
def address(family, tmp_path_factory):
    """(url, model)"""
    if "MESWITCH_CLIENTS_URL" in os.environ:
        yield os.environ["MESWITCH_CLIENTS_URL"], os.environ["MESWITCH_CLIENTS_MODEL"]
        return
    root = tmp_path_factory.mktemp("clients")
    shutil.copytree(family / "math", root / "expert")
    (root / "expert" / "chat_template.jinja").write_text(TEMPLATE)
    meswitch.compress(family / "base", root / "expert", root / "delta")
    with Engine(family / "base", {"tools": root / "delta"}, device="cpu") as engine:
        keys = Keys([ApiKey.of("all", "secret")])
        app = create_app(engine, keys=keys, close_engine=False, on_demand=OnDemandModels(encoder_opener(engine)))
        with serving(app) as url:
            yield url, "tools"


@pytest.fixture(scope="module")
def model(address):
    return address[1]


@pytest.fixture(scope="module")
def base_url(address):
    return f"{address[0]}/v1"


@pytest.fixture(scope="module")
def client(base_url):
    return openai.OpenAI(base_url=base_url, api_key="secret", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def ask(client, model):
    def ask(**options):
        asked = {"model": model, "messages": user(QUESTION), "max_tokens": 80}
        return client.chat.completions.create(**asked | options)

    return ask


def is_call(call):
    arguments = json.loads(call.function.arguments)
    return call.function.name == "weather" and Weather(**arguments) and call.type == "function" and bool(call.id)


# openai


@needs_grammar
@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_a_demanded_call_is_made(ask, choice):
    answer = ask(tools=[WEATHER], tool_choice=choice).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert is_call(call)


@needs_grammar
def test_a_demanded_call_is_streamed(ask):
    chunks = [chunk.choices[0] for chunk in ask(tools=[TIME, WEATHER], tool_choice=NAMED, stream=True)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [call.index for call in calls] == [0]
    assert is_call(calls[0])
    assert chunks[-1].finish_reason == "tool_calls"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""


@needs_grammar
def test_calls_are_read_where_the_model_chooses_to_make_them(ask):
    """A constraint makes a small model write what a large one would."""
    call = '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'
    text = f"So.\n<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{call}\n</tool_call>"
    written = {"structured_outputs": {"choice": [text]}}
    asked = {"tools": [WEATHER, TIME], "extra_body": written, "max_tokens": 200}
    answer = ask(**asked).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("So.", "tool_calls")
    assert [is_call(call) for call in answer.message.tool_calls] == [True, True]
    assert len({call.id for call in answer.message.tool_calls}) == 2
    chunks = [chunk.choices[0] for chunk in ask(**asked, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "So."
    assert [call.index for chunk in chunks for call in chunk.delta.tool_calls or ()] == [0, 1]
    assert len(ask(**asked, parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    plain = ask(tools=[WEATHER], tool_choice="none", extra_body=written, max_tokens=200)
    assert plain.choices[0].message.content == text  # text like any other


@needs_grammar
def test_strict_tools_bind_calls_that_the_model_chooses_to_make(ask):
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    said = ask(tools=[strict, TIME], max_tokens=20).choices[0].message.content
    assert said == ask(tools=[WEATHER, TIME], max_tokens=20).choices[0].message.content  # text is free
    with pytest.raises(openai.BadRequestError, match=r"structured_outputs: not together with (strict )?tools"):
        ask(tools=[strict], extra_body={"structured_outputs": {"choice": ["a"]}})


@needs_grammar
def test_results_of_calls_are_sent_back(ask):
    first = ask(tools=[WEATHER], tool_choice=NAMED).choices[0].message
    call = first.tool_calls[0]
    history = [*user(QUESTION), first.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = ask(messages=history, tools=[WEATHER], max_tokens=4)
    assert answer.usage.prompt_tokens > ask(tools=[WEATHER], max_tokens=4).usage.prompt_tokens + 10


@needs_grammar
def test_thoughts_are_told_from_the_answer(ask):
    def written(text, **more):
        return {"extra_body": {"structured_outputs": {"choice": [text]}, **more}}

    answer = ask(**written("<think>\nhm\n</think>\n\nSunny.")).choices[0].message
    assert (answer.reasoning_content, answer.content) == ("\nhm", "Sunny.")
    stream = [chunk.choices[0].delta for chunk in ask(**written("<think>hm</think>Sunny."), stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in stream) == "hm"
    assert "".join(delta.content or "" for delta in stream) == "Sunny."
    # where the template begins the thought, only what comes after it is bound to the schema
    thoughtful = {"chat_template_kwargs": {"thoughtful": True}}
    answer = ask(**written("Sunny.", **thoughtful), max_tokens=40).choices[0].message
    assert len(answer.reasoning_content) > 20
    replayed = [*user(QUESTION), {"role": "assistant", "content": "Sunny.", "reasoning_content": "hm"}, *user("And?")]
    assert ask(messages=replayed, max_tokens=2).choices[0].finish_reason == "length"


def test_openai_asynchronous_and_streamed(base_url, model, ask):
    async def together():
        async with openai.AsyncOpenAI(base_url=base_url, api_key="secret", max_retries=0) as client:
            asked = {"model": model, "messages": user(QUESTION), "max_tokens": 20}
            whole = await client.chat.completions.create(**asked)
            text = ""
            async for chunk in await client.chat.completions.create(**asked, stream=True):
                text += chunk.choices[0].delta.content or ""
            return whole.choices[0].message.content, text

    whole, streamed = asyncio.run(together())
    assert whole == streamed == ask(max_tokens=20).choices[0].message.content


@needs_grammar
def test_openai_parses_into_a_model(client, model):
    asked = {"model": model, "messages": user(QUESTION), "max_tokens": 400, "response_format": Weather}
    assert isinstance(client.chat.completions.parse(**asked).choices[0].message.parsed, Weather)


def test_openai_responses(client, model, ask):
    wanted = ask(max_tokens=20).choices[0].message.content
    answer = client.responses.create(model=model, input=QUESTION, max_output_tokens=20)
    assert answer.output_text == wanted
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 20
    events = list(client.responses.create(model=model, input=QUESTION, max_output_tokens=20, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == wanted
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == wanted
    history = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}, *answer.output]
    more = client.responses.create(
        model=model,
        input=[*history, {"role": "user", "content": "And?"}],
        max_output_tokens=4,
        instructions="Be brief.",
    )
    assert more.usage.input_tokens > answer.usage.input_tokens
    for field, value in [("previous_response_id", "resp_1"), ("background", True), ("input", [{"type": "image"}])]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**{"model": model, "input": "a", field: value})
        assert caught.value.param.startswith(field)


@needs_grammar
def test_openai_responses_with_tools_and_schemas(client, model):
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    choice = {"type": "function", "name": "weather"}
    asked = {"model": model, "input": QUESTION, "max_output_tokens": 400}
    answer = client.responses.create(**asked, tools=[tool], tool_choice=choice)
    (call,) = answer.output
    assert (call.type, call.name, answer.status) == ("function_call", "weather", "completed")
    assert Weather(**json.loads(call.arguments))
    back = [*user(QUESTION), call, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    assert client.responses.create(**asked | {"input": back, "max_output_tokens": 2}, tools=[tool | {"strict": False}])
    events = list(client.responses.create(**asked, tools=[tool], tool_choice=choice, stream=True))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert Weather(**json.loads(done[0].arguments))
    parsed = client.responses.parse(**asked, text_format=Weather)
    assert isinstance(parsed.output_parsed, Weather)
    with client.responses.stream(**asked, text_format=Weather) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Weather)


def test_openai_embeddings(client, address):
    name = "base" if address[1] == "tools" else address[1]
    texts = ["The sea is blue.", "def add(a, b):", "The sea is blue."]
    found = client.embeddings.create(model=name, input=texts)
    rows = [one.embedding for one in found.data]
    assert rows[0] == pytest.approx(rows[2], abs=1e-5)
    assert sum(a * b for a, b in zip(rows[0], rows[1], strict=True)) < 0.999
    plain = client.embeddings.create(model=name, input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(rows[0], abs=1e-5)
    assert plain.usage.prompt_tokens > 0
    for field, value in [("input", [1, 2]), ("model", address[1]), ("dimensions", 8), ("input[0]", "word " * 3000)]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(**{"model": name, "input": "a", field.partition("[")[0]: value})
        assert caught.value.param == field


def test_tokenize_and_back(address):
    url, model = address
    headers = {"Authorization": "Bearer secret"}

    def post(path, body):
        return httpx.post(f"{url}/{path}", json={"model": model} | body, headers=headers)

    text = post("tokenize", {"prompt": "The sea", "return_token_strs": True}).json()
    assert text["count"] == len(text["tokens"]) == len(text["token_strs"])
    assert post("detokenize", {"tokens": text["tokens"]}).json()["prompt"].endswith("The sea")
    chat = post("tokenize", {"messages": user(QUESTION)}).json()
    asked = {"messages": user(QUESTION), "max_tokens": 1}
    assert chat["count"] == post("v1/chat/completions", asked).json()["usage"]["prompt_tokens"]
    assert chat["max_model_len"] >= chat["count"]
    assert httpx.get(f"{url}/version", headers=headers).json()["version"]
    answer = post("tokenize", {})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {"prompt": "a", "messages": user("a")}, "prompt"),
        ("detokenize", {"tokens": [99999999]}, "tokens"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(address, path, body, param):
    url, model = address
    answer = httpx.post(f"{url}/{path}", json={"model": model} | body, headers={"Authorization": "Bearer secret"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_request_keeps_its_id(address):
    url, headers = address[0], {"Authorization": "Bearer secret"}
    given = httpx.get(f"{url}/v1/models", headers=headers | {"X-Request-Id": "abc-1"})
    assert given.headers.get_list("x-request-id") == ["abc-1"]
    made = [httpx.get(f"{url}/v1/{path}", headers=headers).headers["x-request-id"] for path in ("models", "nothing")]
    assert len(set(made)) == 2
    odd = httpx.get(f"{url}/v1/models", headers=headers | {"X-Request-Id": "a b"})
    assert odd.headers["x-request-id"] not in ("a b", "")


# Anthropic


@pytest.fixture(scope="module")
def anthropic(address):
    module = pytest.importorskip("anthropic")
    return module.Anthropic(base_url=address[0], api_key="secret", max_retries=0)


def test_anthropic_answers_and_streams(anthropic, model, ask):
    wanted = ask(max_tokens=20).choices[0].message.content
    asked = {"model": model, "messages": user(QUESTION), "max_tokens": 20}
    answer = anthropic.messages.create(**asked)
    assert (answer.content[0].text, answer.stop_reason, answer.usage.output_tokens) == (wanted, "max_tokens", 20)
    with anthropic.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == wanted
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 20)
    assert final.usage.input_tokens == answer.usage.input_tokens
    assert (
        anthropic.messages.count_tokens(model=model, messages=user(QUESTION)).input_tokens == final.usage.input_tokens
    )
    stop = wanted[5:8]
    stopped = anthropic.messages.create(**asked, stop_sequences=["@@", stop], system="Be brief.")
    assert stopped.stop_reason in ("stop_sequence", "max_tokens")
    cut = anthropic.messages.create(**asked, stop_sequences=["@@", stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    begun = [*user(QUESTION), {"role": "assistant", "content": wanted[:5]}]
    assert anthropic.messages.create(**asked | {"messages": begun}).content[0].text


@needs_grammar
def test_anthropic_calls_tools(anthropic, model):
    tool = {"name": "weather", "description": "It.", "input_schema": PARAMETERS}
    asked = {"model": model, "messages": user(QUESTION), "max_tokens": 80, "tools": [tool]}
    answer = anthropic.messages.create(**asked, tool_choice={"type": "tool", "name": "weather"})
    (block,) = answer.content
    assert (block.type, block.name, answer.stop_reason) == ("tool_use", "weather", "tool_use")
    assert Weather(**block.input)
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
    history = [*user(QUESTION), {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert anthropic.messages.create(**asked | {"messages": history, "max_tokens": 2}).stop_reason == "max_tokens"
    with anthropic.messages.stream(**asked, tool_choice={"type": "any"}) as stream:
        assert Weather(**stream.get_final_message().content[0].input)


def test_anthropic_gets_errors_in_its_own_form(anthropic, model):
    import anthropic as package

    with pytest.raises(package.NotFoundError) as caught:
        anthropic.messages.create(model="nobody", messages=user("a"), max_tokens=2)
    assert caught.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(package.AuthenticationError):
        package.Anthropic(base_url=anthropic.base_url, api_key="wrong", max_retries=0).messages.create(
            model=model, messages=user("a"), max_tokens=2
        )


def test_anthropic_takes_a_few_stop_sequences(anthropic, model):
    import anthropic as package

    with pytest.raises(package.BadRequestError, match="stop_sequences"):
        anthropic.messages.create(model=model, messages=user("a"), max_tokens=2, stop_sequences=list("abcdef"))


# LangChain, LiteLLM, instructor, lm-eval


@pytest.fixture(scope="module")
def langchain(base_url, model):
    module = pytest.importorskip("langchain_openai")
    return module.ChatOpenAI(base_url=base_url, api_key="secret", model=model, max_retries=0, max_tokens=400)


@needs_grammar
@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_langchain_with_structured_output(langchain, method):
    assert isinstance(langchain.with_structured_output(Weather, method=method).invoke(QUESTION), Weather)


@needs_grammar
def test_langchain_bind_tools(langchain):
    answer = langchain.bind_tools([Weather], tool_choice="Weather").invoke(QUESTION)
    (call,) = answer.tool_calls
    assert Weather(**call["args"])
    from langchain_core.messages import HumanMessage, ToolMessage

    history = [HumanMessage(QUESTION), answer, ToolMessage("sunny", tool_call_id=call["id"])]
    assert langchain.bind_tools([Weather]).bind(max_tokens=4).invoke(history).usage_metadata["output_tokens"] <= 4


def test_langchain_streams(langchain, ask):
    text = "".join(chunk.content for chunk in langchain.bind(max_tokens=20).stream(QUESTION))
    assert text == ask(max_tokens=20).choices[0].message.content


@needs_grammar
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(client, model, mode):
    instructor = pytest.importorskip("instructor")
    asking = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
    asked = {"model": model, "messages": user(QUESTION), "max_tokens": 400, "max_retries": 0}
    assert isinstance(asking.chat.completions.create(**asked, response_model=Weather), Weather)


@needs_grammar
def test_litellm(base_url, model, ask, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    asked = {"model": f"openai/{model}", "api_base": base_url, "api_key": "secret", "messages": user(QUESTION)}
    wanted = ask(max_tokens=20).choices[0].message.content
    assert litellm.completion(**asked, max_tokens=20).choices[0].message.content == wanted
    chunks = litellm.completion(**asked, max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    made = litellm.completion(**asked, max_tokens=80, tools=[WEATHER], tool_choice=NAMED)
    call = made.choices[0].message.tool_calls[0]
    assert Weather(**json.loads(call.function.arguments))


def test_lm_eval_scores_a_continuation(base_url, model, family, client):
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    tokenizer = os.environ.get("MESWITCH_CLIENTS_TOKENIZER", str(family / "base"))
    scorer = completions.LocalCompletionsAPI(
        model=model,
        base_url=f"{base_url}/completions",
        tokenizer=tokenizer,
        max_retries=1,
        batch_size=2,
        num_concurrent=1,
        header={"Authorization": "Bearer secret"},
    )
    pairs = [("Ben has 3 nuts and", " 4 apples."), ("The sea", " is blue"), ("a b c d", " e f g h i j")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (total, is_greedy), (context, rest) in zip(scorer.loglikelihood(asked), pairs, strict=True):
        scored = client.completions.create(model=model, prompt=context + rest, max_tokens=0, echo=True, logprobs=1)
        found = scored.choices[0].logprobs
        count = sum(offset >= len("".join(found.tokens)) - len(rest) for offset in found.text_offset)
        assert total == pytest.approx(sum(found.token_logprobs[-count:]), abs=1e-3)
        assert isinstance(is_greedy, bool)
