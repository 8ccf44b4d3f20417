"""Results by key in a JSON Lines file, on disk as soon as they are known: nothing is measured twice, over any runs.

A key is a digest of all that its result depends on, so that a file may hold the results of any models, texts and
settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from ...errors import UserError
from ...files import LineFile, is_torn, json_value

Result = TypeVar("Result")
Lines = TypeVar("Lines", bound="KeyedLines[Any]")


@dataclass(frozen=True)
class LineKind(Generic[Result]):
    """What the lines of a file hold, after their key."""

    what: str
    """For messages: "a reading of ropewalk eval"."""
    about: str
    """The name under which a line says, for people, what its result is of."""
    result: str
    """The name of the result."""
    decode: Callable[[Any], Result]
    """Makes a result of decoded JSON; raises a ValueError, TypeError, KeyError, AttributeError or OverflowError."""
    encode: Callable[[Result], Any]
    """Makes what can be written of it; may refuse it with a UserError."""


class KeyedLines(Generic[Result]):
    """Results by key, saved in a file (None = not saved).

    Raises:
        UserError: a file of another kind, that cannot be written, or that another run is writing.
    """

    def __init__(self, path: Path | None, kind: LineKind[Result]) -> None:
        self.path, self._kind = path, kind
        self._known: dict[str, Result] = {}
        self._file: LineFile | None = None
        if path is None:
            return
        self._file = LineFile(path)
        try:
            self._read(self._file)
        except BaseException:
            self.close()
            raise

    def __enter__(self: Lines) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _read(self, file: LineFile) -> None:
        start, after_key = b'{"key": "', f'", "{self._kind.about}": '.encode()
        for number, line in file.read(lambda number, line: is_torn(line, start, after_key, alone=number == 1)):
            record = json_value(line)
            try:
                key, about = record["key"], record[self._kind.about]
                if not isinstance(key, str) or not isinstance(about, dict):
                    raise ValueError("another kind of line")
                self._known[key] = self._kind.decode(record[self._kind.result])
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                raise UserError(f"{self.path}: line {number} is not {self._kind.what}") from None

    def find(self, key: str) -> Result | None:
        return self._known.get(key)

    def add(self, key: str, about: dict[str, Any], result: Result) -> Result:
        """Save a result, and return it; `about` says what it is of, for people.

        Raises:
            UserError: it is not one to keep; it cannot be written; or the file was moved, removed or changed.
        """
        encoded = self._kind.encode(result)
        self._known[key] = result
        if self._file is not None:
            record = {"key": key, self._kind.about: about, self._kind.result: encoded}
            self._file.append(json.dumps(record).encode() + b"\n")
        return result

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
