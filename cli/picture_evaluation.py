"""The plot of an evaluation: perplexity against position by method, and the keys' losses by depth and context."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..runtime.measure import KeyPassage, Reading

SMOOTH = 8
"""Number of a reading's bins that are drawn as one point."""

WORST = 6.0
"""Loss on a key (nats) that gets the darkest colour."""

Readings = dict[tuple[int, str], list[tuple["KeyPassage", "Reading"]]]


def draw_evaluation(found: Readings, original: int, title: str) -> Figure:
    """Plot one row per context: perplexity against position, and the loss on keys by depth and method."""
    contexts = list(dict.fromkeys(context for context, _ in found))
    figure = Figure(figsize=(10, 2.4 * len(contexts) + 1), layout="constrained")
    rows = figure.subplots(len(contexts), 2, squeeze=False, width_ratios=(3, 1))
    for context, (curves, keys) in zip(contexts, rows, strict=True):
        chosen = {method: readings for (at, method), readings in found.items() if at == context}
        _draw_curves(curves, chosen, context, original)
        _draw_keys(keys, chosen)
    rows[0][0].legend(fontsize=8, ncols=3)
    rows[0][1].set_title("loss on the key (nats; ✓ found)", fontsize=9)
    rows[-1][0].set_xlabel("position in the text (tokens)")
    rows[-1][1].set_xlabel("depth of the key")
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_curves(axes: Axes, chosen: dict[str, list[tuple[KeyPassage, Reading]]], context: int, original: int) -> None:
    from ..runtime.measure import BIN

    for method, readings in chosen.items():
        shortest = min(len(reading.losses) for _, reading in readings)
        mean = np.mean([reading.losses[:shortest] for _, reading in readings], axis=0)
        count = max(1, shortest // SMOOTH)
        parts = np.array_split(mean, count)
        middles = (np.cumsum([len(part) for part in parts]) - len(parts[0]) / 2) * BIN
        axes.plot(
            middles, np.exp([part.mean() for part in parts]), linewidth=1.3, marker=".", markersize=3, label=method
        )
    if context > original:
        axes.axvline(original, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.set_ylabel(f"perplexity\n({context:,} tokens)", fontsize=8)
    axes.grid(alpha=0.3)


def _draw_keys(axes: Axes, chosen: dict[str, list[tuple[KeyPassage, Reading]]]) -> None:
    depths = sorted({passage.depth for readings in chosen.values() for passage, _ in readings})
    losses = np.full((len(chosen), len(depths)), math.nan)
    for i, readings in enumerate(chosen.values()):
        for j, depth in enumerate(depths):
            at = [reading for passage, reading in readings if passage.depth == depth]
            losses[i, j] = np.mean([reading.key_loss for reading in at])
            mark = "✓" if all(reading.key_found for reading in at) else f"{losses[i, j]:.1f}"
            axes.text(j, i, mark, ha="center", va="center", fontsize=7, color="black" if losses[i, j] < 4 else "white")
    axes.imshow(losses, vmin=0, vmax=WORST, cmap="YlOrRd", aspect="auto")
    axes.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
    axes.set_yticks(range(len(chosen)), list(chosen), fontsize=7)
