"""The one place that puts bytes on a disk safely: whole files, and files of lines.

A whole file is written beside its place, under a name that nobody can guess, and renamed when it is complete: readers
see the old file or the new one, never half of either. Nothing is left behind on failure, and what a killed process
leaves is told by its lock, which ends with the process, and removed by the next one that writes there.

Lines are on the disk before the call that appends them returns, and one process at a time may append to a file.

Linux and macOS are supported, which have POSIX locks and renames; on Windows use WSL.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

LONGEST_STEM = 200
"""Bytes of a target's name that go into its part's name, as most file systems allow 255."""

DEAD_AFTER_S = 24 * 3600.0
"""A part that nobody has written to for so long is dead, where the file system knows no locks."""

# --- whole files


@contextmanager
def replacement(path: str | os.PathLike[str], *, private: bool = False, sync: bool = True) -> Iterator[BinaryIO]:
    """A new file, open for reading and appending, that takes the place of `path` when the block is done.

    Its own path until then is its `name`. On any exception nothing of it is left, and what was at `path` stays. Where
    `path` is a link, what it leads to is replaced. The file is locked while it is open: see `lock`.

    Args:
        private: the file stays readable by its owner alone; otherwise it ends with the mode of the file that it
            replaces, or of any new file.
        sync: wait until it is on the disk, so that it survives a power cut.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    _remove_dead_parts(target)
    part = target.with_name(f"{_part_stem(target.name)}.{secrets.token_hex(8)}.part")
    try:
        with open(part, "x+b", opener=_open_private) as file:
            lock(file.fileno())
            yield file
            file.flush()
            if not private:
                os.fchmod(file.fileno(), _mode_of(target))
            if sync:
                os.fsync(file.fileno())
            part.replace(target)
            if sync:
                sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


def write_file(path: str | os.PathLike[str], data: bytes, *, private: bool = False, sync: bool = True) -> None:
    """Write a small file, whole or not at all; see `replacement`.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    with replacement(path, private=private, sync=sync) as file:
        file.write(data)


def remove_dead_part(path: Path) -> None:
    """Remove a part at `path` unless the process that writes it is alive.

    Where the file system knows no locks, a part is dead when nobody has written to it for a day.
    """
    with suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError:
                if os.fstat(fd).st_mtime > time.time() - DEAD_AFTER_S:
                    return
            if is_same(fd, path):
                path.unlink()
        finally:
            os.close(fd)


def check_place(path: Path) -> None:
    """Refuse a path where no file can be written.

    Raises:
        UserError: a folder, not a regular file, or in a folder that does not exist.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UserError(f"{path}: its folder does not exist (no such folder: {path.parent})") from None
        return
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UserError(f"{path}: is {kind}, expected a file to write to")


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` survive a power cut; not every file system can."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove_dead_parts(target: Path) -> None:
    """Remove what killed processes have left of replacements of `target`."""
    name = re.compile(rf"{re.escape(_part_stem(target.name))}\.[0-9a-f]{{16}}\.part")
    with suppress(OSError), os.scandir(target.parent) as found:
        for part in [Path(entry.path) for entry in found if name.fullmatch(entry.name)]:
            remove_dead_part(part)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND | os.O_NOFOLLOW, 0o600)


def _part_stem(name: str) -> str:
    return "." + os.fsdecode(os.fsencode(name)[:LONGEST_STEM])


def _mode_of(target: Path) -> int:
    """The mode of the file at `target`, or the one that a new file would get."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        mask = os.umask(0o077)  # reading it is to set it
        os.umask(mask)
        return 0o666 & ~mask


# --- locks


def lock(fd: int) -> bool:
    """Lock an open file for this process, until it is closed or the process ends; False if another has it."""
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


# --- files of lines


def open_locked(path: Path) -> int:
    """Open `path` for reading and appending, made if it is missing, and lock it; returns the descriptor.

    Where `path` is a link, what it leads to is meant.

    Raises:
        UserError: a folder, not a place to write to, or open in another process.
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
        write_all(fd, line)
        os.fsync(fd)
    except OSError as error:
        os.ftruncate(fd, size)
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def is_torn(line: bytes, beginning: bytes) -> bool:
    """Whether a last line without its newline is the rest of one that begins with `beginning`.

    A crash can leave zeros in place of what was to be written.
    """
    rest = line.rstrip(b"\0")
    return not line.endswith(b"\n") and (rest.startswith(beginning) or beginning.startswith(rest))


def close_log(fd: int, path: Path) -> None:
    """Close the file, which ends the lock; an empty one is removed."""
    target = Path(os.path.realpath(path))
    if os.fstat(fd).st_size == 0 and is_same(fd, target):
        target.unlink()
    os.close(fd)
