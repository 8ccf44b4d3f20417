"""Terminal output of the commands: one console for results, one for progress and notes, and a progress bar with an ETA.

Progress and notes go to standard error and only to a terminal; results go to standard output. Rich honours NO_COLOR.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PIPED_WIDTH = 200  # columns for tables when the output is not a terminal

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
err = Console(stderr=True, highlight=False)

Advance = Callable[[int, int], None]
"""Called with (done, total), in any unit."""


@contextmanager
def progress(label: str, *, is_bytes: bool = False) -> Iterator[Advance]:
    """Show a progress bar on standard error while the block runs; nothing if that is not a terminal."""
    amount: ProgressColumn = DownloadColumn() if is_bytes else TextColumn("{task.completed:,.0f}/{task.total:,.0f}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        amount,
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(label, total=1)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def plain(text: object) -> str:
    """Make text from a file safe to print: without control characters, and with markup escaped."""
    return escape("".join(char for char in str(text) if char.isprintable()))


def size(n_bytes: float) -> str:
    """Format bytes in human-readable form, with about three digits: `96.5 MiB`, `593 MiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while abs(n_bytes) >= 1000 and unit < len(units) - 1:
        n_bytes /= 1024
        unit += 1
    return f"{n_bytes:.0f} {units[unit]}" if unit == 0 or n_bytes >= 100 else f"{n_bytes:.1f} {units[unit]}"
