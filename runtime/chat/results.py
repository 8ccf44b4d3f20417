"""The output of a batch of summaries: JSON Lines that survive being killed at any moment.

One JSON object per line, on disk before the next document is started. Opening an output again finds what is done,
repairs a torn line, and refuses a file that is something else. While it is open no other run can open it; the lock is
released with the process, however that ends.
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
"""How every line starts; distinguishes a torn line from the last line of another file."""

STDOUT_FD = 1  # not sys.stdout, which a progress bar may have taken over

Key = tuple[str, str, str]
"""(id, digest of the input, digest of model, prompt and settings): identifies a summary."""


class Results:
    """An output file, open for appending.

    Args:
        path: a file that does not exist yet is created, and removed again if nothing is ever written.
        force: ignore what the file holds; `begin` empties it.

    Attributes:
        done: number of records without an error, by key.

    Raises:
        UserError: a folder, a file that cannot be written, not this program's output, or in use by another run.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path = path
        self._target = Path(os.path.realpath(path))  # of a link, the target is written and replaced
        self.done: Counter[Key] = Counter()
        self._force = force
        self._errors: set[str] = set()
        self._fd = open_locked(path)
        try:
            if not force:
                self._repair(self._read())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and release the lock; an empty file is removed."""
        if self._fd < 0:
            return
        close_log(self._fd, self._target)
        self._fd = -1

    def take_done(self, key: Key) -> bool:
        """Whether there is a record of this key; each one counts once, as two documents may be the same."""
        if self.done[key] < 1:
            return False
        self.done[key] -= 1
        return True

    def begin(self, retried: Collection[str]) -> None:
        """Prepare to append: drop everything if forced, otherwise the errors of the documents in `retried`."""
        if self._force:
            os.ftruncate(self._fd, 0)
        elif self._errors.intersection(retried):
            self._rewrite(lambda record: "error" not in record or record["id"] not in retried)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record to disk, whole or not at all.

        Raises:
            UserError: it cannot be written; the file is unchanged.
        """
        append_line(self._fd, self.path, record_line(record))

    def _lines(self) -> Iterator[bytes]:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            yield from file

    def _read(self) -> tuple[int, bool]:
        """Read the records; return the end of the last whole one, in bytes, and whether its newline is missing."""
        end = 0
        for number, line in enumerate(self._lines(), 1):
            record = _parse(line)
            if record is None:
                if is_torn(line, BEGINNING):
                    return end, False
                raise UserError(
                    f"{self.path}: line {number} is not a result of ropewalk summarize;"
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

    def _repair(self, found: tuple[int, bool]) -> None:
        end, newline_missing = found
        os.ftruncate(self._fd, end)
        if newline_missing:
            write_all(self._fd, b"\n")

    def _rewrite(self, wanted: Any) -> None:
        """Replace the file with one of the wanted records only, without ever releasing the lock."""
        fd = -1
        try:
            with replacement(self._target) as file:
                file.writelines(line for line in self._lines() if wanted(json.loads(line)))
                fd = os.dup(file.fileno())  # shares the lock
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise UserError(f"{self.path}: cannot write: {error.strerror or error}") from None
        os.close(self._fd)
        self._fd = fd


class StandardOutput:
    """Standard output instead of a file: no earlier records, no lock."""

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
    """Return one record as a line of UTF-8; what UTF-8 cannot encode (odd file names) becomes JSON escapes."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def settings_digest(settings: dict[str, Any]) -> str:
    """Return a digest of model, prompt and settings: equal if and only if all of them are."""
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
