"""Where calibration text comes from, and how a file of it is read."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from meswitch.checkpoint import Checkpoint
from meswitch.compression.text import TextSource, gather, load_calibration, load_questions
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
        ("text.txt", TextSource(text=Path("text.txt"))),
        (Path("self"), TextSource(text=Path("self"))),
        ("./self", TextSource(text=Path("self"))),
        ("myself:x.txt", TextSource(text=Path("myself:x.txt"))),
        ("self", TextSource(own=True)),
        ("self:asked.jsonl", TextSource(questions=Path("asked.jsonl"), own=True)),
        ("text.jsonl+self", TextSource(text=Path("text.jsonl"), own=True)),
    ],
)
def test_a_source_is_told_by_its_spelling(value, source):
    assert TextSource.parse(value) == source


@pytest.mark.parametrize("value", ["", "self:", "+self"])
def test_a_source_without_its_file_is_refused(value):
    with pytest.raises(ConfigError, match="names no file; give FILE, self, self:FILE or FILE\\+self"):
        TextSource.parse(value)


def test_only_files_are_put_in_place():
    assert TextSource.parse("self:a.txt").resolved(lambda file: Path("/data") / file).questions == Path("/data/a.txt")
    assert TextSource.parse("self").resolved(lambda file: Path("/data") / file) == TextSource(own=True)


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


U, A = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}
CHAT = "<s><|user|>Hi.<|end|><|assistant|>Ho.<|end|>"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": [U, A]}, CHAT),
        ({"messages": [U, A], "tools": None, "id": 7}, CHAT),
        ({"messages": [U | {"content": [{"type": "text", "text": "Hi."}]}, A]}, CHAT),
        ({"messages": [U | {"tool_calls": []}, A | {"weight": 1}]}, CHAT),
        ({"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}]}, CHAT),
        ({"conversations": [U, A]}, CHAT),
        ({"prompt": [U], "completion": [A]}, CHAT),
        ({"prompt": [U]}, "<s><|user|>Hi.<|end|>"),
        ({"instruction": "Hi.", "input": "", "output": "Ho."}, CHAT),
        ({"instruction": "Hi.", "input": "Now.", "output": "Ho."}, CHAT.replace("Hi.", "Hi.\n\nNow.")),
        ({"instruction": "Hi.", "output": "Ho."}, CHAT),
        ({"instruction": "Hi.", "input": None, "output": "Ho."}, CHAT),
        ({"messages": [U, A], "system": ""}, CHAT),
        ({"prompt": "Hi. ", "completion": "Ho."}, "Hi. Ho."),
        ({"text": "Hi.\u2028Ho.\x85"}, "Hi.\u2028Ho.\x85"),
    ],
)
@pytest.mark.parametrize("shape", ["lines", "list", "packed", "mark"])
def test_rows_are_read_in_every_form_that_training_data_has(family, tmp_path, row, text, shape):
    lines = (json.dumps(row, ensure_ascii=False) + "\r\n") * 2
    made = {
        "lines": ("t.jsonl", lines.encode()),
        "list": ("t.json", json.dumps([row, row], indent=1).encode()),
        "packed": ("t.jsonl.gz", gzip.compress(lines.encode(), mtime=0)),
        "mark": ("t.jsonl", b"\xef\xbb\xbf" + lines.encode()),
    }
    name, data = made[shape]
    (tmp_path / name).write_bytes(data)
    found = load_calibration(tmp_path / name, family / "math")
    tokenizer = AutoTokenizer.from_pretrained(family / "math")
    assert [tokenizer.decode(tokens) for tokens in found.sequences] == [text] * 2
    answered = "Ho." in text and "text" not in row
    assert [start > 0 for start in found.starts] == [answered] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, "is a number; a row is an object with one of messages, conversations, prompt, instruction, text"),
        ([U, A], "is a list; a row is an object"),
        (None, "is null; a row is an object"),
        ({"question": "a", "answer": "b"}, "needs one of the fields messages, .*; it has question, answer"),
        ({"text": None}, "text: expected a text, found null"),
        ({"messages": []}, "messages: expected a list of messages, found an empty list"),
        ({"messages": "Hi."}, "messages: expected a list of messages, found a text"),
        ({"messages": [U, {"role": "assistant", "content": None}]}, r"messages\[1\].content: .* found null"),
        ({"messages": [U, {"role": "assistant"}]}, r"messages\[1\].content: expected a text, found no such field"),
        ({"messages": [U, {"content": "x"}]}, r"messages\[1\].role: expected a text, found no such field"),
        ({"messages": [U, "x"]}, r"messages\[1\]: expected a message, found a text"),
        ({"messages": [U, {"role": "tool", "content": "4"}]}, r"messages\[1\]: the chat template .* \(role 'tool'\)"),
        ({"messages": [U, A | {"tool_calls": [{"id": "a"}]}]}, r"messages\[1\].tool_calls: is not read; give the row"),
        ({"messages": [U | {"content": [{"type": "image"}]}]}, r"messages\[0\].content\[0\]: is 'image'"),
        ({"messages": [U, A], "tools": [{"type": "function"}]}, "tools: is not read"),
        ({"conversations": [{"from": "bob", "value": "a"}]}, r"conversations\[0\].from: 'bob' is none of human, user"),
        ({"conversations": [{"from": "gpt", "value": None}]}, r"conversations\[0\].value: .* found null"),
        ({"prompt": "a", "completion": None}, "completion: expected a text, found null"),
        ({"prompt": [U], "completion": "b"}, "completion: expected a list of messages, found a text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen: is a preference pair"),
        ({"instruction": "a", "output": None}, "output: expected a text, found null"),
        ({"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]]}, "history: earlier turns"),
        ({"messages": [{"role": "system", "content": "a"}, U], "system": "b"}, "system: the turns have another system"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "system: a prompt that is a text has no system turn"),
        ({"text": "a \ud83d"}, "text: holds half of a surrogate pair"),
        ({"messages": [U | {"content": "\ud83d"}, A]}, r"messages\[0\].content: holds half of a surrogate pair"),
        ('{"text": "a", "id": ' + "9" * 5000 + "}", "holds a number of too many digits"),
        ("{", "not valid JSON .* at column 2"),
    ],
)
def test_a_row_in_no_form_is_refused_by_line_and_field(family, write, row, message):
    with pytest.raises(ConfigError, match=rf"t\.jsonl: line 3: {message}"):
        load_calibration(write("t.jsonl", {"text": "one"}, "", row), family / "math")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, A]},
        {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}]},
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi."}]},
        {"prompt": [U], "completion": [A]},
        {"instruction": "Hi.", "output": "Ho."},
    ],
)
def test_a_system_text_beside_the_turns_is_the_first_of_them(write, row):
    turns = [{"role": "system", "content": "Be kind."}, U]
    assert load_questions(write("t.jsonl", row | {"system": "Be kind."})) == [turns]


def test_a_bad_row_of_a_list_is_named_by_its_number(family, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps([{"text": "one"}, {"text": 1}]))
    with pytest.raises(ConfigError, match=r"t\.json: row 2: text: expected a text, found a number"):
        load_calibration(tmp_path / "t.json", family / "math")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.jsonl", '{"text": "x"}\n{"text": "Café"}'.encode("latin-1"), r"line 2: its byte 14 \(0xe9\) is not UTF-8"),
        ("t.txt", "Café".encode("latin-1"), r"line 1: its byte 4 \(0xe9\) is not UTF-8"),
        ("t.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("t.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "is a Git LFS pointer"),
        ("t.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:30], "line 1: the file is damaged or cut off"),
        ("t.json", b'[{"text": "a"},', "is not a whole JSON list"),
        ("t.txt", b'{"text": "a"}\n', "line 1: is JSON, and a .txt file is read as prose; name it .jsonl"),
        ("t.txt", b'[{"text": "a"}]', "line 1: is JSON, and a .txt file is read as prose"),
        (
            "t.csv",
            b"text\na\n",
            r"is read from \.txt, \.jsonl and \.json files \(also \.gz\), not \.csv",
        ),
        ("t.parquet", b"PAR1", r"not \.parquet"),
        ("t.txt", b"PAR1\x15\x04", "is a table in Parquet's format; save its rows as JSON lines"),
        ("t.jsonl", '{"text": "a"}'.encode("utf-16-le"), "line 1: holds zero bytes, so it is UTF-16"),
        ("t.txt", "a\n".encode("utf-16-be"), "line 1: holds zero bytes"),
        ("t.txt.gz", gzip.compress("a\n".encode("utf-16"), mtime=0), "line 1: holds zero bytes"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_cause(family, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as error:
        load_calibration(tmp_path / name, family / "math")
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_text_is_cut_where_the_model_s_positions_end(pair, write):
    base, _ = pair("gpt2", max_position_embeddings=16)
    found = load_calibration(write("t.txt", "one two three " * 30, "one"), base)
    assert list(map(len, found.sequences)) == [16, 1]


def test_tokens_that_the_model_does_not_have_are_named(pair, write):
    base, _ = pair("llama", vocab_size=1000)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"base: its tokenizer gives token \d+ \('.*'\), and its model has 1000"):
        load_calibration(write("t.txt", "Hello world, this is a longer text"), base)


def test_questions_end_with_the_user(write):
    asked = {"role": "user", "content": "A?"}
    told = {"role": "system", "content": "Be kind."}
    answered = {"role": "assistant", "content": "B."}
    file = write("q.jsonl", {"prompt": "A?"}, {"messages": [told, asked, answered]})
    assert load_questions(file) == [[asked], [told, asked]]
    assert load_questions(write("q.txt", "A?", "", "A?")) == [[asked], [asked]]
    rows = ({"conversations": [{"from": "human", "value": "A?"}]}, {"instruction": "A?", "output": "B."})
    assert load_questions(write("q.jsonl", *rows, {"prompt": [told, asked], "completion": [answered]})) == [
        [asked],
        [asked],
        [told, asked],
    ]


@pytest.mark.parametrize("row", [{"text": "A?"}, {"messages": [{"role": "assistant", "content": "B."}]}])
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
    with pytest.raises(ConfigError, match="is a directory; give one"):
        load_questions(tmp_path)
    with pytest.raises(ConfigError, match=r"t\.jsonl: line 1: not valid JSON"):
        load_calibration(write("t.jsonl", "{"), family / "math")


@pytest.mark.parametrize("source", ["text.txt", "self"])
def test_an_expert_without_a_tokenizer_is_named(family, write, tmp_path, source):
    write("text.txt", "one")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(family / "math" / name, tmp_path / "bare" / name)
    value = "self" if source == "self" else tmp_path / source
    with pytest.raises(ConfigError, match=r"bare: no tokenizer, .* tokenizer.json and tokenizer_config.json"):
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
