"""A child process that loads odd files one after the other, and is replaced when it dies of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

PROGRAM = Path(__file__).with_name("loading_child.py")
MOST_S = 30.0


class Child:
    """Args: what `loading_child` is run with."""

    def __init__(self, *args: str) -> None:
        self._args = args
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def load(self, path: Path) -> tuple[str, str]:
        """Return how loading `path` ended: "ran", "refused", "failed" or "died", and the message or exit code."""
        child = self._process or self._start()
        assert child.stdin is not None and child.stdout is not None
        timer = threading.Timer(MOST_S, child.kill)
        timer.start()
        try:
            print(json.dumps(str(path)), file=child.stdin, flush=True)
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if answer:
            how, text = json.loads(answer)
            return how, text
        return "died", str(self._end())

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *self._args],
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # otherwise an abort would start a debugger
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self._process

    def _end(self) -> int:
        child, self._process = self._process, None
        if child is None:
            return 0
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        child.stdout.close()
        try:
            return child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()
