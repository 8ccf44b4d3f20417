"""The inputs of the benchmarks: the bundled model unless another is given, and a real text of any length."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

from ropewalk.cli.model import bundled_model as bundled_model


def text(path: Path | None) -> str:
    """The text of the file at `path`, or the standard library's documentation (some 700 kB of English)."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    return "\n\n".join(pydoc_data.topics.topics.values())
