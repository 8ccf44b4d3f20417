"""The progress of a search: one line per band on a terminal, one line per minute elsewhere."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table

from .terminal import LINE_EVERY_S, err, note, plain, printable

if TYPE_CHECKING:
    from ..runtime.measure import SearchEvent


METHODS = {"yarn": "YaRN", "ntk": "NTK", "pi": "PI", "near": "near"}


class SearchTable:
    """A live table of the bands searched so far.

    Attributes:
        curves: by context, (evaluations, lowest loss) whenever that fell, and the baselines' losses.
    """

    def __init__(self) -> None:
        self.curves: dict[int, tuple[list[tuple[float, float]], dict[str, float]]] = {}
        self._rows: list[list[str]] = []
        self._context, self._spent = 0, 0.0
        self._line_at = time.monotonic()
        self._live = Live(console=err, refresh_per_second=2, transient=True, get_renderable=self._table)

    def __enter__(self) -> SearchTable:
        if err.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if err.is_terminal:
            self._live.stop()

    def take(self, event: SearchEvent) -> None:
        """Show one event."""
        from ..factors.search import Note, Progress
        from ..runtime.measure import Judging, Searching

        if isinstance(event, Searching):
            self._context = event.context
            self._rows.append([f"{event.context:,}", "baselines", *[""] * (2 + len(METHODS))])
            self.curves[event.context] = ([], {})
            speeds = ", ".join(f"{kind} {speed:.0f}" for kind, speed in event.speeds.items())
            self._note(f"{event.context:,}: {event.evaluator} reads" + (f" (tokens/s: {speeds})" if speeds else ""))
        elif isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, Note):
            self._note(event.text)
        elif isinstance(event, Judging):
            curve, _ = self.curves[event.context]
            if event.done == 1 and curve:
                curve.append((self._spent, curve[-1][1]))  # so that the plot shows how long nothing improved
            self._rows[-1][1] = f"held-out texts: {event.done} of {event.total} read"
            self._rows[-1][3] = ""
        if not err.is_terminal and self._rows and time.monotonic() - self._line_at >= LINE_EVERY_S:
            self._line_at = time.monotonic()
            note(self._line())

    def _line(self) -> str:
        context, step, spent, left, change, *_ = self._rows[-1]
        parts = [step, spent and f"{spent} evaluations", left and f"{left} left", change and f"{change} against YaRN"]
        return f"Searching {context}: " + ", ".join(filter(None, parts))

    def _progress(self, event: Any) -> None:
        curve, baselines = self.curves[self._context]
        self._spent = event.evaluations
        if math.isfinite(event.best) and (not curve or event.best < curve[-1][1]):
            curve.append((event.evaluations, event.best))
        baselines.update(event.baselines)
        spent = f"{event.evaluations:.1f}" + (f" of {event.of:g}" if event.of else "")
        self._rows[-1][1:4] = [event.step, spent, _left(event)]
        for i, method in enumerate(METHODS, 4):
            if method in event.baselines and math.isfinite(event.best):
                self._rows[-1][i] = f"{math.expm1(event.best - event.baselines[method]):+.2%}"

    def _note(self, text: str) -> None:
        if err.is_terminal:
            self._live.console.print(printable(text), style="dim", markup=False, highlight=False)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("context", "step", "evaluations", "time left", *(f"best/{name}" for name in METHODS.values())):
            table.add_column(name, justify="left" if name == "step" else "right")
        for row in self._rows:
            table.add_row(*map(plain, row))
        return table


def _left(event: Any) -> str:
    """Time left of the budget, estimated from the speed so far."""
    if event.of_seconds is not None:
        left = event.of_seconds - event.seconds
    elif event.of and event.evaluations:
        left = (event.of - event.evaluations) * event.seconds / event.evaluations
    else:
        return ""
    return time.strftime("%H:%M:%S", time.gmtime(max(left, 0)))
