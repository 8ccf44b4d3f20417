"""The journal of a search: every evaluation, on disk as soon as it is known, as a cache and to resume a killed run.

A search is deterministic given its losses, so a run that finds them in the journal takes the same course as the run
that wrote them, and evaluates only what is missing. JSON Lines: a header with the digest of what the run depends on,
then one line per evaluation. A line torn by a crash is repaired; the journal of another search is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ...errors import UserError
from ...files import append_line, is_torn, open_locked
from .protocol import Fidelity, Result, Task
from .space import band_key

HEADER = "ropewalk_search"
VERSION = 1
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
        self._fd = -1
        if path is not None:
            self._fd = open_locked(path)
            try:
                self._read(path, digest)
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
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def add(self, task: Task, result: Result) -> None:
        """Write one evaluation to disk.

        Raises:
            UserError: it cannot be written.
        """
        key, at = key_of_task(task), time.monotonic() - self._started
        if key in self.lines:
            return
        if self.path is not None:
            append_line(self._fd, self.path, _line_of(key, Evaluation(result, at)))
        self.lines[key] = Evaluation(result, at)

    def _read(self, path: Path, digest: str) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            data = file.read()
        end = data.find(b"\n") + 1
        torn = not end and is_torn(data, HEADER_BEGINNING)  # or empty
        if torn or (end == len(data) and _version(data) == VERSION):  # no evaluations: no search's journal yet
            os.ftruncate(self._fd, 0)
            append_line(self._fd, path, json.dumps({HEADER: VERSION, "digest": digest}).encode() + b"\n")
            return
        _check_header(path, data[:end] or data, digest)
        for number, line in enumerate(data[end:].splitlines(keepends=True), 2):
            known = _parse(line)
            if known is None:
                if is_torn(line, LINE_BEGINNING):
                    os.ftruncate(self._fd, end)
                    return
                raise UserError(f"{path}: line {number} is not an evaluation of ropewalk search; {ADVICE}")
            self.lines.setdefault(*known)
            end += len(line)
        if not data.endswith(b"\n"):
            append_line(self._fd, path, b"\n")


def digest_of(values: Mapping[str, Any]) -> str:
    """A short digest of what a run depends on: equal if and only if all values are."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _check_header(path: Path, line: bytes, digest: str) -> None:
    version = _version(line)
    if version is None:
        raise UserError(f"{path}: is not a journal of ropewalk search; {ADVICE}")
    if version != VERSION:
        raise UserError(f"{path}: journal version {version}, expected {VERSION}; {ADVICE}")
    if json.loads(line).get("digest") != digest:
        raise UserError(
            f"{path}: the journal of another search (model, passages, context, settings or seed differ); {ADVICE}"
        )


def _version(line: bytes) -> Any:
    """The version of the journal whose header is `line`; None if it is not a header."""
    try:
        header = json.loads(line)
    except ValueError:
        return None
    return header.get(HEADER) if isinstance(header, dict) else None


def _line_of(key: TaskKey, evaluation: Evaluation) -> bytes:
    result = evaluation.result
    task = {"band": key.band, "document": key.passage, "fidelity": key.fidelity, "gradient": key.gradient}
    values: dict[str, Any] = task | {"loss": result.loss, "seconds": result.seconds, "at": evaluation.at}
    if key.gradient:
        values |= {"by_log_factors": result.by_log_factors, "by_log_attention": result.by_log_attention}
    return json.dumps(values).encode() + b"\n"


def _parse(line: bytes) -> tuple[TaskKey, Evaluation] | None:
    try:
        values = json.loads(line)
        key = TaskKey(str(values["band"]), int(values["document"]), values["fidelity"], bool(values["gradient"]))
        result = Result(
            loss=float(values["loss"]),
            seconds=float(values["seconds"]),
            by_log_factors=tuple(map(float, values.get("by_log_factors", ()))),
            by_log_attention=float(values.get("by_log_attention", 0.0)),
        )
        return key, Evaluation(result, float(values["at"]))
    except (ValueError, KeyError, TypeError):
        return None
