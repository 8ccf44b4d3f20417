"""The output of a batch of summaries: JSON Lines that survive being killed at any moment.

One JSON object per line, on disk before the next document is started. Opening an output again finds what is done,
and refuses a file that is something else; a torn line is dropped when there is something to write. While it is open no
other run can open it; the lock is released with the process, however that ends.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import UserError
from ...files import LineFile, is_torn, json_value, write_all

START, KEY = b'{"id": "', b'", "source": "'
"""How every line starts, and what follows the id; distinguishes a torn line from the last line of another file."""

STDOUT_FD = 1  # not sys.stdout, which a progress bar may have taken over

Key = tuple[str, str, str]
"""(id, digest of the input, digest of model, prompt and settings): identifies a summary."""


class Results:
    """An output file, open for appending.

    What the file holds changes only when there is something to write.

    Args:
        path: a file that does not exist yet is created, and removed again if nothing is ever written.
        force: ignore what the file holds; the first record replaces it.

    Attributes:
        done: number of records without an error, by key.
        paths: where their documents were, by key.

    Raises:
        UserError: a folder, a file that cannot be written, not this program's output, or in use by another run.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path = path
        self.done: Counter[Key] = Counter()
        self.paths: dict[Key, Any] = {}
        self._errors: set[str] = set()
        self._file = LineFile(path)
        try:
            if force:
                self._file.drop_all()
            else:
                self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and release the lock; a new file that is still empty is removed."""
        self._file.close()

    def take_done(self, key: Key) -> bool:
        """Whether there is a record of this key; each one counts once, as two documents may be the same."""
        if self.done[key] < 1:
            return False
        self.done[key] -= 1
        return True

    def begin(self, retried: Collection[str]) -> None:
        """Prepare to append: drop the errors of the documents in `retried`.

        Raises:
            UserError: the file was moved or removed, or cannot be written.
        """
        self._file.check_place()
        if self._errors.intersection(retried):
            self._file.rewrite(lambda line: not _is_error_of(json.loads(line), retried))

    def drop(self, keys: Collection[Key]) -> None:
        """Drop all records of these keys.

        Raises:
            UserError: the file cannot be written, and stays as it is.
        """
        if keys:
            self._file.rewrite(lambda line: _key(json.loads(line)) not in keys)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record to disk, whole or not at all.

        Raises:
            UserError: it cannot be written, and the file is unchanged; or the file was moved, removed or changed.
        """
        self._file.append(record_line(record))

    def _read(self) -> None:
        for number, line in self._file.read(_is_torn):
            record = _parse(line)
            if record is None:
                raise UserError(
                    f"{self.path}: line {number} is not a result of ropewalk summarize;"
                    " name another output, or start over with --force"
                )
            key = _key(record)
            if key is None:
                self._errors.add(record["id"])
            else:
                self.done[key] += 1
                self.paths[key] = record.get("path")


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

    @property
    def paths(self) -> dict[Key, Any]:
        return {}

    def take_done(self, key: Key) -> bool:
        return False

    def begin(self, retried: Collection[str]) -> None:
        pass

    def drop(self, keys: Collection[Key]) -> None:
        pass

    def append(self, record: dict[str, Any]) -> None:
        """Write one record.

        Raises:
            UserError: it cannot be written.
            BrokenPipeError: nobody reads it any more.
        """
        try:
            write_all(STDOUT_FD, record_line(record))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(f"standard output: cannot write: {error.strerror or error}") from None


def record_line(record: dict[str, Any]) -> bytes:
    """Return one record as a line of UTF-8; what UTF-8 cannot encode (odd file names) becomes JSON escapes."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def settings_digest(settings: dict[str, Any]) -> str:
    """Return a digest of model, prompt and settings: equal if and only if all of them are."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _is_torn(number: int, line: bytes) -> bool:
    return is_torn(line, START, KEY, alone=number == 1)


def _parse(line: bytes) -> dict[str, Any] | None:
    record = json_value(line)
    if not isinstance(record, dict):
        return None
    wanted = ("id", "settings", "error") if "error" in record else ("id", "settings", "digest", "summary")
    return record if all(isinstance(record.get(key), str) for key in wanted) else None


def _key(record: dict[str, Any]) -> Key | None:
    """The key of a record; None if it has an error instead of a summary."""
    return None if "error" in record else (record["id"], record["digest"], record["settings"])


def _is_error_of(record: dict[str, Any], ids: Collection[str]) -> bool:
    return "error" in record and record["id"] in ids
