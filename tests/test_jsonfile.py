"""A JSON file that is damaged, or another kind of file under its name, is told in one line."""

import gzip
import lzma
import os
from pathlib import Path

import pytest

from meswitch.errors import ArtifactError, CheckpointError
from meswitch.jsonfile import read_json, read_json_lines

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14483464192\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; fetch the file again"),
        (POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (gzip.compress(b"{}", mtime=0), "is compressed with gzip; unpack it"),
        (lzma.compress(b"{}"), "is compressed with xz; unpack it"),
        (b"GGUF\x03\0\0\0", "is a GGUF file"),
        (b"PK\x03\x04data", "is a PyTorch file (pickle)"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\0" * 600, "holds nothing but zeros"),
        (b'{"a": [1, {"b": "c', "is cut off after 18 bytes; fetch the file again"),
        (b'{"a": 1,\n "b": tr', "is cut off after 17 bytes"),
        (b'{"a": {"b": 1}', "is cut off after 14 bytes"),
        (b'{"a": 1,}', "is not JSON: Expecting property name enclosed in double quotes at line 1 column 9"),
        (b"[1, 2]", "holds a list where an object (`{...}`) is expected"),
        (b"null", "holds null where an object"),
        (b"[" * 100_000, "is nested too deeply"),
        ('{"a": "é"}'.encode("latin-1"), "is not UTF-8 text (byte 7 is 0xe9)"),
        ("{}".encode("utf-16"), "is not UTF-8 text"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "holds a number of too many digits"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    ],
)
def test_the_cause_and_what_helps_are_said_in_one_line(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_json(file)
    line = str(raised.value)
    assert line.startswith(f"{file}: {message}")
    assert "\n" not in line


def test_an_object_is_read_whatever_its_spaces(tmp_path):
    (tmp_path / "x.json").write_text('\n {"name": "Ärger", "limit": Infinity}\n\n')
    assert read_json(tmp_path / "x.json") == {"name": "Ärger", "limit": float("inf")}


def test_a_missing_file_is_the_error_that_was_asked_for(tmp_path):
    with pytest.raises(ArtifactError, match="No such file or directory"):
        read_json(tmp_path / "none.json", ArtifactError)


def test_a_pipe_is_refused_as_files_are_read_twice():
    read, write = os.pipe()
    os.close(write)
    try:
        with pytest.raises(ArtifactError, match=rf"/dev/fd/{read}: is a pipe, and is read more than once"):
            list(read_json_lines(Path(f"/dev/fd/{read}"), ArtifactError))
    finally:
        os.close(read)
