"""What models run with on this machine: llama.cpp, the native kernels, cores and threads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import llama_cpp

from ..processes import allowed_cpus, cpu_quota
from .graph.admission import check_engine
from .graph.fast import switched_off
from .graph.kernels import exact_by_default, instructions_in_use, why_missing
from .repacking import Comparison, known_comparisons, told_by_environment
from .threads import default_threads


@dataclass(frozen=True)
class Machine:
    """How this machine computes.

    Attributes:
        llama_cpp: the release of llama-cpp-python.
        extra_buffers: whether llama.cpp keeps weights in extra buffers, as for AMX.
        instructions: the instruction set of the native kernels; empty without them.
        missing: why there are no native kernels; empty if there are.
        computes: what long prompts are computed by: the "kernels", "torch", or "llama.cpp" alone.
        exact: whether the kernels compute in floats alone.
        cpus: logical CPUs that this process may run on.
        quota: cores' time that its control group allows; None = all.
        may_repack: whether llama.cpp may repack weights, if the environment says so; None = the faster one is used.
        repacking: which one that is, by type of weights, as far as it has been measured.
        threads: how many compute, unless told otherwise.
    """

    llama_cpp: str
    extra_buffers: bool
    instructions: str
    missing: str
    computes: str
    exact: bool
    may_repack: bool | None
    repacking: tuple[Comparison, ...]
    cpus: int
    quota: float | None
    threads: int


def this_machine() -> Machine:
    """Return how this machine computes.

    Raises:
        LayoutError: this build of llama-cpp-python cannot be used.
    """
    engine = check_engine()
    missing = why_missing() or ("" if engine.kernels else "they fail the self-test on this machine")
    quota = cpu_quota()
    return Machine(
        llama_cpp=llama_cpp.__version__,
        extra_buffers=engine.extra_buffers,
        instructions="" if missing else instructions_in_use(),
        missing=missing,
        computes="llama.cpp" if switched_off() else "torch" if missing else "kernels",
        exact=exact_by_default(),
        may_repack=told_by_environment(),
        repacking=() if missing else known_comparisons(),
        cpus=len(allowed_cpus()),
        quota=None if quota == math.inf else quota,
        threads=default_threads(),
    )
