"""Where calibration text comes from, and how a file of it is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from meswitch.checkpoint import Checkpoint
from meswitch.compression.text import Source, gather, load_calibration, load_questions
from meswitch.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def write(tmp_path):
    """`write("name.jsonl", row, ...)` writes a file of rows: text as it is, anything else as JSON."""

    def to(name, *rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    return to


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("text.txt", Source(text=Path("text.txt"))),
        (Path("self"), Source(text=Path("self"))),
        ("./self", Source(text=Path("self"))),
        ("myself:x.txt", Source(text=Path("myself:x.txt"))),
        ("self", Source(own=True)),
        ("self:asked.jsonl", Source(questions=Path("asked.jsonl"), own=True)),
        ("text.jsonl+self", Source(text=Path("text.jsonl"), own=True)),
    ],
)
def test_a_source_is_told_by_its_spelling(value, source):
    assert Source.parse(value) == source


@pytest.mark.parametrize("value", ["", "self:", "+self"])
def test_a_source_without_its_file_is_refused(value):
    with pytest.raises(ConfigError, match="names no file; give FILE, self, self:FILE or FILE\\+self"):
        Source.parse(value)


def test_only_files_are_put_in_place():
    assert Source.parse("self:a.txt").resolved(lambda file: Path("/data") / file).questions == Path("/data/a.txt")
    assert Source.parse("self").resolved(lambda file: Path("/data") / file) == Source(own=True)


def test_every_kind_of_row_is_read_and_the_tokens_are_counted(family, write):
    tokenizer = AutoTokenizer.from_pretrained(family / "math")
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "4"}]
    file = write("t.jsonl", {"text": "one"}, "", {"prompt": "two ", "completion": "three"}, {"messages": chat})
    found = load_calibration(file, family / "math")
    texts = [tokenizer.decode(tokens) for tokens in found.sequences]
    assert [text.removeprefix("<s>") for text in texts] == [
        "one",
        "two three",
        "<|user|>How many?<|end|><|assistant|>4<|end|>",
    ]
    assert (found.info.sequences, found.info.tokens) == (3, sum(map(len, found.sequences)))
    assert found.info.seed is None
    cut = load_calibration(file, family / "math", max_tokens=found.info.tokens - 2)
    assert cut.sequences == [*found.sequences[:2], found.sequences[2][:-2]]


def test_questions_end_with_the_user(write):
    asked = {"role": "user", "content": "A?"}
    told = {"role": "system", "content": "Be kind."}
    answered = {"role": "assistant", "content": "B."}
    file = write("q.jsonl", {"prompt": "A?"}, {"messages": [told, asked, answered]})
    assert load_questions(file) == [[asked], [told, asked]]
    assert load_questions(write("q.txt", "A?", "", "A?")) == [[asked], [asked]]


@pytest.mark.parametrize("row", [{"text": "A?"}, {"messages": []}, {"messages": [{"role": "assistant"}]}, 7])
def test_a_row_without_a_question_is_named_by_line(write, row):
    with pytest.raises(ConfigError, match=r"q\.jsonl: line 2: needs a question"):
        load_questions(write("q.jsonl", {"prompt": "A?"}, row))


def test_files_without_rows_are_named(family, write, tmp_path):
    with pytest.raises(ConfigError, match=r"q\.txt: holds no questions"):
        load_questions(write("q.txt", "", ""))
    with pytest.raises(ConfigError, match=r"t\.txt: holds no text"):
        load_calibration(write("t.txt", "", ""), family / "math")
    with pytest.raises(ConfigError, match=r"nowhere\.txt: no such calibration file"):
        load_questions(tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match=r"t\.jsonl: line 1: not valid JSON"):
        load_calibration(write("t.jsonl", "{"), family / "math")


@pytest.mark.parametrize("source", ["text.txt", "self"])
def test_an_expert_without_a_tokenizer_is_named(family, write, tmp_path, source):
    write("text.txt", "one")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(family / "math" / name, tmp_path / "bare" / name)
    value = "self" if source == "self" else tmp_path / source
    with pytest.raises(ConfigError, match=r"bare: no tokenizer .* tokenizer.json and tokenizer_config.json"):
        gather(value, Checkpoint.open(tmp_path / "bare"), 100, device=CPU)


def test_a_short_file_is_filled_up_by_the_expert(family, write):
    file = write("t.jsonl", {"text": "one two three"})
    expert = Checkpoint.open(family / "code")
    lines = []
    found = gather(f"{file}+self", expert, 300, device=CPU, notice=lines.append)
    read = load_calibration(file, family / "code")
    assert found.sequences[0] == read.sequences[0]
    assert sum(map(len, found.sequences)) == found.info.tokens == 300
    assert (found.info.source, found.info.seed) == ("t.jsonl+self", 0)
    assert found.info.sequences == len(found.sequences) > 2
    assert "the full expert is loaded on cpu" in lines[0]


def test_a_file_that_is_long_enough_needs_no_expert(family, write):
    file = write("t.txt", *["one two three"] * 10)
    lines = []
    found = gather(f"{file}+self", Checkpoint.open(family / "code"), 20, device=CPU, notice=lines.append)
    assert found == load_calibration(file, family / "code", 20)
    assert lines == [f"calibration: {file} has 20 tokens already; the expert writes none"]
