"""The heat maps of a suite: accuracy, and loss on the right answer, by depth and length, for each method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..runtime.measure.suites import AtDepth, Report

WORST = 6.0
"""Loss (nats per token) that gets the darkest colour."""

Map = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def draw_suite(report: Report, title: str) -> Figure:
    """Plot two maps per method, if a task has depths; else accuracy and loss against length.

    A dashed line is where the model's trained length ends.
    """
    methods = [method for method in report.methods if report.depths(method)]
    if not methods:
        return _draw_lines(report, title)
    figure = Figure(figsize=(2 + 1.5 * len(report.lengths) * 2, 1 + 1.9 * len(methods)), layout="constrained")
    rows = figure.subplots(len(methods), 2, squeeze=False)
    for method, (accuracy, loss) in zip(methods, rows, strict=True):
        parts = report.depths(method)
        _draw_map(accuracy, report, {_place(part): part.accuracy for part in parts}, ("RdYlGn", 0.0, 1.0), "{:.0%}")
        _draw_map(loss, report, {_place(part): part.loss for part in parts}, ("YlOrRd", 0.0, WORST), "{:.2f}")
        accuracy.set_ylabel(f"{method}\ndepth of the answer", fontsize=8)
    rows[0][0].set_title("accuracy", fontsize=9)
    rows[0][1].set_title("loss on the right answer (nats per token)", fontsize=9)
    for axes in rows[-1]:
        axes.set_xlabel("length (tokens)", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _place(part: AtDepth) -> tuple[int, float]:
    return part.length, part.low


def _draw_map(
    axes: Axes, report: Report, found: dict[tuple[int, float], float], colours: tuple[str, float, float], form: str
) -> None:
    from ..runtime.measure.suites.report import DEPTH_BINS

    lows = [part / DEPTH_BINS for part in range(DEPTH_BINS)]
    values = np.array([[found.get((length, low), math.nan) for length in report.lengths] for low in lows])
    name, low, high = colours
    image = axes.imshow(values, cmap=name, vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            colour = "white" if dark else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=colour)
    trained = sum(length <= report.original for length in report.lengths)
    if 0 < trained < len(report.lengths):
        axes.axvline(trained - 0.5, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(report.lengths)), [f"{length:,}" for length in report.lengths], fontsize=7)
    axes.set_yticks(range(len(lows)), [f"{low:.0%}–{low + 1 / DEPTH_BINS:.0%}" for low in lows], fontsize=7)


def _draw_lines(report: Report, title: str) -> Figure:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for method in report.methods:
        rows = [row for row in report.rows if row.method == method]
        lengths = [row.length for row in rows]
        accuracy.plot(lengths, [row.accuracy.mean for row in rows], marker=".", label=method)
        loss.plot(lengths, [row.loss.mean for row in rows], marker=".", label=method)
    accuracy.set_ylabel("accuracy")
    loss.set_ylabel("loss on the right answer (nats per token)")
    accuracy.set_ylim(-0.02, 1.02)
    for axes in (accuracy, loss):
        axes.set_xscale("log", base=2)
        axes.set_xticks(report.lengths, [f"{length:,}" for length in report.lengths], fontsize=7)
        axes.set_xlabel("length (tokens)")
        axes.grid(alpha=0.3)
    accuracy.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
