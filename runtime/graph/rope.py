"""λ in the graph: sets what the ROPE nodes read before they are computed.

Two uses. While tokens are read, every rope node of the model's global layers gets the λ and attention factor in use
(`RopeHook.use`). When the band changes, the keys in the cache are rotated from the old λ to the new
(`plan_rotations`, `RopeHook.set_rotation`): llama.cpp's own K-shift graph is run with each cell's position as its shift
and the factors ``1/(1/λ_new - 1/λ_old)``, since rotations about the same axes add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...factors import Band, RopeFacts
from . import ggml
from .kernels import NearWindow, RopeSetting

OURS = b"ropewalk factors"
"""The name of our tensors of factors: a node that reads one was set before."""

STILL = 1e30
"""A rescale factor so large that the pair does not rotate at any position."""


@dataclass(frozen=True)
class Rotation:
    """One pass over the cached keys: cells at positions in [start, stop) go from the λ `before` to `after`.

    Those of all cells are scaled.
    """

    start: int
    stop: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    scale: float

    @property
    def factors(self) -> tuple[float, ...]:
        """What to rescale the positions of these cells by, to rotate them from `before` to `after`."""
        return rotation_factors(self.before, self.after)


@dataclass(frozen=True)
class BandChange:
    """A sequence of `n_tokens` moved from one band to another in `seconds`."""

    old_index: int
    new_index: int
    old: Band
    new: Band
    n_tokens: int
    seconds: float
    reread: bool
    """Whether the tokens were read again, as this kind of cache cannot be rotated."""


def rotation_factors(old: Sequence[float], new: Sequence[float]) -> tuple[float, ...]:
    """Return factors that take a key rotated with λ `old` to `new`: ``1/(1/new - 1/old)``, shape ``(n_rot/2,)``."""
    delta = 1 / np.asarray(new, dtype=np.float64) - 1 / np.asarray(old, dtype=np.float64)
    return tuple(np.where(np.abs(delta) < 1 / STILL, STILL, 1 / np.where(delta == 0, 1, delta)).tolist())


def plan_rotations(facts: RopeFacts, old: Band, new: Band, n_tokens: int) -> list[Rotation]:
    """Return the passes that take `n_tokens` cached keys from band `old` to band `new`.

    Start tokens have the model's own factors in either band, so the positions form at most three runs: below both
    bands' start tokens (nothing rotates), between them, and above both. Passes that would change nothing are left out;
    the first one also applies the change of the attention factor.
    """
    low, high = sorted((old.start_tokens, new.start_tokens))
    between_old = facts.start_factors if old.start_tokens == high else old.rescale_factors
    between_new = facts.start_factors if new.start_tokens == high else new.rescale_factors
    runs = [(low, high, between_old, between_new), (high, n_tokens, old.rescale_factors, new.rescale_factors)]
    scale = new.attention_factor / old.attention_factor
    rotations = []
    for start, stop, before, after in runs:
        stop = min(stop, n_tokens)
        if start < stop and tuple(before) != tuple(after):
            rotations.append(Rotation(start, stop, tuple(before), tuple(after), scale))
            scale = 1.0
    if scale != 1.0 and n_tokens:
        rotations.append(Rotation(0, 0, facts.start_factors, facts.start_factors, scale))
    return rotations


def near_window(facts: RopeFacts, band: Band, halves: bool) -> NearWindow | None:
    """Return how the near window of `band` is computed; None where it has none."""
    if not band.near_tokens:
        return None
    own, far = facts.start_factors, band.rescale_factors
    return NearWindow(band.near_tokens, band.start_tokens, own, far, facts.freq_base, halves)


class RopeHook:
    """Sets what the rope nodes of one context read; keep it alive as long as the context."""

    def __init__(self, facts: RopeFacts, freq_scale: float = 1.0) -> None:
        self.facts = facts
        self.setting = RopeSetting(freq_base=facts.freq_base, native_scale=freq_scale, n_dims=facts.n_rot)
        """What nodes of tokens are set to, here or by the kernels, which read it in place."""
        self.set_window: Callable[[NearWindow | None], None] | None = None
        """Called with a band's near window, once it is known that attention can be computed with one."""
        self.halves = False
        """Whether a pair is a value of each half of the rotary ones, for the window."""
        self._tensors: dict[tuple[tuple[float, ...], float], tuple[ggml.Arena, int]] = {}
        self.use(facts.start_factors, facts.native_attention_factor)

    def use(self, factors: tuple[float, ...], attention_factor: float) -> None:
        """Rotate by `factors` (shape ``(n_rot/2,)``), scaled by `attention_factor`, from the next graph on."""
        self.setting.factors, self.setting.attention_factor = self._tensor(factors, attention_factor), attention_factor

    def use_band(self, band: Band) -> None:
        """Rotate by the factors of `band` from the next graph on, with its near window.

        A band with one is only for models whose attention can be computed with it (`set_window` is set).
        """
        self.use(band.rescale_factors, band.attention_factor)
        if self.set_window is not None:
            self.set_window(near_window(self.facts, band, self.halves))

    @property
    def touched(self) -> int:
        """Rope nodes set since this was last reset to 0."""
        return int(self.setting.touched)

    @touched.setter
    def touched(self, n: int) -> None:
        self.setting.touched = n

    def _tensor(self, factors: tuple[float, ...], attention_factor: float) -> int:
        # The attention factor is part of the key, so that a node that reads the tensor in use is known to be fully set.
        key = (factors, attention_factor)
        if key not in self._tensors:
            arena = ggml.Arena(ggml.floats_size(len(factors)))
            self._tensors[key] = (arena, arena.floats([min(factor, STILL) for factor in factors], OURS))
        return self._tensors[key][1]

    def applies(self, node: int) -> bool:
        """Whether a node is a global layer's: sliding-window layers with another base or scaling keep theirs."""
        params = ggml.rope_params(node)
        if params.freq_base != self.setting.freq_base or params.n_dims != self.setting.n_dims:
            return False
        factors = ggml.POINTERS[(node >> 3) + ggml.SRC2_INDEX]
        return params.freq_scale == self.setting.native_scale or bool(factors and ggml.tensor_at(factors).name == OURS)

    def set_rope(self, node: int) -> None:
        """Give a ROPE node of a graph that reads tokens the factors in use, as `set_rope` in kernels/hook.c does."""
        setting = self.setting
        if ggml.POINTERS[(node >> 3) + ggml.SRC2_INDEX] == setting.factors:
            return  # a reused graph still has what was set
        params = ggml.rope_params(node)
        if self.applies(node):
            ggml.POINTERS[(node >> 3) + ggml.SRC2_INDEX] = setting.factors
            params.freq_scale, params.ext_factor, params.attn_factor = 1.0, 0.0, setting.attention_factor
            self.touched += 1

    def set_rotation(self, node: int, rotation: Rotation) -> None:
        """Make a ROPE node of a K-shift graph carry out `rotation`."""
        params = ggml.rope_params(node)
        applies = self.applies(node)
        scale = rotation.scale if applies else 1.0
        factors = self._tensor(rotation.factors if applies else (STILL,) * (params.n_dims // 2), scale)
        ggml.POINTERS[(node >> 3) + ggml.SRC2_INDEX] = factors
        params.freq_scale, params.ext_factor, params.attn_factor = 1.0, 0.0, scale
        self.touched += applies
        # Cell i holds position i: one sequence, no gaps, and a full-size cache for sliding-window layers, too.
        row = ggml.int32_row(ggml.tensor_at(ggml.tensor_at(node).src[1]))
        row[:] = 0
        row[rotation.start : rotation.stop] = np.arange(rotation.start, rotation.stop, dtype=np.int32)
