"""Safe writing to disk: whole files, and files of lines.

A whole file is written next to its target as a part file with an unguessable name, and renamed when it is complete:
readers see the old file or the new one, never half of either. Nothing is left behind on failure. The part file of a
killed process is recognised by its lock, which ended with the process, and removed by the next one that writes there.

Lines are on disk before the call that appends them returns, and only one process at a time may append to a file.

Linux and macOS are supported, which have POSIX locks and renames; on Windows use WSL.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

MAX_NAME_BYTES = 255
"""Most bytes of a file's name, on most file systems."""

MAX_STEM_BYTES = 200
"""Most bytes of a target's name that are used in its part file's name."""

DEAD_AFTER_S = 24 * 3600.0
"""On a file system without locks, a part file that has not been written to for this long is dead."""

MAX_LINE = 1 << 26
"""Bytes; a longer line was not written by this program, and is not read as a whole."""

MAX_ZEROS = 1 << 16
"""Most zero bytes that a crash is believed to have left in place of a line."""

# --- whole files


@contextmanager
def replacement(path: str | os.PathLike[str], *, private: bool = False, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a new file, open for reading and appending, that replaces `path` when the block ends.

    Its path until then is its `name`. On any exception it is removed, and `path` stays unchanged. If `path` is a link,
    the link's target is replaced. The file is locked while it is open: see `lock`.

    Args:
        private: the file stays readable by its owner only; otherwise it gets the mode of the file that it replaces, or
            that of any new file.
        sync: wait until it is on disk, so that it survives a power cut.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    _remove_dead_parts(target)
    part, file = _new_part(target)
    try:
        with file:
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
        OSError: it cannot be written; `path` stays unchanged.
    """
    with replacement(path, private=private, sync=sync) as file:
        file.write(data)


def remove_dead_part(path: Path) -> None:
    """Remove the part file at `path` unless the process that writes it is alive.

    On a file system without locks, a part file is dead when it has not been written to for a day.
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
        UserError: it is a folder or not a regular file, or its folder does not exist.
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
    """Make a rename or a new name in `folder` survive a power cut, where the file system supports it."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove_dead_parts(target: Path) -> None:
    """Remove the part files for `target` that killed processes have left behind."""
    name = re.compile(rf"{re.escape(_part_stem(target.name))}\.[0-9a-f]{{16}}\.part")
    with suppress(OSError), os.scandir(target.parent) as found:
        for part in [Path(entry.path) for entry in found if name.fullmatch(entry.name)]:
            remove_dead_part(part)


def _new_part(target: Path) -> tuple[Path, BinaryIO]:
    """Create and lock a part file; one that another process took for dead before it was locked is left to it."""
    while True:
        part = target.with_name(f"{_part_stem(target.name)}.{secrets.token_hex(8)}.part")
        file = open(part, "x+b", opener=_open_private)  # noqa: SIM115
        if lock(file.fileno()) and is_same(file.fileno(), part):
            return part, file
        file.close()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND | os.O_NOFOLLOW, 0o600)


def _part_stem(name: str) -> str:
    return "." + os.fsdecode(os.fsencode(name)[:MAX_STEM_BYTES])


def _mode_of(target: Path) -> int:
    """The mode of the file at `target`, or the one that a new file would get."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        mask = os.umask(0o077)  # it can only be read by setting it
        os.umask(mask)
        return 0o666 & ~mask


# --- locks


def lock(fd: int) -> bool:
    """Lock an open file for this process, until it is closed or the process ends; False if another process has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: better an unlocked file than none
    return True


def is_same(fd: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


# --- files of lines


def open_locked(path: Path) -> int:
    """Open `path` for reading and appending, create it if it is missing, lock it, and return the descriptor.

    If `path` is a link, the link's target is opened.

    Raises:
        UserError: it is a folder, cannot be written to, or is open in another process.
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
        if is_same(fd, target):  # otherwise another run has just replaced or removed it
            return fd
        os.close(fd)


STRING = re.compile(rb'(?:[^"\\]|\\.)*\\?', re.DOTALL)  # up to its closing quotes, or to the end


def append_line(fd: int, path: Path, line: bytes) -> None:
    """Append one line, with its newline, and sync it to disk: whole or not at all.

    Raises:
        UserError: it cannot be written; the file is unchanged.
    """
    size = os.fstat(fd).st_size
    try:
        write_all(fd, line)
        os.fsync(fd)
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(fd, size)
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, in as many calls as that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def json_value(line: bytes) -> Any:
    """The JSON value in `line`; None if it is not JSON, nested too deeply, or has numbers too long to read."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def is_torn(line: bytes, start: bytes, key: bytes = b"", *, alone: bool = False) -> bool:
    """Whether `line`, the last of a file, is an incomplete line of JSON that this program wrote.

    Such a line starts with `start`; with a `key`, the rest of a string and then `key` follow. If the line stands
    `alone`, with no complete one before it, it must reach beyond `key`, or not beyond `start`, to be recognised. A
    crash can leave zeros in place of what was to be written. What parses is never torn.
    """
    rest = line.rstrip(b"\0")
    if line.endswith(b"\n") or len(line) - len(rest) > MAX_ZEROS or json_value(rest) is not None:
        return False
    if len(rest) <= len(start):
        return start.startswith(rest)
    if not rest.startswith(start):
        return False
    text = STRING.match(rest, len(start))
    after = rest[text.end() :] if text else b""
    return after.startswith(key) or (not alone and key.startswith(after))


def close_log(fd: int, path: Path) -> None:
    """Close the file, which releases the lock; remove it if it is empty."""
    target = Path(os.path.realpath(path))
    if os.fstat(fd).st_size == 0 and is_same(fd, target):
        target.unlink()
    os.close(fd)


class LineFile:
    """A file of lines that this process alone appends to; see `open_locked`.

    Opening and reading it changes nothing: a torn last line is cut off with the first `append`.

    Raises:
        UserError: as `open_locked`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        existed = os.path.lexists(os.path.realpath(path))
        self._fd = open_locked(path)
        self._created = not existed
        self._size = self._kept = os.fstat(self._fd).st_size
        self._newline_missing = False

    def close(self) -> None:
        """Close the file, which releases the lock; remove it if it was created here and nothing was written."""
        if self._fd >= 0:
            if self._created:
                close_log(self._fd, self.path)
            else:
                os.close(self._fd)
            self._fd = -1

    def read(self, torn: Callable[[int, bytes], bool]) -> Iterator[tuple[int, bytes]]:
        """Yield each line and its number, from 1; not a last one of which `torn` says that it is torn."""
        end = 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
                is_last = not line.endswith(b"\n") and len(line) < MAX_LINE
                if is_last and torn(number, line):
                    self._kept = end
                    return
                yield number, line.rstrip(b"\0") if is_last else line
                if is_last:
                    self._kept, self._newline_missing = end + len(line.rstrip(b"\0")), True
                end += len(line)

    def drop_all(self) -> None:
        """Let the first `append` start the file over."""
        self._kept, self._newline_missing = 0, False

    def append(self, line: bytes) -> None:
        """Append one line, with its newline, and sync it to disk: whole or not at all.

        Raises:
            UserError: it cannot be written; or the file is no longer the one at its path, which is checked when the
                line is in it (so that nothing is lost of a file that was only moved), or another program wrote to it.
        """
        if os.fstat(self._fd).st_size != self._size:
            raise UserError(f"{self.path}: another program has changed it during the run, which has stopped")
        try:
            if self._kept != self._size:
                os.ftruncate(self._fd, self._kept)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write: {error.strerror or error}") from None
        self._size = self._kept
        append_line(self._fd, self.path, b"\n" * self._newline_missing + line)
        self._newline_missing = False
        self._size = self._kept = os.fstat(self._fd).st_size
        self.check_place()

    def check_place(self) -> None:
        """Check that the file is still the one at its path.

        Raises:
            UserError: it was moved, removed or replaced.
        """
        if not is_same(self._fd, self.path):
            raise UserError(f"{self.path}: was moved, removed or replaced during the run, which has stopped")

    def rewrite(self, wanted: Callable[[bytes], bool]) -> None:
        """Replace the file with one of the wanted lines only, without ever releasing the lock.

        Raises:
            UserError: it cannot be written, and stays as it is; or as `check_place`.
        """
        self.check_place()
        fd = -1
        try:
            with os.fdopen(os.dup(self._fd), "rb") as file:
                file.seek(0)
                lines = (file.read(self._kept) + b"\n" * self._newline_missing).splitlines(keepends=True)
            with replacement(self.path) as file:
                file.writelines(line for line in lines if wanted(line))
                file.flush()
                size = os.fstat(file.fileno()).st_size
                fd = os.dup(file.fileno())  # shares the lock
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise UserError(f"{self.path}: cannot write: {error.strerror or error}") from None
        os.close(self._fd)
        self._fd, self._size, self._kept, self._newline_missing = fd, size, size, False
        self._created = self._created or not size  # what was there was ours, and is gone
