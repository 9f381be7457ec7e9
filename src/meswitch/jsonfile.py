"""Files of JSON and of text as people have them, and JSON as dataclasses.

An object is read whole, rows line by line: gzipped or not, with a byte order mark or not. What a file really is whose
content is not what its name says is told (`disguise`). A line ends at a line feed and at nothing else: JSON may hold
U+2028 and other characters where `str.splitlines` cuts. A `Decoder` is strict: an unknown field, a missing one or a
wrong type is an error that names it.
"""

import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import types
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from meswitch.errors import CheckpointError, ConfigError, MeswitchError

_HEAD = 512  # bytes that tell what a file is
_LFS = b"version https://git-lfs.github.com/spec/"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_TABLES = {b"PAR1": "Parquet", b"ARROW1": "Arrow"}
_FETCH = "fetch the file again"
_BOM = b"\xef\xbb\xbf"
_UTF16 = b"\xff\xfe", b"\xfe\xff"
_GZIP = b"\x1f\x8b"


def disguise(file: Path) -> str | None:
    """What a file is instead of what its name says, and what helps; None if its first bytes are nothing such.

    Args:
        file: that exists and could not be read as what its name says. A good file may begin like another kind.
    """
    with file.open("rb") as handle:
        head = handle.read(_HEAD)
    if not head:
        return f"is empty; {_FETCH}"
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory, or fetch it with `hf`"
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return f"is compressed with {name}; unpack it"
    for magic, name in _TABLES.items():
        if head.startswith(magic):
            return f"is a table in {name}'s format; save its rows as JSON lines (`to_json` of `datasets`)"
    if head.startswith(b"GGUF"):
        return (
            "is a GGUF file, which holds quantised weights; give the checkpoint in safetensors that it was made from, "
            "or convert it: `AutoModelForCausalLM.from_pretrained(DIR, gguf_file=...).save_pretrained(...)`"
        )
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "is a PyTorch file (pickle), which can run code and is not read; save the model as safetensors"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"is a web page, such as an error or a login in place of the download; {_FETCH}"
    if head.strip(b"\0") == b"":
        return f"holds nothing but zeros: a download that was reserved and not written; {_FETCH}"
    return None


def read_json(file: Path, error: type[MeswitchError] = CheckpointError) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        file: to read; `generation_config.json`, an index, ...
        error: is raised if it cannot be.

    Raises:
        MeswitchError: `error`: no such file, not JSON (a Git LFS pointer, gzip, empty, cut off, ...), or no object.
    """
    try:
        found, data = disguise(file), file.read_bytes()
    except OSError as reason:
        raise error(f"{file}: cannot be read ({reason.strerror or reason}); {_FETCH}") from None
    if found is not None:  # no JSON object begins like any of these
        raise error(f"{file}: {found}")
    try:
        text = data.decode()
    except UnicodeDecodeError as reason:
        raise error(
            f"{file}: is not UTF-8 text (byte {reason.start} is {data[reason.start]:#04x}); "
            "save it as UTF-8, or fetch it again"
        ) from None
    if text.startswith("\ufeff"):
        raise error(f"{file}: begins with a byte order mark, which JSON does not have; save it as UTF-8 without one")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as reason:
        whole = text.rstrip().endswith("}") and text[reason.pos :].strip()
        if text.lstrip().startswith("{") and not whole:
            raise error(f"{file}: is cut off after {len(text.encode())} bytes; {_FETCH}") from None
        where = f"line {reason.lineno} column {reason.colno}"
        raise error(f"{file}: is not JSON: {reason.msg} at {where}; correct it, or fetch it again") from None
    except ValueError:  # Python converts no numbers of thousands of digits
        raise error(f"{file}: holds a number of too many digits to be what its name says; {_FETCH}") from None
    except RecursionError:
        raise error(f"{file}: is nested too deeply to be what its name says; {_FETCH}") from None
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")
        raise error(f"{file}: holds {kind} where an object (`{{...}}`) is expected; {_FETCH}")
    return value


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
        if not raw.seekable():
            raise error(f"{file}: is a pipe, and is read more than once; write it to a file first")
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


@dataclasses.dataclass(frozen=True, slots=True)
class Decoder:
    """How the errors of one kind of file read.

    Args:
        error: raised.
        fix: ends the message about a missing field.
        complete: fields with a default must be there too.
    """

    file: Path
    error: type[MeswitchError]
    fix: str
    complete: bool = False

    def decode(self, kind: Any, value: Any, where: str = "") -> Any:
        """`value` as `kind`, a type made of dataclasses, dict[str, X], tuple[X, ...], X | None and scalars.

        Raises:
            MeswitchError: `error`, with the file and the field.
        """
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (types.UnionType, typing.Union):
            options = [option for option in arguments if option is not type(None)]
            return None if value is None else self.decode(options[0], value, where)
        if origin is dict:
            self._expect(isinstance(value, dict), where, "an object", value)
            return {key: self.decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
        if origin is tuple:
            self._expect(isinstance(value, list), where, "a list", value)
            return tuple(self.decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if dataclasses.is_dataclass(kind):
            self._expect(isinstance(value, dict), where, "an object", value)
            return self._dataclass(kind, value, f"{where}." if where else "")
        accepted = (int, float) if kind is float else kind
        fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        self._expect(fits, where, kind.__name__, value)
        return value

    def _dataclass(self, kind: Any, value: dict[str, Any], prefix: str) -> Any:
        hints = _hints(kind)
        for key in value:
            if key not in hints:
                raise self.error(f"{self.file}: {prefix}{key}: unknown field; it was written by another version")
        absent: dict[str, Any] = {}
        for item in dataclasses.fields(kind):
            if item.name in value:
                continue
            optional = type(None) in typing.get_args(hints[item.name])
            has_default = item.default is not dataclasses.MISSING
            if self.complete or not (optional or has_default):
                raise self.error(f"{self.file}: {prefix}{item.name}: missing field; {self.fix}")
            if not has_default:
                absent[item.name] = None
        return kind(**absent, **{key: self.decode(hints[key], item, f"{prefix}{key}") for key, item in value.items()})

    def _expect(self, fits: bool, where: str, wanted: str, value: Any) -> None:
        if not fits:
            raise self.error(f"{self.file}: {where or 'the file'}: expected {wanted}, found {value!r:.80}")


@functools.cache  # evaluating the annotations is most of the time that a large file takes
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
