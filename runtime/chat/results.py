"""The output of a batch of summaries: JSON Lines that survive being killed at any moment.

One JSON object a line, on the disk before the next document is begun. Opening an output again finds what is done,
mends a line that was torn, and refuses a file that is something else. While it is open no other run can open it; the
lock goes with the process, however that ends.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import UserError
from ...files import append_line, close_log, is_torn, open_locked, replacement, write_all

BEGINNING = b'{"id": '
"""How every line begins; a torn one is told by it from another file's last line."""

STDOUT_FD = 1  # past sys.stdout, which a progress bar may have taken over

Key = tuple[str, str, str]
"""(id, digest of the input, digest of model, prompt and settings): what makes a document the same one."""


class Results:
    """An output file, open for appending.

    Args:
        path: where; a file that does not exist yet is made, and goes again if nothing is ever written.
        force: disregard what the file holds; it is emptied when the first record comes.

    Attributes:
        done: how many records without an error there are of each key.

    Raises:
        UserError: a folder, no place to write, not this program's output, or being written by another run.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path = path
        self._target = Path(os.path.realpath(path))  # where a link leads is what is written, and replaced
        self.done: Counter[Key] = Counter()
        self._force = force
        self._errors: set[str] = set()
        self._fd = open_locked(path)
        try:
            if not force:
                self._mend(self._read())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file, and of the lock; an empty one is removed."""
        if self._fd < 0:
            return
        close_log(self._fd, self._target)
        self._fd = -1

    def take_done(self, key: Key) -> bool:
        """Whether a record of this key is there; each one counts once, as two documents may be alike."""
        if self.done[key] < 1:
            return False
        self.done[key] -= 1
        return True

    def begin(self, retried: Collection[str]) -> None:
        """Make ready to append: drop everything if forced, or else the errors of the documents in `retried`."""
        if self._force:
            os.ftruncate(self._fd, 0)
        elif self._errors.intersection(retried):
            self._rewrite(lambda record: "error" not in record or record["id"] not in retried)

    def append(self, record: dict[str, Any]) -> None:
        """Put one record on the disk, whole or not at all.

        Raises:
            UserError: it cannot be written; the file is as before.
        """
        append_line(self._fd, self.path, record_line(record))

    def _lines(self) -> Iterator[bytes]:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            yield from file

    def _read(self) -> tuple[int, bool]:
        """Take in what is there: bytes up to the end of the last whole record, and whether its newline is missing."""
        end = 0
        for number, line in enumerate(self._lines(), 1):
            record = _parse(line)
            if record is None:
                if is_torn(line, BEGINNING):
                    return end, False
                raise UserError(
                    f"{self.path}: line {number} is no result of ropewalk summarize;"
                    " name another output, or start over with --force"
                )
            end += len(line)
            if "error" in record:
                self._errors.add(record["id"])
            else:
                self.done[(record["id"], record["digest"], record["settings"])] += 1
            if not line.endswith(b"\n"):
                return end, True
        return end, False

    def _mend(self, found: tuple[int, bool]) -> None:
        end, newline_missing = found
        os.ftruncate(self._fd, end)
        if newline_missing:
            write_all(self._fd, b"\n")

    def _rewrite(self, wanted: Any) -> None:
        """Replace the file by one with the wanted records only, never without the lock."""
        fd = -1
        try:
            with replacement(self._target) as file:
                file.writelines(line for line in self._lines() if wanted(json.loads(line)))
                fd = os.dup(file.fileno())  # the lock goes with it
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise UserError(f"{self.path}: cannot write: {error.strerror or error}") from None
        os.close(self._fd)
        self._fd = fd


class StandardOutput:
    """Standard output in the place of a file: nothing is done before, nothing is locked."""

    path = Path("-")

    def __enter__(self) -> StandardOutput:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def done(self) -> Counter[Key]:
        return Counter()

    def take_done(self, key: Key) -> bool:
        return False

    def begin(self, retried: Collection[str]) -> None:
        pass

    def append(self, record: dict[str, Any]) -> None:
        write_all(STDOUT_FD, record_line(record))


def record_line(record: dict[str, Any]) -> bytes:
    """One record as a line of UTF-8; what UTF-8 cannot say (odd file names) becomes JSON's own escapes."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def settings_digest(settings: dict[str, Any]) -> str:
    """A short name for a model, prompt and settings: equal if and only if all of them are."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    wanted = ("id", "settings", "error") if "error" in record else ("id", "settings", "digest", "summary")
    return record if all(isinstance(record.get(key), str) for key in wanted) else None
