"""Files of text and of JSON rows as people have them: gzipped or not, with a byte order mark or not.

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
from meswitch.jsonfile import disguise

_BOM = b"\xef\xbb\xbf"
_UTF16 = b"\xff\xfe", b"\xfe\xff"
_GZIP = b"\x1f\x8b"


def read_lines(file: Path, error: type[MeswitchError] = ConfigError) -> Iterator[tuple[int, str]]:
    """The numbers, from 1, and the texts of the lines that are not blank.

    Args:
        file: UTF-8 text; gzip is told by its first bytes.
        error: is raised.

    Raises:
        MeswitchError: `error`: the file is missing, damaged, of another kind or not UTF-8.
    """
    with _opened(file, error) as stream:
        for number in itertools.count(1):
            try:
                line = stream.readline()
            except (OSError, EOFError, zlib.error) as reason:
                raise error(f"{file}: line {number}: the file is damaged or cut off ({reason}); get it again") from None
            if not line:
                return
            if number == 1:
                line = line.removeprefix(_BOM)
            text = _decoded(line, file, number, error)
            if text.strip():
                yield number, text.rstrip("\r\n")


def read_json_lines(file: Path, error: type[MeswitchError] = ConfigError) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of JSON lines.

    Raises:
        MeswitchError: see `read_lines`; or a line is not JSON.
    """
    for number, line in read_lines(file, error):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as reason:
            where = f"line {number}: not valid JSON ({reason.msg} at column {reason.colno})"
            raise error(f"{file}: {where}; one value a line is needed") from None
        except ValueError:  # Python converts no numbers of thousands of digits
            raise error(f"{file}: line {number}: holds a number of too many digits; write it as a text") from None
        except RecursionError:
            raise error(f"{file}: line {number}: is nested too deeply to be read") from None


def read_json_rows(file: Path, error: type[MeswitchError] = ConfigError) -> Iterator[tuple[str, Any]]:
    """Places (`line 3`, or `row 3` of a list) and values of JSON lines or of a JSON list.

    Args:
        file: `.json` may be either; every other name means lines.
        error: is raised.

    Raises:
        MeswitchError: see `read_json_lines`; or the list is not JSON.
    """
    if Path(file.name.removesuffix(".gz")).suffix.lower() == ".json":
        text = "\n".join(line for _, line in read_lines(file, error))
        if text.lstrip().startswith("["):
            try:
                rows = json.loads(text)
            except (ValueError, RecursionError) as reason:
                raise error(f"{file}: is not a whole JSON list ({reason}); correct it, or get it again") from None
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
            return
    for number, value in read_json_lines(file, error):
        yield f"line {number}", value


def json_kind(value: Any) -> str:
    """What a JSON value is, in words: `a list`, `null`."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


@contextlib.contextmanager
def _opened(file: Path, error: type[MeswitchError]) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if they are gzipped."""
    try:
        raw = file.open("rb")
    except FileNotFoundError:
        raise error(f"{file}: no such file") from None
    except OSError as reason:
        raise error(f"{file}: cannot be opened ({reason.strerror})") from None
    with raw:
        head = raw.read(len(_GZIP))
        raw.seek(0)
        if head == _GZIP:
            with gzip.open(raw) as stream:
                yield stream  # type: ignore[misc]
            return
        if head in _UTF16:
            raise error(f"{file}: is UTF-16 text; save it as UTF-8")
        found = disguise(file) if head else None
        if found is not None:
            raise error(f"{file}: {found}")
        yield raw


def _decoded(line: bytes, file: Path, number: int, error: type[MeswitchError]) -> str:
    if b"\0" in line:
        raise error(
            f"{file}: line {number}: holds zero bytes, so it is UTF-16 or no text at all; save it as UTF-8 text, for "
            "example with `iconv -f UTF-16LE -t UTF-8`"
        )
    try:
        return line.decode()
    except UnicodeDecodeError as reason:
        raise error(
            f"{file}: line {number}: its byte {reason.start + 1} ({line[reason.start]:#04x}) is not UTF-8; "
            "save the file as UTF-8, for example with `iconv -f LATIN1 -t UTF-8`"
        ) from None
