import gzip
import json

import pytest

from meswitch.router import RouterError, Row, read_rows

GOOD = '{"query": "How many?", "domain": "math", "source": "here"}'


def write(tmp_path, *lines):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_rows_are_read_in_order_and_blank_lines_are_skipped(tmp_path):
    file = write(tmp_path, GOOD, "", '{"query": "Wie spät?\\u2028", "domain": "other", "id": 7}')
    assert read_rows(file, ["math"]) == [Row("How many?", "math", "here"), Row("Wie spät?\u2028", "other")]


def test_a_line_separator_inside_a_query_does_not_end_the_row(tmp_path):
    row = json.dumps({"query": "one\u2028two", "domain": "math"}, ensure_ascii=False)
    assert read_rows(write(tmp_path, row, GOOD), ["math"])[0].query == "one\u2028two"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "x", ', "not valid JSON"),
        ('["x", "math"]', "expected an object"),
        ('{"domain": "math"}', "query: missing"),
        ('{"query": "x"}', "domain: missing"),
        ('{"query": "  ", "domain": "math"}', "query: expected a text that is not empty"),
        ('{"query": 5, "domain": "math"}', "query: expected a text"),
        ('{"query": "x", "domain": "poetry"}', r"domain: 'poetry' is no expert of the family \(math, code\)"),
        ('{"query": "x", "domain": "math", "source": null}', "source: expected a text"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_field(tmp_path, line, message):
    file = write(tmp_path, GOOD, "", line)
    with pytest.raises(RouterError, match=rf"rows\.jsonl: line 3: {message}"):
        read_rows(file, ["math", "code"])


def test_a_packed_file_with_a_mark_and_windows_line_ends_is_read(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n"))
    assert read_rows(file, ["math"]) == [Row("How many?", "math", "here")] * 2


def test_a_file_that_is_missing_empty_or_not_text_is_refused(tmp_path):
    with pytest.raises(RouterError, match="no such file"):
        read_rows(tmp_path / "none.jsonl", ["math"])
    with pytest.raises(RouterError, match="no rows"):
        read_rows(write(tmp_path, ""), ["math"])
    (tmp_path / "rows.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RouterError, match="UTF-8"):
        read_rows(tmp_path / "rows.bin", ["math"])
