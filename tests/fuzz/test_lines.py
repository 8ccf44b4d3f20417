"""Files of lines with anything in them: they are read or refused in one line, and what is refused is left unchanged.

The seed is fixed; `MINUTES` sets how long each test runs.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ropewalk.errors import UserError
from ropewalk.factors import Band
from ropewalk.factors.search import Journal, Result, Task
from ropewalk.runtime.chat import Results
from ropewalk.runtime.measure.readings import Reading, Readings

SECONDS = 60 * float(os.environ.get("MINUTES", "0")) or 1
ODD = [b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"[" * 3000, b"null", b"{}", b"[]", b"-0", b"true"]
ODD += [
    b'"',
    b"\\",
    b"\n",
    b"\0" * 9,
    b"\xff",
    b'"\\ud800"',
    b"",
    b"\n\n",
    b'"x"',
    b"0.5",
    b"1e-400",
    b"}",
    b": ",
    b"{",
]


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


def mutations(data: bytes) -> Iterator[bytes]:
    rng, deadline = random.Random(20), time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at = rng.randrange(len(changed) + 1)
            kind = rng.randrange(4)
            if kind == 0:  # a value is replaced: from a colon to a comma
                at = changed.find(b": ", at) + 2
                end = min((i for i in (changed.find(b",", at), changed.find(b"}", at)) if i >= 0), default=at)
                changed[at:end] = rng.choice(ODD)
            elif kind == 1:
                changed[at:at] = rng.choice(ODD)
            elif kind == 2:
                del changed[at:]
            else:
                changed[at : at + 1] = bytes([rng.randrange(256)])
        yield bytes(changed)


@pytest.mark.parametrize(
    ("write", "read"),
    [(write_results, read_results), (write_journal, read_journal), (write_readings, read_readings)],
    ids=["results", "journal", "readings"],
)
def test_anything_is_read_or_refused(
    tmp_path: Path, write: Callable[[Path], None], read: Callable[[Path], None]
) -> None:
    path = tmp_path / "lines"
    write(path)
    original, refused, taken = path.read_bytes(), 0, 0
    for data in mutations(original):
        path.write_bytes(data)
        try:
            read(path)
        except UserError as error:
            refused += 1
            assert path.read_bytes() == data and "\n" not in str(error)
        else:
            taken += 1
            kept = path.read_bytes()
            assert kept.endswith(b"\n")
            read(path)  # what was appended can be read again
            assert [line for line in kept.splitlines() if b'"error"' not in line and not json.loads(line)] == []
    assert refused and taken
