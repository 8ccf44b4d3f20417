"""Plots of schedules, losses and searches: as a line of characters for the terminal, and as PNG files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import check_place, replacement

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

    from ..factors import Schedule

BARS = "▁▂▃▄▅▆▇█"
STILL = "·"
MAX_COLUMNS = 64


def spark(schedule: Schedule) -> list[tuple[str, str]]:
    """λ against dimension: for each band (context, one bar per rotary pair), all on one logarithmic scale.

    A pair that stands still beyond the near window has a dot.
    """
    logs = [[math.log(factor) for factor in band.rescale_factors] for band in schedule.bands]
    moving = [math.log(factor) for band in schedule.bands for factor in band.moving_factors]
    low, high = min(moving), max(moving)
    every = -(-len(logs[0]) // MAX_COLUMNS)
    rows = []
    for band, values in zip(schedule.bands, logs, strict=True):
        heights = [(value - low) / (high - low) if high > low else 0 for value in values]
        bars = [BARS[min(max(int(h * 8), 0), 7)] for h in heights]
        bars[: band.still_pairs] = [STILL] * band.still_pairs
        rows.append((f"{band.context:,}", "".join(bars[::every])))
    return rows


def draw_factors(schedule: Schedule, title: str) -> Figure:
    """Plot λ against the rotary pair, one line per band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for band in schedule.bands:
        extras = [f"beyond the nearest {band.near_tokens:,}"] if band.near_tokens else []
        extras += [f"{band.still_pairs} pairs stand still"] if band.still_pairs else []
        extras += [f"n̂ {band.start_tokens}"] if band.start_tokens else []
        extras += [f"attention × {band.attention_factor:.3f}"] if band.attention_factor != 1 else []
        label = f"{band.context:,} tokens" + (f" ({', '.join(extras)})" if extras else "")
        pairs = range(band.still_pairs, len(band.rescale_factors))
        axes.plot(pairs, band.moving_factors, marker=".", markersize=4, linewidth=1.5, label=label)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    facts = schedule.facts
    axes.set_xlabel(f"rotary pair i of {facts.n_rot // 2} (base {facts.freq_base:g}): rotates fastest → slowest")
    axes.set_ylabel("rescale factor λ")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_losses(curves: dict[str, npt.NDArray[np.float64]], start: int, title: str) -> Figure:
    """Plot perplexity against position, from losses (nats) at positions from `start` on, smoothed over 256 tokens."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        window = min(256, len(losses))
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(start + window / 2 + np.arange(len(mean)), np.exp(mean), linewidth=1.2, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("perplexity (mean of 256 tokens)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def draw_search(curves: dict[int, tuple[list[tuple[float, float]], dict[str, float]]], title: str) -> Figure:
    """Plot the lowest loss against evaluations, by context, with the closed forms' losses as horizontal lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2 * len(curves)), layout="constrained")
    for axes, (context, (curve, baselines)) in zip(
        figure.subplots(len(curves), squeeze=False)[:, 0], curves.items(), strict=True
    ):
        axes.step(*zip(*curve, strict=True), where="post", linewidth=1.6, marker=".", label="searched")
        worst = max(loss for _, loss in curve)
        for (method, loss), style in zip(baselines.items(), ("--", ":", "-.", (0, (5, 1))), strict=False):
            if loss - worst < 0.2:  # one that is far worse would squeeze the curve flat
                axes.axhline(loss, linestyle=style, linewidth=1, color="grey", label=method)
        axes.set_xlabel("evaluations (one = all texts, read in full)")
        axes.set_ylabel(f"loss at {context:,} (nats/token)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def check_picture_place(path: Path) -> None:
    """Check where a picture is to be saved, before the long work whose result it shows.

    Raises:
        UserError: not a PNG file, a folder, or in a folder that does not exist.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot: {str(path)!r}, expected a name that ends in .png")
    check_place(path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, completely or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with replacement(path) as file:
            figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise UserError(f"{path}: cannot write the picture: {error.strerror or error}") from None
