"""What the fuzzers share: how long each runs, odd values, and how a value or a file is changed at random.

The seed is fixed. In the ordinary suite all of them together take half a minute; `MINUTES` sets how long each runs.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError

SEED = 20
MINUTES = float(os.environ.get("MINUTES", "0"))

MOST_CPU_S = 10.0
"""CPU seconds of one round; a sound file takes milliseconds."""

LONGEST_LINE = 1000

WORDS = ("", "x", "9" * 500, "\x1b[31m", "\u202e", "a\nb", "\ud800", "../x", "/dev/zero", "\0", "NaN", "é" * 300)
NUMBERS = (0, 1, 2, 3, 7, 64, 512, -1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**400, -(10**30))
FRACTIONS = (0.5, -0.5, 1e-45, 1e-9, 1.0000001, 1e9, 1e39, 1e300, float("nan"), float("inf"), -float("inf"))
SHAPES = ([], {}, [[]], [0], [1, 2], ["a"], [None], {"a": 1}, {"a": {"b": []}}, [0.5] * 99, [{"a": "b"}])
ODD = (None, True, False, *WORDS, *NUMBERS, *FRACTIONS, *SHAPES)

ODD_BYTES = (
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"-0", b"0.5", b"1e-400", b"null", b"true", b'"x"'),
    *(b"[" * 3000, b"{}", b"[]", b"{", b"}", b": ", b'"', b"\\", b'"\\ud800"', b"\n", b"\n\n", b"\0" * 9, b"\xff", b""),
)


def rounds(seconds: float) -> Iterator[random.Random]:
    """Yield the random generator again and again, for `seconds` or for `MINUTES`, and limit the CPU time of a round."""
    rng, end = random.Random(SEED), time.monotonic() + (60 * MINUTES or seconds)
    while time.monotonic() < end:
        started = time.process_time()
        yield rng
        assert time.process_time() - started < MOST_CPU_S


def check_line(error: UserError) -> None:
    """Check that a refusal is one line that a person can read."""
    text = str(error)
    assert text and "\n" not in text and len(text) < LONGEST_LINE, repr(text)


def changed(value: Any, rng: random.Random, odd: tuple[Any, ...] = ODD) -> Any:
    """Return a JSON value in which one place, at any depth, is gone, has another's value, or has one of `odd`."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        return rng.choice(odd)
    copy, keys = value.copy(), list(value) if isinstance(value, dict) else range(len(value))
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.1:
        del copy[key]
    elif kind < 0.15:
        copy[key] = value[rng.choice(keys)]
    else:
        copy[key] = changed(copy[key], rng, odd)
    return copy


def changed_bytes(data: bytes, rng: random.Random, within: int = 1 << 20) -> bytes:
    """Return bytes with a few changes among the first `within`; where they are JSON, often a value's."""
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(min(len(new), within) + 1)
        kind = rng.randrange(4)
        if kind == 0:  # a value: from a colon to a comma
            at = new.find(b": ", at) + 2
            end = min((i for i in (new.find(b",", at), new.find(b"}", at)) if i >= 0), default=at)
            new[at:end] = rng.choice(ODD_BYTES)
        elif kind == 1:
            new[at:at] = rng.choice(ODD_BYTES)
        elif kind == 2:
            del new[at:]
        else:
            new[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(new)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="ascii")
