"""An answer's text becomes thoughts, words and calls, whatever pieces it comes in, and loses nothing."""

import json
import shutil

import pytest

from meswitch.engine.grammar import GrammarMatcher, is_available
from meswitch.errors import ConfigError, MeswitchError
from meswitch.server.protocol.chat import FORMATS, JSON, AnswerReader, Chat, calls_grammar, tool_format
from meswitch.server.protocol.schema import ChatRequest
from meswitch.tokenizer import ChatTokenizer

HERMES = next(form for form in FORMATS if form.name == "hermes")
XML = next(form for form in FORMATS if form.name == "qwen-xml")
MISTRAL = next(form for form in FORMATS if form.name == "mistral")
ADD = {"a": 1, "b": {"c": "x <y> é"}}
ADD_TEXT = json.dumps(ADD)


def read(text, size, **options):
    """(thoughts, words, calls) of a text in pieces of so many characters."""
    reader = AnswerReader(**options)
    parts = [part for at in range(0, len(text), size) for part in reader.feed(text[at : at + size])]
    parts += reader.feed("", last=True)
    said = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content")}
    calls = [(part.call.name, json.loads(part.call.arguments)) for part in parts if part.call]
    assert len({part.call.id for part in parts if part.call}) == len(calls) == reader.called
    return said["reasoning"], said["content"], calls


CASES = [
    ({}, "just <think> text </tool_call>", ("", "just <think> text </tool_call>", [])),
    ({"thinks": True}, "<think>\nhm, so\n</think>\n\nYes.", ("\nhm, so", "Yes.", [])),
    ({"thinks": True}, "\n<think>hm", ("hm", "", [])),
    ({"thinks": True}, "<thin air", ("", "<thin air", [])),
    ({"thinking": True}, "hm </th </think>Yes <think>.", ("hm </th ", "Yes <think>.", [])),
    (
        {"tools": HERMES},
        f'Well.\n<tool_call>\n{{"name": "add", "arguments": {ADD_TEXT}}}\n</tool_call>',
        ("", "Well.", [("add", ADD)]),
    ),
    (
        {"tools": HERMES, "thinks": True},
        '<think>t</think><tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "g", "parameters": {"x": 1}}</tool_call>',
        ("t", "", [("f", {}), ("g", {"x": 1})]),
    ),
    (
        {"tools": HERMES},
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n\n Done.\n\n<tool_call>{"name": "g", "arguments": {}}'
        "</tool_call>\n",
        ("", "Done.", [("f", {}), ("g", {})]),
    ),
    ({"tools": HERMES}, "a < b and <tool_", ("", "a < b and <tool_", [])),
    ({"tools": HERMES}, "<tool_call>{broken}</tool_call> so", ("", "<tool_call>{broken}</tool_call> so", [])),
    ({"tools": HERMES}, '<tool_call>{"name": "f", "argu', ("", '<tool_call>{"name": "f", "argu', [])),
    ({"tools": HERMES}, '<tool_call>{"name": "f", "arguments": {}}', ("", "", [("f", {})])),
    (
        {"tools": HERMES, "one": True},
        '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>',
        ("", "", [("f", {})]),
    ),
    (
        {"tools": XML},
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\ntwo\nlines\n</parameter>\n"
        "</function>\n</tool_call>",
        ("", "", [("add", {"a": 1, "s": "two\nlines"})]),
    ),
    ({"tools": XML}, "<tool_call><function=f>junk</function></tool_call>", None),
    (
        {"tools": MISTRAL},
        f'[TOOL_CALLS][{{"name": "add", "arguments": {ADD_TEXT}}}, {{"name": "f", "arguments": {{}}}}]',
        ("", "", [("add", ADD), ("f", {})]),
    ),
    (
        {"tools": MISTRAL},
        f'Now.[TOOL_CALLS]add[ARGS]{ADD_TEXT}[TOOL_CALLS]f[ARGS]{{"x": "[TOOL"}}',
        ("", "Now.", [("add", ADD), ("f", {"x": "[TOOL"})]),
    ),
    ({"tools": JSON, "names": ["add"]}, f'{{"name": "add", "parameters": {ADD_TEXT}}}', ("", "", [("add", ADD)])),
    ({"tools": JSON, "names": ["add"]}, '<|python_tag|>{"name": "add", "parameters": {}}', ("", "", [("add", {})])),
    ({"tools": JSON, "names": ["add"]}, '{"name": "Ann", "age": 3}', ("", '{"name": "Ann", "age": 3}', [])),
    ({"tools": JSON, "names": ["add"]}, "Say {", ("", "Say {", [])),
    ({"tools": JSON, "names": ["f"], "forced": True}, '{"name": "f", "argum', ("", '{"name": "f", "argum', [])),
]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("options", "text", "wanted"), CASES)
def test_parts_are_the_same_in_pieces_of_any_size(options, text, wanted, size):
    assert read(text, size, **options) == (wanted or ("", text, []))


def test_words_are_given_as_they_come():
    reader = AnswerReader(tools=HERMES, thinks=True)
    assert [part.text for part in reader.feed("Hello")] == ["Hello"]
    assert [part.text for part in reader.feed(" you <tool")] == [" you"]
    assert [part.text for part in reader.feed("box")] == [" <toolbox"]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("<tool_call><function=x>", "qwen-xml"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|python_tag|> Respond with JSON", "json"),
        ("nothing", "json"),
    ],
)
def test_the_format_is_that_of_the_template(template, name):
    assert tool_format(template).name == name


def test_definitions_of_two_tools_stay_apart():
    def tool(name, values):
        schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"enum": values}}}
        return {"type": "function", "function": {"name": name, "parameters": schema}}

    schema = json.loads(calls_grammar([tool("f", [1]), tool("g", [2])]).text)
    for way, values in zip(schema["anyOf"], ([1], [2]), strict=True):
        reference = way["properties"]["arguments"]["properties"]["x"]["$ref"]
        assert schema["$defs"][reference.removeprefix("#/$defs/")] == {"enum": values}
    recursive = {"type": "function", "function": {"name": "f", "parameters": {"items": {"$ref": "#"}}}}
    with pytest.raises(ConfigError, match=r"^tools\[0\]\.function\.parameters: refers to itself"):
        calls_grammar([recursive])


@pytest.fixture
def chat_of(family, tmp_path):
    """Gives a strict chat request for an expert with a template."""

    def chat(template):
        shutil.copytree(family / "base", tmp_path / "expert", dirs_exist_ok=True)
        (tmp_path / "expert" / "chat_template.jinja").write_text("{{ tools }}{{ messages }}" + template)
        weather = {"name": "weather", "parameters": {"properties": {"city": {"const": "Rome"}}}, "strict": True}
        tools = [{"type": "function", "function": one} for one in (weather, {"name": "time"})]
        request = ChatRequest(model="a", messages=[{"role": "user", "content": "Hi"}], tools=tools)
        tokenizer = ChatTokenizer.open("a", tmp_path / "expert")
        return Chat(request, tokenizer), tokenizer

    return chat


@pytest.mark.skipif(not is_available(), reason="needs llguidance")
def test_strict_binds_the_arguments_of_that_tool_alone(chat_of):
    chat, tokenizer = chat_of("<tool_call>")
    for name, city, fits in [("weather", "Rome", True), ("weather", "Oslo", False), ("time", "Oslo", True)]:
        text = f'So. <tool_call>\n{{"name": "{name}", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
        matcher = GrammarMatcher(chat.grammar, tokenizer)
        try:
            for token in tokenizer.text_ids(text, special=False):
                matcher.accept(token)
        except MeswitchError:
            assert not fits
        else:
            assert fits


@pytest.mark.parametrize(("template", "name"), [("", "json"), ("[TOOL_CALLS]", "mistral")])
def test_strict_is_refused_where_no_grammar_can_tell_a_call_from_text(chat_of, template, name):
    with pytest.raises(ConfigError, match=f"tools: strict: this expert writes calls as {name}"):
        chat_of(template)
