"""The space of a search: candidates, their bounds and constraints, and how they become bands.

Everything is relative to the band that the new one extends (`onto`): λ are multiplied, so a relative λ of 1 leaves a
pair unchanged, together with any interpolation that it already has.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace

import numpy as np

from ..methods import METHODS, Array, default_near_tokens, yarn_attention_factor
from ..schedule import (
    LARGEST_ATTENTION,
    SMALLEST_ATTENTION,
    START_TOKENS,
    STILL_FACTOR,
    Band,
    Provenance,
    RopeFacts,
    ScheduleError,
)

FAST_ROTATIONS = 64
"""Pairs that rotate more often than this within the original context are not searched: the loss is rugged in their λ,
since at a far position a thousandth of λ is many radians."""

STILL_WAVELENGTHS = (1 / 8, 1 / 4, 1 / 2, 1, 1.5, 2)
"""Wavelengths below which pairs may stand still beyond a near window, in units of the window."""

KEY_DECIMALS = 6


@dataclass(frozen=True)
class Candidate:
    """One point of the space.

    Attributes:
        log_factors: ln λ relative to the band that is extended, shape ``(n_rot/2,)``; with a near window, of the
            distances beyond it.
        start_tokens: n̂.
        attention_factor: relative to that of the band that is extended.
        near_tokens: the near window W; 0 = none.
        still_pairs: how many of the fastest pairs stand still beyond the window; 0 without one. In a `Space`, their
            ln λ, which have no effect, are that of the first pair that moves (or those of fixed pairs).
    """

    log_factors: tuple[float, ...]
    start_tokens: int = 0
    attention_factor: float = 1.0
    near_tokens: int = 0
    still_pairs: int = 0


@dataclass(frozen=True)
class Space:
    """The bands that a search may propose.

    Args:
        facts: the model's.
        onto: the band that the new one extends: the model's last that has no near window.
        context: tokens that the new band holds.
        fixed_pairs: how many of the fastest pairs keep YaRN's λ (usually 1); by default those that rotate more than
            `FAST_ROTATIONS` times within the original context. With a near window, too: beyond it, `near` with λ of 1
            for these pairs has the same loss (SmolLM2, 12,288 tokens: 3.7826 nats both), and so the others, which never
            decrease, may be anything from 1.
        headroom: the largest relative λ, as a multiple of the scale (LongRoPE, arXiv 2402.13753, table 4: 1.25), or
            with a near window, of the λ of `near`.
        start_tokens: the n̂ to choose from; `onto`'s own is always among them.
        near_tokens: the near windows W to choose from, 0 for none; see `usual_near_tokens`.
        attention_range: bounds of the relative attention factor; by default from 1 to twice as far from it as YaRN's.

    Raises:
        ScheduleError: a value is out of range; names it.
    """

    facts: RopeFacts
    onto: Band
    context: int
    fixed_pairs: int | None = None
    headroom: float = 1.25
    start_tokens: tuple[int, ...] = START_TOKENS
    attention_range: tuple[float, float] | None = None
    near_tokens: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if len(self.onto.rescale_factors) != self.n_pairs:
            found = len(self.onto.rescale_factors)
            raise ScheduleError(f"rescale_factors: {found} numbers, expected n_rot/2 = {self.n_pairs}")
        if self.context < self.onto.context:
            raise ScheduleError(f"context: {self.context}, expected at least {self.onto.context}, the model's own")
        if self.fixed_pairs is not None and not 0 <= self.fixed_pairs < self.n_pairs:
            raise ScheduleError(f"fixed pairs: {self.fixed_pairs}, expected 0 to {self.n_pairs - 1}")
        if not (math.isfinite(self.headroom) and self.headroom >= 1):
            raise ScheduleError(f"headroom: {self.headroom:g}, expected a number of at least 1")
        low, high = self.attention_bounds
        own = self.onto.attention_factor
        if not SMALLEST_ATTENTION / own <= low <= high <= LARGEST_ATTENTION / own:
            raise ScheduleError(
                f"attention range: {low:g} to {high:g}, expected increasing numbers"
                f" from {SMALLEST_ATTENTION / own:g} to {LARGEST_ATTENTION / own:g}"
            )
        unknown = [n for n in self.start_tokens if n not in START_TOKENS]
        if unknown:
            raise ScheduleError(f"start tokens: {unknown[0]}, expected some of {', '.join(map(str, START_TOKENS))}")
        if self.onto.near_tokens:
            raise ScheduleError(f"near_tokens: {self.onto.near_tokens} in the band to extend, expected one without")
        self._check_near_tokens()

    def _check_near_tokens(self) -> None:
        longest = min(self.facts.original_context, self.onto.context) - 1
        if not self.near_tokens:
            raise ScheduleError("near tokens: none, expected numbers of tokens (0 for no near window)")
        for window in self.near_tokens:
            if not 0 <= window <= longest:
                raise ScheduleError(f"near tokens: {window}, expected 0 to {longest}")
            if not self.start_tokens_within(window):
                least = self.start_token_choices[0]
                raise ScheduleError(f"near tokens: {window}, expected at least the {least} start tokens, or 0")

    @property
    def n_pairs(self) -> int:
        return self.facts.n_rot // 2

    @property
    def scale(self) -> float:
        """s: the new context divided by that of the band that is extended."""
        return self.context / self.onto.context

    @property
    def n_fixed(self) -> int:
        """How many of the fastest pairs are not searched; the slowest pair always is."""
        if self.fixed_pairs is not None:
            return self.fixed_pairs
        return min(int(np.sum(self._wavelengths < self.facts.original_context / FAST_ROTATIONS)), self.n_pairs - 1)

    @property
    def _wavelengths(self) -> Array:
        """Tokens within which each pair of plain RoPE turns once, shape ``(n_rot/2,)``."""
        return np.asarray(2 * np.pi * self.facts.freq_base ** (2 * np.arange(self.n_pairs) / self.facts.n_rot))

    def usual_still_pairs(self, near_tokens: int, wavelength: float = 1) -> int:
        """How many pairs, but not all, turn within `wavelength` times the window, in the model's own rotation."""
        own = self._wavelengths * np.array(self.facts.start_factors)
        return min(int(np.sum(own < wavelength * near_tokens)), self.n_pairs - 1)

    def still_choices(self, near_tokens: int) -> tuple[int, ...]:
        """The numbers of pairs to choose from that stand still beyond a near window, in increasing order."""
        return tuple(sorted({0, *(self.usual_still_pairs(near_tokens, length) for length in STILL_WAVELENGTHS)}))

    def first_moving(self, candidate: Candidate) -> int:
        """The first pair whose λ is searched and has an effect."""
        return max(self.n_fixed, candidate.still_pairs)

    def stretch(self, near_tokens: int) -> float:
        """The λ by which the farthest of N tokens seems as far as that of the band that is extended, of L tokens.

        ``(N - W) / (L - W)``, so the scale without a near window.
        """
        return (self.context - near_tokens) / (self.onto.context - near_tokens)

    @property
    def smallest_log_factor(self) -> float:
        """The least ln λ of searched pairs: that of the last pair that is not searched."""
        n = self.n_fixed
        return max(self.closed_form("yarn").log_factors[n - 1], 0.0) if n else 0.0

    def largest_log_factor(self, near_tokens: int = 0) -> float:
        return math.log(self.headroom * self.stretch(near_tokens))

    @property
    def attention_bounds(self) -> tuple[float, float]:
        return self.attention_range or (1.0, 2 * yarn_attention_factor(self.scale) - 1)

    @property
    def start_token_choices(self) -> tuple[int, ...]:
        return tuple(sorted(n for n in {*self.start_tokens, self.onto.start_tokens} if n <= self.context))

    def start_tokens_within(self, near_tokens: int) -> tuple[int, ...]:
        """The n̂ to choose from with a near window, which holds all start tokens."""
        return tuple(n for n in self.start_token_choices if n <= (near_tokens or n))

    @property
    def near_token_choices(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.near_tokens)))

    @property
    def windows(self) -> tuple[int, ...]:
        """The near windows to choose from, without 0."""
        return tuple(window for window in self.near_token_choices if window)

    @property
    def usual_window(self) -> int:
        """Of `windows`, the one that is nearest to what a closed form has by default; 0 if there are none."""
        usual = default_near_tokens(self.facts)
        return min(self.windows, key=lambda window: abs(window - usual), default=0)

    @property
    def reference(self) -> Candidate:
        """The closed form that most candidates are near: `near` if near windows are searched, YaRN otherwise."""
        return self.closed_form("near", self.usual_window) if self.windows else self.seed("yarn")

    def closed_form(self, method: str, near_tokens: int | None = None) -> Candidate:
        """A closed form unmodified, for every pair, to compare a search with; `near_tokens` is the window of `near`."""
        facts, window = self.facts, default_near_tokens(self.facts) if near_tokens is None else near_tokens
        form = METHODS[method](facts.n_rot, self.scale, facts.freq_base, self.onto.context, window)
        start = self.onto.start_tokens if self.onto.start_tokens <= (form.near_tokens or self.context) else 0
        return Candidate(tuple(np.log(form.factors).tolist()), start, form.attention_factor, form.near_tokens)

    def seed(self, method: str, near_tokens: int | None = None) -> Candidate:
        """A closed form projected onto this space, to start a search from."""
        return self.project(self.closed_form(method, near_tokens))

    def project(self, candidate: Candidate) -> Candidate:
        """The nearest candidate in the space: fixed pairs, λ that do not decrease with the dimension, bounds.

        A candidate without a near window stays so, even if there is none to choose.

        Pools adjacent violators, which is the least-squares projection in ln λ: it moves both sides of a violation,
        whereas a running maximum would only raise values. Clipping its result projects onto the bounds as well.
        """
        window = candidate.near_tokens
        if window and window not in self.windows:
            window = min(self.near_token_choices, key=lambda choice: abs(choice - window))
        floor = self.smallest_log_factor
        still = min(max(candidate.still_pairs, 0), self.n_pairs - 1) if window else 0
        free = np.array(candidate.log_factors[self.n_fixed :])
        moving = free[max(still - self.n_fixed, 0) :]
        moving[:] = np.clip(non_decreasing(moving), floor, max(self.largest_log_factor(window), floor))
        choices = self.start_tokens_within(window)
        start_tokens = min(choices, key=lambda choice: abs(choice - candidate.start_tokens))
        attention = float(np.clip(candidate.attention_factor, *self.attention_bounds))
        return self.with_free(Candidate((), start_tokens, attention, window, still), free)

    def with_free(self, candidate: Candidate, log_factors: Array) -> Candidate:
        """`candidate` with these ln λ of the searched pairs, and YaRN's of the others.

        Pairs that stand still get the ln λ of the first that moves, so that equal bands are equal candidates.
        """
        fixed = self.closed_form("yarn").log_factors[: self.n_fixed]
        free, still = log_factors.tolist(), max(candidate.still_pairs - self.n_fixed, 0)
        return replace(candidate, log_factors=(*fixed, *[free[still]] * still, *free[still:]))

    def moved(self, candidate: Candidate, log_factors: Array, log_attention: float = 0.0) -> Candidate:
        """`candidate` with the free pairs' ln λ and ln attention factor changed by these amounts, projected."""
        moved = np.array(candidate.log_factors)
        moved[self.n_fixed :] += log_factors
        attention = candidate.attention_factor * math.exp(log_attention)
        return self.project(replace(candidate, log_factors=tuple(moved.tolist()), attention_factor=attention))

    def with_window(self, candidate: Candidate, near_tokens: int) -> Candidate:
        """`candidate` with another near window, projected; ln λ grow in proportion to ln of the stretch.

        Pairs that stand still are those below the same wavelength in units of the window, about.
        """
        before, after = (math.log(self.stretch(window)) for window in (candidate.near_tokens, near_tokens))
        ratio = after / before if before > 0 else 1.0
        factors = tuple(ratio * value for value in candidate.log_factors)
        still = candidate.still_pairs
        if still and near_tokens and near_tokens != candidate.near_tokens:
            same = still + math.log(near_tokens / candidate.near_tokens, self.facts.freq_base) * self.n_pairs
            still = min(self.still_choices(near_tokens)[1:], key=lambda choice: abs(choice - same), default=0)
        return self.project(replace(candidate, log_factors=factors, near_tokens=near_tokens, still_pairs=still))

    def with_still_pairs(self, candidate: Candidate, still_pairs: int) -> Candidate:
        """`candidate` with this many pairs that stand still; those that no longer do move like the first that did."""
        return self.with_free(
            replace(candidate, still_pairs=still_pairs), np.array(candidate.log_factors[self.n_fixed :])
        )

    def band(self, candidate: Candidate, found: Provenance | None = None, plain: Band | None = None) -> Band:
        """The band that `candidate` stands for, with `plain` as its plain form.

        λ are rounded to 9 decimals, so that numbers on a grid stay exact.
        """
        onto = np.array(self.onto.rescale_factors)
        factors, still = np.exp(candidate.log_factors).round(9) * onto, candidate.still_pairs
        factors[:still] = np.maximum(onto[:still], STILL_FACTOR)
        return Band(
            context=self.context,
            near_tokens=candidate.near_tokens,
            rescale_factors=tuple(factors.tolist()),
            start_tokens=candidate.start_tokens,
            force_start_tokens=candidate.start_tokens not in START_TOKENS,
            attention_factor=candidate.attention_factor * self.onto.attention_factor,
            found=found or Provenance(),
            plain=plain,
        )

    def candidate(self, band: Band) -> Candidate:
        """`band` as a candidate, relative to `onto`; not projected."""
        logs = np.log(np.array(band.rescale_factors) / np.array(self.onto.rescale_factors))
        still = band.still_pairs
        logs[:still] = logs[still]
        attention = band.attention_factor / self.onto.attention_factor
        return Candidate(tuple(logs.tolist()), band.start_tokens, attention, band.near_tokens, still)

    @property
    def onto_method(self) -> str | None:
        """For the provenance: the method whose factors the new ones are multiplied onto; None if those are all ones."""
        return None if all(factor == 1.0 for factor in self.onto.rescale_factors) else self.onto.found.method


def usual_near_tokens(facts: RopeFacts) -> tuple[int, ...]:
    """The near windows that a search chooses from by default: none, and 512 and its doubles up to half the original
    context (half of that alone, where it is shorter)."""
    half = default_near_tokens(facts)
    return (0, *(512 << i for i in range(half.bit_length()) if 512 << i <= half)) if half >= 512 else (0, half)


def non_decreasing(values: Array) -> Array:
    """The non-decreasing sequence nearest to `values` in least squares (pool adjacent violators)."""
    sums: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        sums.append(value)
        counts.append(1)
        while len(sums) > 1 and sums[-2] * counts[-1] > sums[-1] * counts[-2]:
            total, count = sums.pop(), counts.pop()
            sums[-1] += total
            counts[-1] += count
    return np.repeat(np.array(sums) / np.array(counts), counts)


def band_key(band: Band) -> str:
    """A digest of all of a band that a loss can depend on; equal for bands that differ by less than 1e-6."""
    factors = [round(factor, KEY_DECIMALS) for factor in band.rescale_factors]
    attention = round(band.attention_factor, KEY_DECIMALS)
    values = [band.context, factors, band.start_tokens, attention, band.near_tokens]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]
