"""Terminal output of the commands: one console for results, one for progress and notes, and a progress bar with an ETA.

Progress and notes go to standard error, progress as one line per minute where that is not a terminal; results go to
standard output. Rich honours NO_COLOR.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
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
from rich.table import Table

PIPED_WIDTH = 200  # columns for tables when the output is not a terminal
WIDE = 80  # columns that a progress bar with all numbers takes
LINE_EVERY_S = 60.0  # between lines of progress without a terminal

out = Console(highlight=False, width=None if sys.stdout is not None and sys.stdout.isatty() else PIPED_WIDTH)
err = Console(stderr=True, highlight=False)

Advance = Callable[[int, int], None]
"""Called with (done, total), in any unit."""


def print_table(table: Table) -> None:
    """Print a table whole: a terminal that is too narrow breaks its lines, which is easier to read than its cells."""
    natural = Measurement.get(out, out.options.update(max_width=PIPED_WIDTH), table).maximum
    console = out if natural <= out.width else Console(highlight=False, width=natural)
    console.print(table)


def note(line: str, style: str = "dim") -> None:
    """Print one line to standard error, on a terminal and elsewhere."""
    if err.is_terminal:
        err.print(printable(line), style=style, markup=False, soft_wrap=True)
    else:
        print(f"ropewalk: {printable(line)}", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, *, is_bytes: bool = False) -> Iterator[Advance]:
    """Show a progress bar on standard error while the block runs; a line per minute if that is not a terminal."""
    if not err.is_terminal:
        yield _line_per_minute(label, is_bytes)
        return
    amount: ProgressColumn = DownloadColumn() if is_bytes else TextColumn("{task.completed:,.0f}/{task.total:,.0f}")
    columns = [TextColumn("{task.description}"), TaskProgressColumn(), TimeRemainingColumn()]
    if err.width >= WIDE:
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            amount,
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        ]
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(plain(label), total=1)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line_per_minute(label: str, is_bytes: bool) -> Advance:
    started = last = time.monotonic()
    show = size if is_bytes else "{:,}".format

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_EVERY_S or not total:
            return
        last = now
        left = f", about {_minutes((now - started) * (total - done) / done)} left" if done else ""
        note(f"{label}: {100 * done // total} % ({show(done)} of {show(total)}), {_minutes(now - started)}{left}")

    return advance


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def plain(text: object) -> str:
    """Make text from a file safe to print: without control characters, and with markup escaped."""
    return escape(printable(text))


def printable(text: object) -> str:
    """Make text from a file safe to print without markup: no control characters."""
    return "".join(char for char in str(text) if char.isprintable())


def size(n_bytes: float) -> str:
    """Format bytes in human-readable form, with about three digits: `96.5 MiB`, `593 MiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while abs(n_bytes) >= 1000 and unit < len(units) - 1:
        n_bytes /= 1024
        unit += 1
    return f"{n_bytes:.0f} {units[unit]}" if unit == 0 or n_bytes >= 100 else f"{n_bytes:.1f} {units[unit]}"
