import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from meswitch.errors import ConfigError
from meswitch.evaluate import find_checker, read_task


def written(directory: Path, *rows: Any, name: str = "mine.jsonl") -> Path:
    file = directory / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def checked(directory: Path, checker: str, answer: Any, *replies: str) -> list[bool]:
    task = read_task(written(directory, {"prompt": "?", "answer": answer}), checker)
    assert task.questions[0].check is not None
    return [task.questions[0].check(reply) for reply in replies]


def test_exact_ignores_blanks_around_and_takes_one_of_several(tmp_path: Path) -> None:
    assert checked(tmp_path, "exact", "Oslo", " Oslo\n", "oslo", "Oslo.") == [True, False, False]
    assert checked(tmp_path, "exact", ["yes", "Yes"], "Yes", "no") == [True, False]
    assert checked(tmp_path, "exact", 42, "42", "42.0") == [True, False]


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        (18, "9 + 9 = 18", True),
        (18, "18 eggs, which is 2 dollars", False),
        ("He has 3 left. #### 1,250", "so it is $1,250.00.", True),
        (-0.5, "x = -0.5", True),
        (1000, "1,000, of course", True),
        (7, "seven", False),
        (0.3333333, "1/3 is 0.33333331", True),
    ],
)
def test_number_compares_the_last_number_of_the_reply(tmp_path: Path, answer: Any, reply: str, right: bool) -> None:
    assert checked(tmp_path, "number", answer, reply) == [right]


def test_regex_is_found_anywhere_in_the_reply(tmp_path: Path) -> None:
    pattern = r"\bSELECT\b.*\bFROM flights\b"
    assert checked(tmp_path, "regex", pattern, "so: SELECT * FROM flights;", "select") == [True, False]


def test_a_conversation_is_asked_up_to_its_last_user_turn(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "4"}]}
    task = read_task(written(tmp_path, row), "exact")
    assert task.questions[0].prompt == turns
    assert task.questions[0].check is not None
    assert task.questions[0].check("4")


def test_the_task_is_named_after_its_file_and_knows_its_questions(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(5)]
    file = written(tmp_path, *rows)
    task, some = read_task(file, "number"), read_task(file, "number", limit=3)
    assert (task.name, len(task.questions), len(some.questions)) == ("mine", 5, 3)
    assert task.identity != some.identity
    packed = tmp_path / "same.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert (read_task(packed, "number").name, read_task(packed, "number").identity) == ("same", task.identity)


def test_answers_are_ignored_where_only_the_divergence_is_wanted(tmp_path: Path) -> None:
    assert not read_task(written(tmp_path, {"prompt": "?", "answer": 1}), "none").is_checked
    assert not read_task(written(tmp_path, {"prompt": "?"})).is_checked


@pytest.mark.parametrize(
    ("rows", "checker", "message"),
    [
        ([{"prompt": "?", "answer": 1}], None, r"mine.jsonl: line 1: answer: how is it checked\? give --checker exact"),
        ([{"prompt": "?", "answer": 1}, {"prompt": "?"}], "exact", "line 2: answer: missing"),
        ([{"prompt": "?", "answer": "seven"}], "number", "line 1: answer: 'seven' has no number"),
        ([{"prompt": "?", "answer": "("}], "regex", r"line 1: answer: '\(' is no regular expression"),
        ([{"prompt": "?", "answer": {"a": 1}}], "exact", "line 1: answer: expected a text, a number or a list"),
        ([{"query": "?"}], None, "line 1: needs one of the fields prompt, question, messages, text; it has query"),
        ([{"prompt": 3}], None, "line 1: prompt: expected a text, found a number"),
        ([{"messages": [{"role": "user"}]}], None, "line 1: messages: expected a list of objects"),
        ([{"messages": [{"role": "assistant", "content": "Hi"}]}], None, "line 1: messages: the last turn"),
        ([{"text": "a"}, {"prompt": "b"}], None, "some rows have `text`, others a question"),
        ([{"text": "a"}], "exact", "its rows are texts without questions"),
        ([], None, "has no rows"),
        ([[1]], None, "line 1: is a list"),
        ([{"prompt": "?", "answer": 1}], "fuzzy", "checker: 'fuzzy' is none of exact, number, regex, none or FILE.py"),
    ],
)
def test_what_does_not_fit_is_named_by_line_and_field(
    tmp_path: Path, rows: list[Any], checker: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_task(written(tmp_path, *rows), checker)


def test_a_checker_of_ones_own_is_named_when_it_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    with pytest.raises(ConfigError, match=r"mine\.py: no such file"):
        find_checker(f"{file}:right")
    file.write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigError, match=r"mine\.py: cannot be loaded \(ModuleNotFoundError"):
        find_checker(f"{file}:right")
    file.write_text("def right(reply, answer):\n    return reply[10] == answer\n")
    with pytest.raises(ConfigError, match=r"has no function 'wrong'"):
        find_checker(f"{file}:wrong")
    with pytest.raises(ConfigError, match=r"line 1: the checker raised IndexError .* on the reply 'short'"):
        checked(tmp_path, f"{file}:right", "x", "short")
