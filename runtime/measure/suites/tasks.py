"""The tasks of the suite by name, and how many questions about one haystack each may ask."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ....errors import UserError
from . import chains, counting, facts, hints, needles
from .haystacks import Essays
from .pen import Pen
from .question import Place, Question

SUITE = "ruler"

VERSION = 1
"""Increase it when the same seed gives other questions than before."""

Build = Callable[[Pen, Essays, Place, random.Random, int], list[Question]]


@dataclass(frozen=True)
class Task:
    """One task: how its questions about one haystack are made, and how many of them there are at most.

    Attributes:
        has_depth: whether each answer stands in one place.
        rereads: the share of a text that is read again, on average, for each further question about it.
    """

    name: str
    build: Build
    most: int = 1 << 10
    has_depth: bool = False
    rereads: float = 0.0


TASKS = {
    task.name: task
    for task in (
        Task("niah_single_1", partial(needles.single, kind=needles.NOISE_NUMBER), has_depth=True, rereads=0.5),
        Task("niah_single_2", partial(needles.single, kind=needles.ESSAY_NUMBER), has_depth=True, rereads=0.5),
        Task("niah_single_3", partial(needles.single, kind=needles.ESSAY_MARK), has_depth=True, rereads=0.5),
        Task(
            "niah_multikey_1", partial(needles.several_keys, kind=needles.ESSAY_NUMBER), needles.SEVERAL, has_depth=True
        ),
        Task("niah_multikey_2", partial(needles.among_needles, kind=needles.AMONG_NUMBERS), has_depth=True),
        Task("niah_multikey_3", partial(needles.among_needles, kind=needles.AMONG_MARKS), has_depth=True),
        Task("niah_multivalue", partial(needles.several_values, kind=needles.ESSAY_NUMBER)),
        Task("niah_multiquery", partial(needles.several_queries, kind=needles.ESSAY_NUMBER)),
        Task("vt", chains.variable_tracking),
        Task("cwe", counting.common_words, 1),
        Task("fwe", counting.frequent_words, 1),
        Task("facts_2", facts.two_facts, facts.MOST),
        Task("facts_3", facts.three_facts, facts.MOST),
        Task("hints", hints.without_shared_words, hints.MOST, has_depth=True),
    )
}
"""RULER's names where the task is RULER's; its two of question answering need downloads, and are not here."""

QUICK = ("niah_single_2", "niah_multikey_1", "niah_multikey_2", "vt")


def named_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks of these names.

    Raises:
        UserError: there is no such task.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks: {name!r}, expected some of {', '.join(TASKS)}")
    return tuple(TASKS[name] for name in dict.fromkeys(names))


@dataclass(frozen=True)
class Haystacks:
    """How many haystacks a cell (a task at a length) has, and how many questions there are about each of them."""

    count: int
    questions: int


def haystacks_for(task: Task, samples: int, share: int) -> Haystacks:
    """As few haystacks as give `samples` questions, with at most `share` about each."""
    questions = max(1, min(task.most, share, samples))
    return Haystacks(-(-samples // questions), questions)


def questions_about(
    pen: Pen, essays: Essays, task: Task, length: int, haystack: int, count: int, seed: int
) -> list[Question]:
    """The questions about one haystack, in the order in which they are best asked; the same for the same arguments.

    Raises:
        UserError: the length is too short for the task, or the texts for the length.
    """
    rng = random.Random(f"{SUITE} {VERSION} {task.name} {length} {haystack} {seed}")
    return task.build(pen, essays, Place(task.name, length, haystack), rng, count)
