"""The journal of a search: every evaluation, on disk as soon as it is known, as a cache and to resume a killed run.

A search is deterministic given its losses, so a run that finds them in the journal takes the same course as the run
that wrote them, and evaluates only what is missing. JSON Lines: a header with the digest of what the run depends on,
then one line per evaluation. A line torn by a crash is repaired; the journal of another search is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, get_args

from ...errors import UserError
from ...files import LineFile, is_torn, json_value
from .protocol import Fidelity, Result, Task
from .space import band_key

HEADER = "ropewalk_search"
VERSION = 2  # 1: bands without near windows
ADVICE = "choose another output, or remove this file"
HEADER_BEGINNING, LINE_BEGINNING = b'{"ropewalk_search": ', b'{"band": "'


class TaskKey(NamedTuple):
    """What identifies a task: two tasks with the same key have the same result."""

    band: str
    passage: int
    fidelity: Fidelity
    gradient: bool


class Evaluation(NamedTuple):
    """A result, and when it was known, in seconds since the search started (time between runs not counted)."""

    result: Result
    at: float


def key_of_task(task: Task) -> TaskKey:
    return TaskKey(band_key(task.band), task.passage, task.fidelity, task.gradient)


class Journal:
    """The evaluations of one search, in memory and (with a path) in a file that no other process may write.

    Args:
        path: the file, created if it is missing; None keeps everything in memory only.
        digest: of everything that the run depends on; see `digest_of`.

    Attributes:
        lines: the evaluations by task.
        found: how many of them the file had when the journal was opened.

    Raises:
        UserError: the file cannot be written, is in use, is not a journal, or is that of another search.
    """

    def __init__(self, path: Path | None, digest: str) -> None:
        self.path = path
        self.lines: dict[TaskKey, Evaluation] = {}
        self._file: LineFile | None = None
        if path is not None:
            self._file = LineFile(path)
            try:
                self._read(self._file, digest)
            except BaseException:
                self.close()
                raise
        self.found = len(self.lines)
        self._started = time.monotonic() - max((line.at for line in self.lines.values()), default=0.0)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and its lock."""
        if self._file is not None:
            self._file.close()

    def add(self, task: Task, result: Result) -> None:
        """Write one evaluation to disk.

        Raises:
            UserError: it cannot be written, or the file was moved, removed or changed.
        """
        key, at = key_of_task(task), time.monotonic() - self._started
        if key in self.lines:
            return
        if self._file is not None:
            self._file.append(_line_of(key, Evaluation(result, at)))
        self.lines[key] = Evaluation(result, at)

    def _read(self, file: LineFile, digest: str) -> None:
        lines = [line for _, line in file.read(_is_torn)]
        if not lines or (len(lines) == 1 and lines[0].endswith(b"\n") and _version(lines[0]) == VERSION):
            file.drop_all()  # no evaluations: no search's journal yet
            file.append(json.dumps({HEADER: VERSION, "digest": digest}).encode() + b"\n")
            return
        _check_header(file.path, lines[0], digest)
        for number, line in enumerate(lines[1:], 2):
            known = _parse(line)
            if known is None:
                raise UserError(f"{file.path}: line {number} is not an evaluation of ropewalk search; {ADVICE}")
            self.lines.setdefault(*known)


def _is_torn(number: int, line: bytes) -> bool:
    return is_torn(line, HEADER_BEGINNING if number == 1 else LINE_BEGINNING)


def digest_of(values: Mapping[str, Any]) -> str:
    """A short digest of what a run depends on: equal if and only if all values are."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _check_header(path: Path, line: bytes, digest: str) -> None:
    version = _version(line)
    if version is None:
        raise UserError(f"{path}: is not a journal of ropewalk search; {ADVICE}")
    if version != VERSION:
        shown = version if isinstance(version, int) and abs(version) < 1000 else "unknown"
        raise UserError(f"{path}: journal version {shown}, expected {VERSION}; {ADVICE}")
    if json_value(line).get("digest") != digest:
        raise UserError(
            f"{path}: the journal of another search (model, passages, context, settings or seed differ); {ADVICE}"
        )


def _version(line: bytes) -> Any:
    """The version of the journal whose header is `line`; None if it is not a header."""
    header = json_value(line)
    return header.get(HEADER) if isinstance(header, dict) else None


def _line_of(key: TaskKey, evaluation: Evaluation) -> bytes:
    result = evaluation.result
    task = {"band": key.band, "document": key.passage, "fidelity": key.fidelity, "gradient": key.gradient}
    values: dict[str, Any] = task | {"loss": result.loss, "seconds": result.seconds, "at": evaluation.at}
    if key.gradient:
        values |= {"by_log_factors": result.by_log_factors, "by_log_attention": result.by_log_attention}
    return json.dumps(values).encode() + b"\n"


def _parse(line: bytes) -> tuple[TaskKey, Evaluation] | None:
    values = json_value(line)
    try:
        key = TaskKey(str(values["band"]), int(values["document"]), values["fidelity"], bool(values["gradient"]))
        result = Result(
            loss=float(values["loss"]),
            seconds=float(values["seconds"]),
            by_log_factors=tuple(map(float, values.get("by_log_factors", ()))),
            by_log_attention=float(values.get("by_log_attention", 0.0)),
        )
        at = float(values["at"])
        if key.fidelity not in get_args(Fidelity) or not math.isfinite(at) or not math.isfinite(result.seconds):
            return None
        return key, Evaluation(result, at)
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
