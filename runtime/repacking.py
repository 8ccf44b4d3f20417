"""Whether llama.cpp may keep a model's weights repacked, or our kernels multiply them as they are: the faster one.

llama.cpp repacks weights of some types at load, into buffers with product kernels of their own (AMX's are such ones),
and which side wins depends on the type and the processor. The first model of a type is therefore preceded by a
measurement in a process of its own (`runtime.repacking_trial`, a second or two), which is remembered in the user's
cache folder. Where nothing can be measured, weights are repacked as llama.cpp does it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import llama_cpp
import platformdirs

from ..container import Header, model_parts, type_name
from ..files import write_file
from .graph.admission import identity
from .graph.kernels import exact_by_default
from .threads import default_threads

SWITCH = "ROPEWALK_REPACK"
"""Environment variable: 1 = llama.cpp may repack weights, 0 = it may not; nothing is measured then."""

VERSION = 1  # raise it when figures come to mean something else

CLEARLY = 1.05
"""Our kernels are used where they are at least so many times as fast."""

MIN_BYTES = 32 << 20
"""Of a model's weights: a smaller one gains less than the measurement takes."""

PATIENCE_S, FAILED_S = 90.0, 24 * 3600.0
"""How long a measurement may take, and how long after one that failed it is tried again."""

REPACKED = ("Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4")
REPACKED_FOR_AMX = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
"""Types that llama.cpp repacks on some processor (ggml-cpu/repack.cpp, kleidiai.cpp; amx/common.h)."""

_logger = logging.getLogger("ropewalk")


@dataclass(frozen=True)
class Comparison:
    """What was measured for one type of weights on this machine.

    Attributes:
        kind: the type ("Q4_K").
        n_threads, n_threads_batch: how many write, and how many read.
        repacked: whether llama.cpp repacks this type here at all.
        reading, writing: how many times as fast our kernels are as llama.cpp's for repacked weights.
        failed: why nothing could be measured; empty if it was.
    """

    kind: str
    n_threads: int
    n_threads_batch: int
    repacked: bool = True
    reading: float = 1.0
    writing: float = 1.0
    failed: str = ""

    @property
    def ours(self) -> bool:
        """Whether our kernels are clearly faster."""
        return self.repacked and not self.failed and math.sqrt(self.reading * self.writing) >= CLEARLY


def may_repack(header: Header, *, ours: bool, n_threads: int, n_threads_batch: int) -> bool:
    """Return whether llama.cpp may repack this model's weights, which is measured if it is not known yet.

    `ours` says whether our kernels compute products at all, rounding where that is faster. The environment variable
    ROPEWALK_REPACK decides without a measurement.
    """
    told = told_by_environment()
    if told is not None:
        return told
    kind = _repackable_type(header) if ours and sys.executable else ""
    return not kind or not _compared(identity(), kind, n_threads, n_threads_batch).ours


def told_by_environment() -> bool | None:
    """Return what the environment variable says; None if it is not set."""
    value = os.environ.get(SWITCH, "").strip().lower()
    return value not in ("0", "off", "no", "false") if value else None


def known_comparison(header: Header) -> Comparison | None:
    """Return the comparison that decides about this model with the usual number of threads, if it has been made."""
    kind = "" if exact_by_default() or told_by_environment() is not None else _repackable_type(header)
    threads = default_threads()
    return _remembered(_place(identity(), kind, threads, threads)) if kind else None


def known_comparisons() -> tuple[Comparison, ...]:
    """Return all comparisons that were made on this machine with this llama.cpp and these kernels, by type."""
    places = sorted(_folder().glob(f"repacking-{VERSION}-{identity()}-*.json"))
    return tuple(known for known in map(_remembered, places) if known is not None)


# --- the model


def _repackable_type(header: Header) -> str:
    """The type of most of the layers' weights, if llama.cpp repacks it on processors like this one; else empty.

    Experts' weights, in three dimensions, are left to llama.cpp: our kernels do not multiply them.
    """
    held: Counter[tuple[int, bool]] = Counter()
    for part in model_parts(header):
        for tensor in part.tensors:
            if tensor.name.startswith("blk."):
                held[tensor.type, len(tensor.shape) > 2] += tensor.n_bytes
    if held.total() < MIN_BYTES:
        return ""
    ((kind, of_experts), _), *_ = held.most_common(1)
    return type_name(kind) if not of_experts and type_name(kind) in _types_repacked_here() else ""


def _types_repacked_here() -> frozenset[str]:
    """Types that this build of llama.cpp may repack; some of them only on other processors."""
    built = llama_cpp.llama_print_system_info().decode(errors="replace")
    plain = REPACKED if "REPACK = 1" in built or "KLEIDIAI = 1" in built else ()
    return frozenset(plain + (REPACKED_FOR_AMX if "AMX_INT8 = 1" in built else ()))


# --- what is remembered


def _folder() -> Path:
    return Path(platformdirs.user_cache_dir("ropewalk"))


def _place(machine: str, kind: str, n_threads: int, n_threads_batch: int) -> Path:
    return _folder() / f"repacking-{VERSION}-{machine}-{kind}-{n_threads}-{n_threads_batch}.json"


def _remembered(place: Path) -> Comparison | None:
    """What was measured earlier; None if nothing was, it cannot be read, or it failed some time ago."""
    with suppress(OSError, ValueError, TypeError):
        known = Comparison(**json.loads(place.read_text(encoding="utf-8")))
        if not (0 < known.reading < math.inf and 0 < known.writing < math.inf):
            return None
        return None if known.failed and time.time() - place.stat().st_mtime > FAILED_S else known
    return None


@cache
def _compared(machine: str, kind: str, n_threads: int, n_threads_batch: int) -> Comparison:
    place = _place(machine, kind, n_threads, n_threads_batch)
    known = _remembered(place)
    if known is None:
        known = _measure(kind, n_threads, n_threads_batch)
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_file(place, json.dumps(asdict(known)).encode() + b"\n", private=True)
    return known


# --- the measurement


def _measure(kind: str, n_threads: int, n_threads_batch: int) -> Comparison:
    """Run the trial in a process of its own, in a temporary folder."""
    _logger.info("ropewalk: measuring once which kernels are faster for %s weights on this machine", kind)
    comparison = Comparison(kind, n_threads, n_threads_batch)
    try:
        with tempfile.TemporaryDirectory(prefix="ropewalk-") as folder:
            comparison = _run(comparison, folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        comparison = Comparison(kind, n_threads, n_threads_batch, failed=str(error).splitlines()[0])
    if comparison.failed:
        _logger.info("ropewalk: it failed (%s): weights stay repacked, as llama.cpp does it", comparison.failed)
    return comparison


def _run(asked: Comparison, folder: str) -> Comparison:
    """Run the trial; a crash or an answer that makes no sense is a comparison that failed."""
    call = f"main({folder!r}, {asked.kind!r}, {asked.n_threads}, {asked.n_threads_batch})"
    start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__}_trial import main; {call}"
    done = subprocess.run(
        [sys.executable, "-c", start],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
        env={**os.environ, "GGML_NO_BACKTRACE": "1", SWITCH: "1"},
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).decode(errors="replace").strip().splitlines()
    said = lines[-1] if lines else "nothing"
    if done.returncode == 0:
        with suppress(ValueError, TypeError):
            found = json.loads(said)
            return Comparison(asked.kind, asked.n_threads, asked.n_threads_batch, **found)
    failed = f"exit code {done.returncode}: {said}"
    return Comparison(asked.kind, asked.n_threads, asked.n_threads_batch, failed=failed)
