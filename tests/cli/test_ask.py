"""generate and chat: what they print is what the expert says."""

import pytest
import torch
from transformers import AutoTokenizer

from meswitch.compression.merge import load_merged

QUESTION = "Rosa had 98 nuts and gave 28 of them to Kim. Then Rosa found 8 more. How many nuts does Rosa have?"
CODE = "Write a Python function f(xs) that returns the sum of xs."


@pytest.fixture(scope="module")
def reference(family, math_delta):
    """Greedy answers of the merged math expert, by transformers alone."""
    model, tokenizer = load_merged(family / "base", math_delta), AutoTokenizer.from_pretrained(family / "math")

    def answer(*messages, count=40):
        roles = ("user", "assistant")
        chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=3, pad_token_id=1)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


def test_generate_streams_the_named_experts_answer(cli, ready_family, reference):
    result = cli.ok("generate", "--family", ready_family, "--model", "math", "--max-tokens", 40, QUESTION)
    assert result.stdout == reference(QUESTION) + "\n"
    assert result.stderr == ""


def test_auto_routes_and_says_who_answers(cli, ready_family, reference):
    result = cli.ok("generate", "--family", ready_family, "--max-tokens", 40, QUESTION)
    assert result.stdout == reference(QUESTION) + "\n"
    assert result.stderr.startswith("math answers: math ")


def test_generate_as_json_continues_plain_text_from_stdin(cli, ready_family):
    options = ("--model", "base", "--raw", "--max-tokens", 5, "--temperature", 1, "--seed", 7)
    first = cli.json("generate", "--family", ready_family, *options, "-", stdin="Once upon a time")
    assert first["model"] == "base"
    assert len(first["tokens"]) <= 5
    assert first["route"] is None
    assert first["prompt_tokens"] < 12
    again = cli.json("generate", "--family", ready_family, *options, "-", stdin="Once upon a time")
    assert first["tokens"] == again["tokens"]


def test_chat_remembers_switches_and_forgets(cli, ready_family, reference):
    more = "And if Rosa finds 5 more?"
    lines = [QUESTION, more, "/reset", "/model nobody", "/model auto", CODE, "/what", "/quit", "never read"]
    options = ("--model", "math", "--max-tokens", 40)
    result = cli.ok("chat", "--family", ready_family, *options, stdin="\n".join(lines))
    first = reference(QUESTION)
    assert result.stdout.startswith(f"{first}\n{reference(QUESTION, first, more)}\n")
    notes = result.stderr.splitlines()
    assert notes[0] == "the conversation is forgotten"
    assert notes[1] == "error: no model 'nobody'; there are auto, base, math, code, instruct, sql"
    assert notes[2] == "auto answers now"
    assert notes[3].startswith("code answers: ")
    assert notes[4].startswith("no command /what")
    assert len(notes) == 5
