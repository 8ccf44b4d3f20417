"""Files of lines that survive being killed at any moment, one writer at a time.

A line is on the disk before the call that appends it returns. While a file is open for appending, no other process
can open it so; the lock goes with the process, however that ends.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no lock, and whoever starts two runs at once is on their own
    fcntl = None  # type: ignore[assignment]


def open_locked(path: Path) -> int:
    """Open `path` for reading and appending, made if it is missing, and lock it; returns the descriptor.

    Where `path` is a link, what it leads to is meant.

    Raises:
        UserError: a folder, no place to write, or open in another process.
    """
    check_place(path)
    target = Path(os.path.realpath(path))
    while True:
        try:
            fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
        if not lock(fd):
            os.close(fd)
            raise UserError(f"{path}: another run is writing it")
        if is_same(fd, target):  # or else another run has just replaced or removed it
            return fd
        os.close(fd)


def append_line(fd: int, path: Path, line: bytes) -> None:
    """Put one line, with its newline, on the disk: whole or not at all.

    Raises:
        UserError: it cannot be written; the file is as before.
    """
    size = os.fstat(fd).st_size
    try:
        write(fd, line)
        os.fsync(fd)
    except OSError as error:
        os.ftruncate(fd, size)
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None


def is_torn(line: bytes, beginning: bytes) -> bool:
    """Whether a line is the rest of a last one that begins so; a crash can leave zeros in its place."""
    rest = line.rstrip(b"\0")
    return not line.endswith(b"\n") and (rest.startswith(beginning) or beginning.startswith(rest))


def close_log(fd: int, path: Path) -> None:
    """Let go of the file, and of the lock; an empty one is removed."""
    target = Path(os.path.realpath(path))
    if os.fstat(fd).st_size == 0 and is_same(fd, target):
        target.unlink()
    os.close(fd)


def write(fd: int, data: bytes) -> None:
    """Write all of `data`, however often that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def lock(fd: int) -> bool:
    """Lock an open file for this process; False if another has it."""
    if fcntl is not None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without locks: better unlocked than not at all
    return True


def is_same(fd: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def check_place(path: Path) -> None:
    """Refuse a path where no file can be written.

    Raises:
        UserError: a folder, no regular file, or in a folder that does not exist.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UserError(f"{path}: its folder does not exist") from None
        return
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UserError(f"{path}: is {kind}, expected a file to write to")
