"""Chat templates, rendered within limits.

A template is a program that comes with the model file, and may loop for hours or fill the memory. It runs in a child
process with limits on its time, memory and output; the child is started with the first template and reused.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, datetime
from pathlib import Path
from typing import Any

from ...container import Header
from ...errors import UserError
from . import rendering_child

CPU_S = 2
"""CPU seconds that one rendering may take; a real template takes milliseconds."""

WALL_S = 60.0
"""Seconds after which a child that does not reply is ended, however little CPU time it got."""

MAX_BYTES = 512 << 20
"""Memory of the child."""

MAX_TEMPLATE = 1 << 20
"""Characters of a template."""

KEY = "tokenizer.chat_template"

LIMITS = {
    "memory": f"it takes more than {MAX_BYTES >> 20} MiB of memory",
    "output": "it writes without end",
    "time": "it does not end within {seconds} s of CPU time",
}


class TemplateError(UserError):
    """A template that failed; `hopeless` if it would for any messages."""

    def __init__(self, message: str, hopeless: bool) -> None:
        super().__init__(message)
        self.hopeless = hopeless


def check_templates(header: Header) -> None:
    """Check that the chat templates of a model file compile and end; llama_cpp compiles them all when it loads one.

    Raises:
        UserError: one does not.
    """
    for key in header.entries:
        if key == KEY or key.startswith(f"{KEY}."):
            template = header.get(key)
            if isinstance(template, str) and template not in _checked:
                try:
                    render(template, {"messages": [{"role": "user", "content": "Hello"}]})
                except TemplateError as error:
                    if error.hopeless:
                        raise UserError(f"{header.path}: {key}: the chat template cannot be used: {error}") from None
                _checked.add(template)


_checked: set[str] = set()


def render(template: str, variables: Mapping[str, Any], now: date | None = None) -> str:
    """Return what the template makes of `variables`, with `now` (a date, or a datetime) for its `strftime_now`.

    Raises:
        TemplateError: it is not a template, raises an exception, or exceeds a limit.
        TypeError: a variable is of a kind that JSON does not have.
    """
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(f"{len(template):,} characters, expected at most {MAX_TEMPLATE:,}", hopeless=True)
    defaults = {
        "add_generation_prompt": True,
        "eos_token": "",
        "bos_token": "",
        **dict.fromkeys(("functions", "function_call", "tools", "tool_choice")),
    }
    request = {
        "template": template,
        "variables": {**defaults, **variables},
        "now": (now or datetime.now()).isoformat(),
    }
    reply = _renderer.ask(request)
    if "text" in reply:
        return reply["text"]
    if "limit" in reply:
        raise TemplateError(LIMITS[reply["limit"]].format(seconds=CPU_S), hopeless=True)
    raise TemplateError(reply.get("syntax") or reply["error"], hopeless="syntax" in reply)


class _Renderer:
    """The child process; one request at a time."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._pid = 0
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        with self._lock:
            child = self._running()
            timer = threading.Timer(WALL_S, child.kill)
            timer.daemon = True
            timer.start()
            try:
                assert child.stdin is not None and child.stdout is not None
                line = ""
                with suppress(BrokenPipeError):
                    child.stdin.write(json.dumps(request) + "\n")
                    child.stdin.flush()
                    line = child.stdout.readline()
                if line.endswith("\n"):
                    return dict(json.loads(line))
            except BaseException:  # Ctrl-C: its reply would be taken for the next one's
                self.end()
                raise
            finally:
                timer.cancel()
            code = self.end()
            return {"limit": "time" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "memory"}

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None or self._pid != os.getpid():
            program = str(Path(rendering_child.__file__).resolve())
            folders = json.dumps([folder for folder in sys.path if folder])
            self._pid = os.getpid()
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-I", "-S", program, folders, str(CPU_S), str(MAX_BYTES)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    encoding="ascii",
                    start_new_session=True,  # out of reach of the terminal's Ctrl-C
                )
            except OSError as error:
                raise _no_renderer(error.strerror or str(error)) from None
            assert self._child.stdout is not None
            if self._child.stdout.readline() != "ready\n":
                raise _no_renderer(f"it ended with code {self.end()}")
        return self._child

    def end(self) -> int:
        """End the child, and return its exit code: negative for a signal, as in subprocess."""
        child, self._child = self._child, None
        if child is None or self._pid != os.getpid():  # a fork's copy: the child is the parent's
            return 0
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.05)  # one that has just ended has a code of its own
        child.kill()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        return child.wait()


def _no_renderer(reason: str) -> UserError:
    return UserError(f"{sys.executable}: cannot start the process that renders chat templates: {reason}")


_renderer = _Renderer()
atexit.register(_renderer.end)
