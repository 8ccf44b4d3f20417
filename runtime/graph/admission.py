"""Whether the installed llama.cpp may be used: tried once, in a process of its own, and remembered.

Knowing where ggml keeps its fields (see `ggml`) does not prove that nodes can be set and taken over: that depends on
the release, the compiler and the processor. So the first use of a build runs `runtime.self_test`, a second or two,
where a crash harms nobody. The verdict is kept in the user's cache folder by what it depends on: the files of both
libraries, and the processor.

Where our own native kernels fail it, torch computes in their place.

A build whose kernels for extra weight buffers (AMX, repacked weights) crash is used without them: GCC 12 miscompiles
llama.cpp's AMX code, for example (llama.cpp pull request 26954).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import llama_cpp
import platformdirs

from ...files import write_file
from . import ggml, kernels

VERSION = 4  # raise it when the self-test asks for more than before

PATIENCE_S = 120.0

_logger = logging.getLogger("ropewalk")


@dataclass(frozen=True)
class Verdict:
    """What the self-test found.

    Attributes:
        refused: why this build cannot be used; empty if it can.
        extra_buffers: whether llama.cpp may keep weights in extra buffers, as it does unless told otherwise.
        kernels: whether our own kernels may be used, if they are there.
        state_prefix: bytes of a saved sequence before the number of its streams; -1 = not known.
    """

    refused: str = ""
    extra_buffers: bool = True
    kernels: bool = True
    state_prefix: int = -1


def check_engine() -> Verdict:
    """Return how this build is to be used, running the self-test if it is not known yet.

    Raises:
        LayoutError: it cannot be used; says why.
    """
    verdict = _trusted or _verdict()
    if verdict.refused:
        raise ggml.LayoutError(ggml.refusal(verdict.refused))
    return verdict


_trusted: Verdict | None = None


def trust(verdict: Verdict) -> None:
    """Take `verdict` as given in this process: what the self-test itself runs under."""
    global _trusted
    _trusted = verdict


@cache
def _verdict() -> Verdict:
    if not sys.executable:  # Python inside another program, which cannot be started again
        return Verdict()
    kept = Path(platformdirs.user_cache_dir("ropewalk")) / f"engine-{identity()}.json"
    with suppress(OSError, ValueError, TypeError):
        return Verdict(**json.loads(kept.read_text(encoding="utf-8")))
    verdict = _try()
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, json.dumps(asdict(verdict)).encode() + b"\n", private=True)
    return verdict


def identity() -> str:
    """Return a digest of what the verdict depends on: llama.cpp, our kernels and the processor."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in ggml.library_files()]
    own = kernels.what_is_used()
    parts = (VERSION, llama_cpp.__version__, str(ggml.library_files()[0].parent), files, own, _processor())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """The processor's model and instruction sets, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))


def _try() -> Verdict:
    """Run the self-test, and again without what makes it fail, where it can be left out."""
    verdict = _try_buffers(use_kernels=True)
    if verdict.refused and not kernels.why_missing():
        without = _try_buffers(use_kernels=False)
        if not without.refused:
            _logger.warning(
                "ropewalk: the native kernels do not work on this machine (%s): torch computes in their place",
                verdict.refused,
            )
            return without
    return verdict


def _try_buffers(use_kernels: bool) -> Verdict:
    """Run the self-test, and again without extra buffers where they are what makes it crash."""
    verdict, crashed = _run(extra_buffers=True, use_kernels=use_kernels)
    if crashed:
        without, _ = _run(extra_buffers=False, use_kernels=use_kernels)
        if not without.refused:
            _logger.warning(
                "ropewalk: llama.cpp's kernels for extra weight buffers (such as AMX) crash on this machine (%s):"
                " they are left out",
                verdict.refused,
            )
            return without
    return verdict


def _run(extra_buffers: bool, use_kernels: bool) -> tuple[Verdict, bool]:
    """Run the self-test in a process of its own; what it found, and whether it crashed."""
    module = f"{__name__.rsplit('.', 2)[0]}.self_test"
    start = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main({extra_buffers}, {use_kernels})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", start],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
    except subprocess.TimeoutExpired:
        return Verdict(f"its self-test did not end within {PATIENCE_S:.0f} s"), True
    except OSError as error:
        return Verdict(f"its self-test could not be started: {error.strerror or error}"), False
    if done.returncode < 0:
        name = f"signal {-done.returncode}"
        with suppress(ValueError):
            name = signal.Signals(-done.returncode).name
        return Verdict(f"its self-test crashed with {name}"), True
    lines = (done.stdout or done.stderr).decode(errors="replace").strip().splitlines()
    if done.returncode:
        return Verdict(lines[-1] if lines else f"exit code {done.returncode}"), False
    with suppress(IndexError, ValueError):
        return Verdict(extra_buffers=extra_buffers, kernels=use_kernels, state_prefix=int(lines[-1])), False
    return Verdict("its self-test ended without a result"), False
