"""What a slash command of the chat is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A slash command: its argument, its help text, what it runs, and what completes its argument."""

    argument: str
    help: str
    run: Callable[[Any, str], None]
    completes: str = ""  # "paths", "saved" or "settings"
