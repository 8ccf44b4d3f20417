"""What has been measured, as lines of JSON, on disk as soon as it is known: nothing is measured twice.

Each line has a key, a digest of all that the result depends on, so that a file may hold the results of any models,
texts and settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from ....errors import UserError
from ....files import LineFile, is_torn, json_value

START, KEY = b'{"key": "', b'", "asked": '
"""How every line starts, and what follows the key."""


class Journal:
    """Results by key, saved in a file (None = not saved).

    Raises:
        UserError: a file of another kind, that cannot be written, or that another run is writing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        self._file: LineFile | None = None
        if path is None:
            return
        self._file = LineFile(path)
        try:
            self._read(self._file)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _read(self, file: LineFile) -> None:
        for number, line in file.read(lambda number, line: is_torn(line, START, KEY, alone=number == 1)):
            record = json_value(line)
            known = isinstance(record, dict) and isinstance(record.get("asked"), dict)
            if not known or not isinstance(record.get("key"), str) or not isinstance(record.get("found"), dict):
                raise UserError(f"{self.path}: line {number} is not a result of ropewalk eval --suite")
            self._known[record["key"]] = record["found"]

    def find(self, key: str) -> dict[str, Any] | None:
        return self._known.get(key)

    def add(self, key: str, asked: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Save a result, and return it; `asked` says what it is of, for people.

        Raises:
            UserError: it cannot be written; or the file was moved, removed or changed.
        """
        self._known[key] = found
        if self._file is not None:
            record = {"key": key, "asked": asked, "found": found}
            self._file.append(json.dumps(record).encode() + b"\n")
        return found

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
