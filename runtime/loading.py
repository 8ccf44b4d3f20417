"""What is decided before a model is loaded: the schedule it runs with, and how long its context may be."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

from ..container import Header, native_schedule, schedule_of
from ..errors import UserError
from ..factors import Band, Provenance, Schedule, check_matches, read_schedule
from .memory import MemoryPlan, head_size, is_quantised

ROPE_OPTIONS = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
)
"""llama_cpp's own options for scaling RoPE; where one of them is given, no schedule is applied."""


def resolve_schedule(
    header: Header, given: Schedule | str | os.PathLike[str] | None, n_ctx: int, options: dict[str, Any]
) -> tuple[Schedule, bool]:
    """Return the schedule to run with, and whether it needs the rope callback.

    Raises:
        UserError: a schedule for another model, or one together with llama_cpp's own rope options.
    """
    defaults = inspect.signature(llama_cpp.Llama.__init__).parameters
    own = [name for name in ROPE_OPTIONS if name in options and options[name] != defaults[name].default]
    native = native_schedule(header)
    if own and (given is not None or schedule_of(header) != native):
        raise UserError(f"{own[0]}: the model has a rescale schedule; give one or the other")
    if own:
        last = native.bands[-1]
        band = Band(
            context=max(n_ctx, 1) if n_ctx else last.context,
            rescale_factors=last.rescale_factors,
            found=Provenance(method="llama.cpp options"),
        )
        return Schedule(facts=native.facts, bands=(band,)), False
    if given is None:
        schedule = schedule_of(header)
        return schedule, schedule != native or len(native.bands) > 1
    if isinstance(given, Schedule):
        where, schedule = "schedule", given
    else:
        where, schedule = str(given), read_schedule(given)
    check_matches(schedule, native.facts, where)
    return schedule, True


def check_context(n_ctx: int, schedule: Schedule) -> int:
    """Return the context to run with: `n_ctx`, or for 0 all that the last band holds.

    Raises:
        UserError: it is not a number of tokens, or more than the last band holds.
    """
    if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or n_ctx < 0:
        raise UserError(f"n_ctx: {n_ctx!r}, expected a number of tokens (0 for the model's longest)")
    if n_ctx > schedule.context:
        raise UserError(
            f"n_ctx: {n_ctx:,} tokens, expected at most {schedule.context:,}, which the model's last band holds"
        )
    return n_ctx or schedule.context


@contextmanager
def key_rotation_layout(header: Header, schedule: Schedule, plan: MemoryPlan) -> Iterator[None]:
    """Keep llama.cpp from mixing rotated and unrotated dimensions of a quantised key.

    Its Hadamard transform of quantised keys spans whole heads, but its K-shift undoes it on the rotated dimensions
    only: where those are fewer, keys could not be rotated, so the transform is switched off for this context.
    """
    size = head_size(header)
    partial = is_quantised(plan.type_k) and schedule.facts.n_rot != size and len(schedule.bands) > 1
    name, before = "LLAMA_ATTN_ROT_DISABLE", os.environ.get("LLAMA_ATTN_ROT_DISABLE")
    if partial:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if partial:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before
