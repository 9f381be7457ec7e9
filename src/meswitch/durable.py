"""Files and directories that are whole or not there, whenever the process or the machine stops."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; when the block ends without an error, it becomes `file` in one step."""
    temporary = file.with_name(file.name + ".tmp")
    yield temporary
    fsync_path(temporary)
    temporary.replace(file)


def write_text(file: Path, text: str) -> None:
    """Write a text file, or replace the one that is there."""
    with replacing(file) as temporary:
        temporary.write_text(text)


def replace_directory(new: Path, target: Path) -> None:
    """Give a directory the name `target`. One that has it is removed afterwards: see `recover_directory`."""
    retired = _retired(target)
    shutil.rmtree(retired, ignore_errors=True)
    fsync_path(new)
    if target.exists():  # a directory cannot be renamed onto one that is not empty
        target.rename(retired)
    new.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def recover_directory(target: Path) -> None:
    """Bring back the directory that a `replace_directory` was about to replace when it was stopped."""
    if not target.exists() and (retired := _retired(target)).is_dir():
        retired.rename(target)


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _retired(target: Path) -> Path:
    return target.with_name(target.name + ".replaced.partial")
