"""Schedules that come with Ropewalk, found by search: files in `schedules/`, each named after its model.

A schedule found on one quantisation of a model also fits the others: the best λ depend on the weights, and quantising
shifts them by far less than the methods differ from each other.
"""

from __future__ import annotations

from pathlib import Path

from .schedule import RopeFacts, Schedule, read_schedule

SCHEDULES = Path(__file__).parent / "schedules"


def shipped_file(model: str, folder: Path = SCHEDULES) -> Path | None:
    """The schedule for a model file called `model`: the one with the longest name that `model` starts with, as a word.

    Case is ignored: ``smollm2-135m-instruct-q8_0.gguf`` is a SmolLM2-135M-Instruct, ``SmolLM2-135M-Instruct2.gguf`` is
    not.
    """
    for file in sorted(folder.glob("*.json"), key=lambda file: -len(file.stem)):
        rest = model[len(file.stem) :]
        if model.lower().startswith(file.stem.lower()) and not rest[:1].isalnum():
            return file
    return None


def shipped_schedule(model: str, facts: RopeFacts, folder: Path = SCHEDULES) -> Schedule | None:
    """The schedule for a model file called `model` with these facts; None if there is none, or its facts differ."""
    file = shipped_file(model, folder)
    schedule = read_schedule(file) if file else None
    return schedule if schedule and schedule.facts == facts else None
