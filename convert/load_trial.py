"""Try whether llama.cpp loads a file: its metadata, vocabulary, and every tensor's name and shape, but no data.

This happens in a process of its own, as llama.cpp aborts on some files instead of refusing them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from ..errors import UserError

LOAD = r"""
import ctypes, os, sys
sys.path[:] = eval(sys.argv[2])
import llama_cpp

@llama_cpp.llama_log_callback
def log(level, text, _):
    if level >= 3 and text.strip():
        sys.stderr.buffer.write(text.strip() + b"\n")
        sys.stderr.buffer.flush()

llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
params = llama_cpp.llama_model_default_params()
known = {name for name, *_ in params._fields_}  # they differ by version
for name, value in (("no_alloc", True), ("use_mmap", False), ("load_mode", 0), ("vocab_only", "no_alloc" not in known)):
    if name in known:
        setattr(params, name, value)
params.n_gpu_layers = 0
model = llama_cpp.llama_model_load_from_file(os.fsencode(sys.argv[1]), params)
sys.stderr.flush()
os._exit(0 if model else 1)
"""
"""The child's program; a module of the package would first import all that this one imports."""


def check_loads(path: Path, what: str) -> None:
    """Check that llama.cpp loads the file at `path`, which messages call `what`.

    Raises:
        UserError: it does not; the message has llama.cpp's reason.
    """
    problem = load_problem(path, what)
    if problem is not None:
        raise UserError(f"{what}: llama.cpp would not load the converted model: {problem}")


def load_problem(path: Path, what: str) -> str | None:
    """Return why llama.cpp does not load the file at `path`, which its reason calls `what`; None if it does."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), repr(sys.path)],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # otherwise an abort in llama.cpp would start a debugger
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if not done.returncode:
        return None
    output = done.stderr.decode("utf-8", errors="replace").replace(str(path), what)
    return _reason(output, done.returncode)


def _reason(output: str, code: int) -> str:
    """The line of llama.cpp's output that says most."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    for pattern in (r".*error loading model: (.*)", r".*(GGML_ASSERT.*)", r"(.*[Ee]rror.*)"):
        for line in lines:
            if match := re.fullmatch(pattern, line):
                return match[1]
    return lines[-1] if lines else f"it ended with code {code}"
