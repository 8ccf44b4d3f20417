"""What has been asked and found, kept by key: nothing is measured twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..keyed_lines import KeyedLines, LineKind

Found = dict[str, Any]


def _found(data: Any) -> Found:
    if not isinstance(data, dict):
        raise ValueError("not what is found")
    return data


ANSWERS: LineKind[Found] = LineKind("a result of ropewalk eval --suite", "asked", "found", _found, _found)


class Journal(KeyedLines[Found]):
    """Answers and losses, saved in a file (None = not saved)."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path, ANSWERS)
