"""Measurements in rounds, everybody once in each, so that what else the machine does hits all alike; their table."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders import Contender

Readings = dict[str, dict[str, list[float]]]
"""What was measured: by column, by contender's label, one number for each round."""


def measure(
    contenders: Sequence[Contender], columns: Mapping[str, Callable[[Contender], float]], n_rounds: int
) -> Readings:
    """Measure each column of each contender `n_rounds` times, interleaved; a failure is shown, and is not a number."""
    readings: Readings = {column: {each.label: [] for each in contenders} for column in columns}
    for i in range(n_rounds):
        for column, run in columns.items():
            for each in contenders:
                try:
                    found = run(each)
                except (subprocess.CalledProcessError, ValueError, OSError) as error:
                    print(f"{each.label}: {str(error)[-300:]}", file=sys.stderr)
                    found = math.nan
                readings[column][each.label].append(found)
                print(f"round {i + 1}  {column:>12}  {each.label:34}{found:10.2f}", file=sys.stderr, flush=True)
    return readings


def medians(readings: Readings) -> dict[str, dict[str, float]]:
    return {
        column: {label: statistics.median(values) for label, values in row.items()} for column, row in readings.items()
    }


def ratios(contenders: Sequence[Contender], column: Mapping[str, float]) -> dict[str, float]:
    """What each cache type of ours reaches of others in one column.

    Other trees and programs are compared with the same cache type, the program's best setting counting; stock with
    the best of all its settings.
    """
    found = {}
    for ours in (each for each in contenders if each.name == "ours"):
        for name in dict.fromkeys(each.name for each in contenders if each.name != "ours"):
            rivals = [
                column[each.label]
                for each in contenders
                if each.name == name and (each.kv == ours.kv or name == "stock") and not math.isnan(column[each.label])
            ]
            if rivals:
                best = "best of " if name == "stock" else ""
                found[f"{ours.label} / {best}{name}"] = column[ours.label] / max(rivals)
    return found


def print_table(rows: Mapping[str, Sequence[float]], columns: Sequence[str], decimals: int = 1) -> None:
    """Print rows of numbers under their columns' names."""
    print(f"{'':36}" + "".join(f"{column:>13}" for column in columns))
    for label, numbers in rows.items():
        print(f"{label:36}" + "".join(f"{number:13,.{decimals}f}" for number in numbers))


def print_rates(contenders: Sequence[Contender], readings: Readings) -> None:
    """Print the medians, in tokens per second, and below them what ours is of the others."""
    found = medians(readings)
    print_table({each.label: [row[each.label] for row in found.values()] for each in contenders}, list(readings))
    print()
    compared = {column: ratios(contenders, row) for column, row in found.items()}
    labels = dict.fromkeys(label for row in compared.values() for label in row)
    rows = {label: [row.get(label, math.nan) for row in compared.values()] for label in labels}
    print_table(rows, list(readings), 2)


def write_json(path: Path | None, readings: Readings, **more: Any) -> None:
    """Write all rounds, their medians and whatever else there is to `path`, if one was given."""
    if path is not None:
        found = more | {"medians": medians(readings), "rounds": readings}
        path.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
