"""Rescale factors by closed forms: PI, NTK-aware, dynamic NTK, YaRN, and one factor beyond a near window.

Each returns λ as float64 of shape ``(n_rot/2,)``, for a scale ``s`` = new context / original context, relative to
plain RoPE; `extend` makes a whole schedule of one, on top of the factors that the model was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from .schedule import Band, Provenance, RopeFacts, Schedule, ScheduleError, first_mistake, native_band

Array = npt.NDArray[np.float64]


def _check(n_rot: int, scale: float) -> None:
    if n_rot < 2 or n_rot % 2:
        raise ScheduleError(f"n_rot: {n_rot}, expected an even number of at least 2")
    if not (math.isfinite(scale) and scale >= 1):
        raise ScheduleError(f"scale: {scale:g}, expected a number of at least 1")


def pi(n_rot: int, scale: float) -> Array:
    """Position interpolation: every pair by s (Chen et al., arXiv 2306.15595, equation 4)."""
    _check(n_rot, scale)
    return np.full(n_rot // 2, float(scale))


def ntk(n_rot: int, scale: float) -> Array:
    """NTK-aware scaling: the base becomes ``b * s**(d/(d-2))`` (bloc97; YaRN, arXiv 2309.00071, equation 16).

    As factors on the old base: ``λ_i = s**(2i/(d-2))``, from 1 for the fastest pair to s for the slowest.
    """
    _check(n_rot, scale)
    if n_rot == 2:
        return np.full(1, float(scale))  # one pair is both the fastest and the slowest: interpolate it
    return float(scale) ** (2 * np.arange(n_rot // 2) / (n_rot - 2))


def dynamic_ntk(n_rot: int, scale: float, n_tokens: int, original_context: int) -> Array:
    """Dynamic NTK: NTK-aware for the length at hand (emozilla; as in transformers' ``rope_type: dynamic``).

    The base grows by ``(s * n / L0 - (s - 1))**(d/(d-2))``, and not at all while n is at most L0.
    """
    _check(n_rot, scale)
    length = max(n_tokens, original_context)
    return ntk(n_rot, scale * length / original_context - (scale - 1))


def yarn(
    n_rot: int,
    scale: float,
    freq_base: float,
    original_context: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    *,
    truncate: bool = True,
) -> Array:
    """YaRN's "NTK-by-parts" (Peng et al., arXiv 2309.00071, equations 17 to 21).

    Pairs that rotate more than `beta_fast` times within the original context stay unchanged, those that rotate less
    than `beta_slow` times are interpolated by s, and the frequencies between are blended on a linear ramp.
    The ramp's ends are rounded outwards to whole dimensions, as in the authors' code, transformers and llama.cpp, or
    not if `truncate` is false, as in transformers (gpt-oss was trained so).
    """
    _check(n_rot, scale)

    def correction_dim(n_rotations: float) -> float:
        return n_rot * math.log(original_context / (n_rotations * 2 * math.pi)) / (2 * math.log(freq_base))

    low, high = correction_dim(beta_fast), correction_dim(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_rot - 1)
    ramp: Array = np.clip((np.arange(n_rot // 2) - low) / max(high - low, 0.001), 0, 1)
    return 1 / (ramp / scale + (1 - ramp))


def yarn_attention_factor(scale: float, mscale: float = 1.0) -> float:
    """YaRN's scale on the rotated vectors, ``0.1 m ln s + 1`` (arXiv 2309.00071, equation 22, where m is 1)."""
    return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0


def longrope_attention_factor(scale: float, original_context: int) -> float:
    """LongRoPE's scale on the rotated vectors, ``sqrt(1 + ln s / ln L0)`` (arXiv 2402.13753, section 4.2's models)."""
    return math.sqrt(1 + math.log(scale) / math.log(original_context)) if scale > 1 else 1.0


def near(n_rot: int, scale: float, original_context: int, near_tokens: int) -> Array:
    """One λ for all distances beyond a near window of W tokens, ``(N - W) / (L0 - W)``; within it, the model's own.

    Leaky ReRoPE (Jianlin Su, https://kexue.fm/archives/9708) with the least λ at which the farthest of N = s L0 tokens
    seems no farther than L0.
    """
    _check(n_rot, scale)
    if not 0 < near_tokens < original_context:
        raise ScheduleError(f"near_tokens: {near_tokens}, expected 1 to {original_context - 1}")
    return np.full(n_rot // 2, (scale * original_context - near_tokens) / (original_context - near_tokens))


class ClosedForm(NamedTuple):
    """What a closed form gives: λ of shape ``(n_rot/2,)``, an attention factor, and a near window in tokens."""

    factors: Array
    attention_factor: float = 1.0
    near_tokens: int = 0


METHODS: dict[str, Callable[[int, float, float, int, int], ClosedForm]] = {
    "yarn": lambda d, s, base, length, window: ClosedForm(yarn(d, s, base, length), yarn_attention_factor(s)),
    "ntk": lambda d, s, base, length, window: ClosedForm(ntk(d, s)),
    "pi": lambda d, s, base, length, window: ClosedForm(pi(d, s)),
    "near": lambda d, s, base, length, window: ClosedForm(near(d, s, length, window), near_tokens=window),
}
"""Closed forms by name: (n_rot, scale, freq_base, original context, near window that `near` is to have)."""


def default_near_tokens(facts: RopeFacts) -> int:
    """The near window that a band has if nothing else is said: half of the original context, in tokens."""
    return facts.original_context // 2


def doubling_contexts(original_context: int, context: int) -> list[int]:
    """Contexts of the bands above the original: each twice the one before, the last exactly `context`."""
    steps = []
    while original_context * 2 < context:
        original_context *= 2
        steps.append(original_context)
    return [*steps, context]


def extend(
    base: Schedule,
    context: int,
    method: str = "yarn",
    contexts: Sequence[int] | None = None,
    near_tokens: int | None = None,
) -> Schedule:
    """Add bands by a closed form on top of those that the model has, up to `context` tokens.

    The bands of `base` stay. Each new band multiplies the factors of the last of them by the method's, for a scale
    relative to that band's context. `contexts` are the contexts of the new bands; by default they double up to
    `context`, because a band longer than the text needs costs accuracy. `near_tokens` is the window that the method
    `near` gives them, half of the original context by default. Such bands bring YaRN's as their plain ones, and
    multiply the last band that has no near window; the other methods multiply the last one's plain form.

    Raises:
        ScheduleError: an unknown method, a near window for another method than `near` or longer than the original
            context, or a context that is not longer than what the model already holds.
    """
    if method not in METHODS:
        raise ScheduleError(f"method: {method!r}, expected one of {', '.join(METHODS)}")
    if near_tokens is not None and method != "near":
        raise ScheduleError(f"near_tokens: {near_tokens}, expected it with the method near alone, found {method}")
    if context <= base.context:
        raise ScheduleError(
            f"context: {context}, expected more than the {base.context} tokens that the model already holds"
        )
    facts = base.facts
    onto = last_without_window(base) if method == "near" else plain_band(facts, base.bands[-1])
    window = default_near_tokens(facts) if near_tokens is None else near_tokens
    try:
        bands = [
            _extended(facts, onto, target, method, window)
            for target in contexts or doubling_contexts(base.context, context)
        ]
        return Schedule(facts=facts, bands=(*base.bands, *bands))
    except ValidationError as error:
        raise ScheduleError(f"{method}: {first_mistake(error)}") from None


def last_without_window(schedule: Schedule) -> Band:
    """The longest band without a near window, on which those with one build; or else the shortest one's plain form."""
    plain = [band for band in schedule.bands if not band.near_tokens]
    return plain[-1] if plain else plain_band(schedule.facts, schedule.bands[0])


def _extended(facts: RopeFacts, onto: Band, context: int, method: str, near_tokens: int) -> Band:
    """The band for `context` that multiplies the factors of `onto` by the method's; a near one with its plain band."""
    form = METHODS[method](facts.n_rot, context / onto.context, facts.freq_base, onto.context, near_tokens)
    unscaled = all(factor == 1.0 for factor in onto.rescale_factors)
    return Band(
        context=context,
        near_tokens=form.near_tokens,
        rescale_factors=tuple((form.factors * np.array(onto.rescale_factors)).tolist()),
        start_tokens=onto.start_tokens,
        force_start_tokens=onto.force_start_tokens,
        attention_factor=form.attention_factor * onto.attention_factor,
        found=Provenance(method=method, onto=None if unscaled else onto.found.method),
        plain=_extended(facts, onto, context, "yarn", 0) if form.near_tokens else None,
    )


def plain_band(facts: RopeFacts, band: Band) -> Band:
    """Return `band` as it is without its near window: what stock llama.cpp, which has none, can run.

    A band with a window that brings no plain one stands for YaRN's at its context.
    """
    if not band.near_tokens:
        return band
    if band.plain is not None:
        return band.plain
    own = native_band(facts)
    if band.context <= facts.original_context:
        return own.model_copy(update={"context": band.context})
    return _extended(facts, own, band.context, "yarn", 0)


def without_windows(schedule: Schedule) -> Schedule:
    """Return `schedule` with the plain form of each band, for attention that knows no near window."""
    bands = tuple(plain_band(schedule.facts, band) for band in schedule.bands)
    return schedule.model_copy(update={"bands": bands})
