"""Small JSON files of a checkpoint, read whole; and what a file really is whose content is not what its name says."""

import json
from pathlib import Path
from typing import Any

from meswitch.errors import CheckpointError, MeswitchError

_HEAD = 512  # bytes that tell what a file is
_LFS = b"version https://git-lfs.github.com/spec/"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_TABLES = {b"PAR1": "Parquet", b"ARROW1": "Arrow"}
_FETCH = "fetch the file again"


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
