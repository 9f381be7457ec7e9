"""Text files as people have them: gzipped or not, with a byte order mark or not. One rule reads them all.

A line ends at a line feed and at nothing else: JSON may hold U+2028 and other characters where `str.splitlines` cuts.
"""

import contextlib
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from meswitch.errors import ConfigError, MeswitchError

_BOM = b"\xef\xbb\xbf"
_UTF16 = b"\xff\xfe", b"\xfe\xff"
_GZIP = b"\x1f\x8b"
_LFS = b"version https://git-lfs.github.com/spec/"


def read_lines(file: Path, error: type[MeswitchError] = ConfigError) -> Iterator[tuple[int, str]]:
    """The numbers, from 1, and the texts of the lines that are not blank.

    Args:
        file: UTF-8 text; gzip is told by its first bytes. error: what is raised.

    Raises:
        MeswitchError: `error`: the file is missing, damaged, a Git LFS pointer or not UTF-8.
    """
    with _opened(file, error) as stream:
        for number in itertools.count(1):
            try:
                line = stream.readline()
            except (OSError, EOFError, zlib.error) as reason:
                raise error(f"{file}: line {number}: cannot be read ({reason}); get the file again") from None
            if not line:
                return
            if number == 1:
                line = _checked(line, file, error)
            text = _decoded(line, file, number, error)
            if text.strip():
                yield number, text.rstrip("\r\n")


def read_text(file: Path, error: type[MeswitchError] = ConfigError) -> str:
    """A whole file, by the same rule.

    Raises:
        MeswitchError: see `read_lines`.
    """
    with _opened(file, error) as stream:
        try:
            data = stream.read()
        except (OSError, EOFError, zlib.error) as reason:
            raise error(f"{file}: cannot be read ({reason}); get the file again") from None
    return _decoded(_checked(data, file, error), file, 1, error)


def read_json(file: Path, error: type[MeswitchError] = ConfigError) -> Any:
    """The value that a JSON file holds.

    Raises:
        MeswitchError: see `read_lines`; or the file is empty or not JSON.
    """
    return _parsed(read_text(file, error), file, error)


def read_json_object(file: Path, error: type[MeswitchError] = ConfigError) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        MeswitchError: see `read_json`; or it is another kind of value.
    """
    value = read_json(file, error)
    if not isinstance(value, dict):
        raise error(f"{file}: holds {json_kind(value)}; expected an object; get the file again")
    return value


def read_json_lines(file: Path, error: type[MeswitchError] = ConfigError) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of JSON lines.

    Raises:
        MeswitchError: see `read_lines`; or a line is not JSON.
    """
    for number, line in read_lines(file, error):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as reason:
            raise error(f"{file}: line {number}: not valid JSON: {reason}; one value a line is needed") from None


def json_kind(value: Any) -> str:
    """What a JSON value is, in words: `a list`, `null`."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _parsed(text: str, file: Path, error: type[MeswitchError]) -> Any:
    if not text.strip():
        raise error(f"{file}: is empty; get the file again, or remove it if it is not needed")
    try:
        return json.loads(text)
    except json.JSONDecodeError as reason:
        cut = reason.pos >= len(text.rstrip())
        what = "is cut off" if cut else f"is not valid JSON: {reason.msg}"
        raise error(f"{file}: line {reason.lineno}: {what}; get the file again") from None
    except RecursionError:
        raise error(f"{file}: is nested too deeply to be read") from None


@contextlib.contextmanager
def _opened(file: Path, error: type[MeswitchError]) -> Iterator[IO[bytes]]:
    try:
        raw = file.open("rb")
    except FileNotFoundError:
        raise error(f"{file}: no such file") from None
    except OSError as reason:
        raise error(f"{file}: cannot be opened ({reason.strerror})") from None
    with raw:
        packed = raw.read(2) == _GZIP
        raw.seek(0)
        if not packed:
            yield raw
            return
        with gzip.open(raw) as stream:
            yield stream  # type: ignore[misc]


def _checked(start: bytes, file: Path, error: type[MeswitchError]) -> bytes:
    """The beginning of a file without its byte order mark."""
    if start.startswith(_LFS):
        raise error(f"{file}: is a Git LFS pointer, not the file itself; run `git lfs pull`, or download it again")
    if start.startswith(_UTF16):
        raise error(f"{file}: is UTF-16 text; save it as UTF-8")
    return start.removeprefix(_BOM)


def _decoded(data: bytes, file: Path, number: int, error: type[MeswitchError]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as reason:
        before = data[: reason.start]
        line, column = number + before.count(b"\n"), reason.start - (before.rfind(b"\n") + 1) + 1
        raise error(
            f"{file}: line {line}: its byte {column} (0x{data[reason.start]:02x}) is not UTF-8; "
            "save the file as UTF-8, for example with `iconv -f LATIN1 -t UTF-8`"
        ) from None
