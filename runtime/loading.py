"""What is decided before a model is loaded: the schedule it runs with, and how long its context may be."""

from __future__ import annotations

import inspect
import os
import re
from typing import Any

import llama_cpp

from ..container import Header, native_schedule, schedule_of
from ..errors import UserError
from ..factors import Band, Provenance, Schedule, check_matches, read_schedule
from .memory import head_size, is_quantised

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

HADAMARD = 64
"""llama.cpp transforms quantised keys of heads with a multiple of so many dimensions."""


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


def keys_can_shift(header: Header, n_rot: int, type_k: str) -> bool:
    """Whether llama.cpp's K-shift can rotate the keys of a context that is created now, with keys of `type_k`.

    Where it cannot, it does not say so, but crashes: its ROPE knows no BF16; and with quantised keys, it takes for
    granted that they are Hadamard-transformed, which they are only in heads of a multiple of 64 dimensions, of one size
    in all layers, and unless LLAMA_ATTN_ROT_DISABLE is set; and that they have no dimensions that are not rotated.
    """
    if not is_quantised(type_k):
        return type_k != "bf16"
    size = head_size(header)
    others = [header.get(f"{header.arch}.{key}_swa") for key in ("attention.key_length", "rope.dimension_count")]
    one_size = n_rot == size and all(other in (None, size) for other in others)
    return one_size and size % HADAMARD == 0 and not _is_set("LLAMA_ATTN_ROT_DISABLE")


def _is_set(name: str) -> bool:
    """Whether llama.cpp takes an environment variable for true: C's atoi of it is not 0."""
    number = re.match(r"\s*[+-]?(\d+)", os.environ.get(name, ""))
    return number is not None and int(number[1]) != 0
