"""Files and directories that are whole or not there, whenever the process or the machine stops."""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from meswitch.errors import ConfigError

_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD of <fcntl.h>, and of <linux/fs.h>


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; when the block ends without an error, it becomes `file` in one step."""
    temporary = file.with_name(file.name + ".tmp")
    yield temporary
    fsync_path(temporary)
    temporary.replace(file)


@contextlib.contextmanager
def replacing_directory(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` to fill; when the block ends without an error, it becomes `target`.

    Raises:
        ConfigError: no directory can be made there.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_parent(target)
    with _named(target):
        partial.mkdir()
    yield partial
    replace_directory(partial, target)


def make_parent(target: Path) -> None:
    """Make the directory that a file or directory will lie in, if it is not there; before long work for it.

    Raises:
        ConfigError: it cannot be made.
    """
    with _named(target):
        target.parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """What prevents a directory from being made for `target` is told with its name."""
    try:
        yield
    except OSError as error:
        reason = f"{error.filename} is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(f"{target}: cannot be written ({reason}); choose another place") from error


def write_text(file: Path, text: str) -> None:
    """Write a text file, or replace the one that is there."""
    with replacing(file) as temporary:
        temporary.write_text(text)


def replace_directory(new: Path, target: Path) -> None:
    """Give a directory the name `target`, in one step where the system can exchange two names (Linux).

    Elsewhere it takes two renames; `recover_directory` undoes the first one if the second never came.

    Args:
        new: whole and written, on the same file system.
        target: its name from now on. What has that name is removed afterwards.
    """
    retired = _retired(target)
    shutil.rmtree(retired, ignore_errors=True)
    fsync_path(new)
    if target.exists():  # a directory cannot be renamed onto one that is not empty
        new.rename(retired)  # so that what is left of an interrupted exchange has one name, and never that of work
        if not _exchange(retired, target):
            _in_two_steps(retired, target)
    else:
        new.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(retired, ignore_errors=True)
    shutil.rmtree(_waiting(target), ignore_errors=True)


def recover_directory(target: Path) -> None:
    """Bring back the directory that a `replace_directory` was about to replace when it was stopped.

    Whoever opens a directory that may be replaced calls it first. Where nothing may be written it does nothing.
    """
    if not target.exists():
        for left in (_waiting(target), _retired(target)):
            if left.is_dir():
                with contextlib.suppress(OSError):  # another process was faster, or nothing may be written here
                    left.rename(target)
                return


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _in_two_steps(new: Path, target: Path) -> None:
    waiting = _waiting(target)
    while True:
        shutil.rmtree(waiting, ignore_errors=True)
        target.rename(waiting)
        try:
            new.rename(target)
        except OSError as error:  # somebody who opened it between the two steps has brought the old one back
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                waiting.rename(target)
                raise
        else:
            return


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def _retired(target: Path) -> Path:
    return target.with_name(target.name + ".replaced.partial")


def _waiting(target: Path) -> Path:
    """Where the old one is between two renames."""
    return target.with_name(target.name + ".old.partial")
