"""Files of lines with anything in them: they are read or refused in one line, and what is refused is left unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import changed_bytes, check_line, rounds
from ropewalk.errors import UserError
from ropewalk.factors import Band
from ropewalk.factors.search import Journal, Result, Task
from ropewalk.runtime.chat import Results
from ropewalk.runtime.measure import suites
from ropewalk.runtime.measure.readings import Reading, Readings


def write_results(path: Path) -> None:
    with Results(path) as results:
        for name in "abc":
            head = {"id": name, "source": name, "digest": "d", "settings": "s"}
            results.append(head | ({"summary": "x y", "tokens": 7} if name != "b" else {"error": "bad"}))


def read_results(path: Path) -> None:
    with Results(path) as results:
        results.begin({"b"})
        results.append({"id": "n", "source": "n", "digest": "d", "settings": "s", "summary": "z"})


def write_journal(path: Path) -> None:
    with Journal(path, "a") as journal:
        for passage in range(3):
            task = Task(Band(context=64, rescale_factors=(1.0, 2.0)), passage, gradient=passage == 1)
            journal.add(task, Result(1.5, 0.1, (0.1, 0.2), 0.3))


def read_journal(path: Path) -> None:
    with Journal(path, "a") as journal:
        journal.add(Task(Band(context=64, rescale_factors=(1.0, 3.0)), 9), Result(1.5, 0.1))


def write_readings(path: Path) -> None:
    readings = Readings(path)
    for key in "abc":
        readings.add(key * 24, {"page": "x"}, Reading((2.5, 3.0), 100, 0.1, True, "12345", 1.0))
    readings.close()


def read_readings(path: Path) -> None:
    readings = Readings(path)
    readings.add("d" * 24, {"page": "x"}, Reading((2.5, 3.0), 100, 0.1, True, "12345", 1.0))
    readings.close()


def write_answers(path: Path) -> None:
    with suites.Journal(path) as journal:
        for key in "abc":
            journal.add(key * 24, {"task": "vt"}, {"score": 0.5, "loss": 1.5, "said": "x", "seconds": 0.1})


def read_answers(path: Path) -> None:
    with suites.Journal(path) as journal:
        journal.add("d" * 24, {"task": "vt"}, {"score": 0.5, "loss": 1.5, "said": "x", "seconds": 0.1})


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (write_results, read_results),
        (write_journal, read_journal),
        (write_readings, read_readings),
        (write_answers, read_answers),
    ],
    ids=["results", "journal", "readings", "answers"],
)
def test_anything_is_read_or_refused(
    tmp_path: Path, write: Callable[[Path], None], read: Callable[[Path], None]
) -> None:
    path = tmp_path / "lines"
    write(path)
    original, refused, taken = path.read_bytes(), 0, 0
    for rng in rounds(1):
        data = changed_bytes(original, rng)
        path.write_bytes(data)
        try:
            read(path)
        except UserError as error:
            refused += 1
            check_line(error)
            assert path.read_bytes() == data
        else:
            taken += 1
            kept = path.read_bytes()
            assert kept.endswith(b"\n")
            read(path)  # what was appended can be read again
            lines = kept.split(b"\n")[:-1]  # a carriage return is white space, in JSON
            assert [line for line in lines if b'"error"' not in line and not json.loads(line)] == []
    assert refused and taken
