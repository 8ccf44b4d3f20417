"""Quantise a model's weights to another type with llama.cpp's own quantiser, in a separate process.

The quantiser cannot be interrupted and aborts on some inputs. In a process of its own, a signal to us stops it at once,
and an abort does not end us. It also ends when we do, in whatever way, as it watches the pipe from us.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, NoReturn

from gguf import GGMLQuantizationType

from ..container import GGUFError, Header, read_header, type_name
from ..container.reader import DEFAULT_ALIGNMENT
from ..container.writer import Advance
from ..errors import UserError
from ..processes import end_with_parent
from .output import check_space

WEIGHT_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q6_k": "MOSTLY_Q6_K",
    "q5_k_m": "MOSTLY_Q5_K_M",
    "q5_k_s": "MOSTLY_Q5_K_S",
    "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
    "q4_k_s": "MOSTLY_Q4_K_S",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
    "iq4_nl": "MOSTLY_IQ4_NL",
    "iq4_xs": "MOSTLY_IQ4_XS",
    "q3_k_l": "MOSTLY_Q3_K_L",
    "q3_k_m": "MOSTLY_Q3_K_M",
    "q3_k_s": "MOSTLY_Q3_K_S",
    "q2_k": "MOSTLY_Q2_K",
}
"""llama-quantize's names in lower case, and llama.cpp's; types that need an importance matrix are left out."""

FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F64)
OUTPUT_LINES = 20
ROWS_BYTES = 64 << 20  # of a tensor's rows in memory at once; llama.cpp's own limit is 8 GiB
LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR


def check_weight_type(name: str) -> str:
    """Return `name` in lower case if it is a type to which weights can be converted.

    Raises:
        UserError: it is not.
    """
    if name.lower() not in WEIGHT_TYPES:
        raise UserError(f"type: {name!r}, expected one of {', '.join(WEIGHT_TYPES)}")
    return name.lower()


def quantised_types(header: Header) -> list[str]:
    """The quantised types that a model's weights already have; quantising them again loses a little more."""
    return sorted(type_name(kind).lower() for kind in {tensor.type for tensor in header.tensors} - {*FLOATS})


def requantise(
    header: Header, part: Path, weight_type: str, *, target: Path, copies: int = 1, on_progress: Advance | None = None
) -> None:
    """Write the model of `header` to `part` with its weights as `weight_type`; everything else stays the same.

    One-dimensional tensors, such as rescale factors, are not changed. `target` is the file's name in messages, and the
    disk must have room for `copies` of the output.

    Raises:
        UserError: llama.cpp cannot read or quantise this model, or the disk is full.
    """
    start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import work; work()"
    files = [str(header.path.absolute()), str(part.absolute())]
    child = subprocess.Popen(
        [sys.executable, "-c", start, *files, WEIGHT_TYPES[weight_type], str(header.alignment)],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # otherwise an abort in llama.cpp would start a debugger
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C in the terminal reaches only us; we end the child
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        reason = _follow(child.stdout, target, copies, on_progress)
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    if code != 0:
        if "iostream" in reason or "write error" in reason:
            raise UserError(f"{target}: cannot write: the disk is full, or a size limit is reached")
        if "data validation failed" in reason:
            reason += f" (a number is too large for {weight_type}, expected bf16 or f32)"
        raise UserError(
            f"{header.path}: llama.cpp cannot convert it to {weight_type}: {reason or f'ended with code {code}'}"
        )
    try:
        read_header(part)
    except GGUFError as error:
        raise UserError(f"{header.path}: llama.cpp's {weight_type} file is not complete: {error}") from None


def _follow(lines: IO[bytes], target: Path, copies: int, on_progress: Advance | None) -> str:
    """Read the child's reports until it ends; return the reason if it failed and gave one."""
    total, error, output = 0, "", [""]
    for raw in lines:
        tag, _, text = raw.decode("utf-8", errors="replace").strip().partition(" ")
        if tag == "@total":
            total = int(text)
            check_space(target, copies * total)
        elif tag == "@done":
            if on_progress is not None and total:
                on_progress(min(int(text), total), total)
        elif tag == "@error":
            error = text
        elif tag:
            output = [*output[-OUTPUT_LINES:], f"{tag} {text}"]
    return error or next((line for line in output if "GGML_ASSERT" in line or "error" in line.lower()), output[-1])


# --- the child's side


def work() -> NoReturn:
    """Quantise as given on the command line, and report in lines that `_follow` reads."""
    end_with_parent(lambda: os.read(0, 1))  # nothing is ever sent: this returns when the other end is closed
    import llama_cpp

    source, target, name, alignment = sys.argv[1:]
    size = 0

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        nonlocal size
        line = text.decode("utf-8", errors="replace").strip()
        if level == LOG_ERROR:
            _report("@error", re.sub(r"^llama_model_quantize: failed to quantize: ", "", line))
        elif found := re.search(r"quant size *= *([0-9.]+) MiB", line):
            size = int(float(found.group(1)) * 2**20)
        elif re.match(r"\[ *\d+/ *\d+\]", line) and size:
            _report("@done", str(Path(target).stat().st_size))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{name}")
    params.allow_requantize = True
    params.max_buf_size = ROWS_BYTES
    if int(alignment) != DEFAULT_ALIGNMENT:
        params.kv_overrides = _default_alignment()
    for dry_run in (True, False):  # the dry run reports the size of the output
        params.dry_run = dry_run
        code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
        if code != 0:
            break
        if dry_run:
            _report("@total", str(size))
    sys.stdout.flush()
    os._exit(1 if code else 0)


def _default_alignment() -> Any:
    """An override for `general.alignment`: the quantiser always aligns to 32, but copies the file's key."""
    import llama_cpp

    overrides = (llama_cpp.llama_model_kv_override * 2)()  # the second, empty one ends the list
    overrides[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
    overrides[0].key = b"general.alignment"
    overrides[0].value.val_i64 = DEFAULT_ALIGNMENT
    return overrides


def _report(tag: str, text: str) -> None:
    print(tag, " ".join(text.split()), flush=True)
