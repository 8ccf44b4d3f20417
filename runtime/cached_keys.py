"""The cached keys of one context: where they lie, whether their attention can have near windows, and their rotation.

Which tokens they are of, and in which band, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import llama_cpp

from .graph.fast import FastNodes
from .graph.hook import GraphHook
from .graph.kernels import Context as Kernels
from .graph.kernels import KeyRotation
from .graph.key_caches import KeyCaches, KeySurvey
from .graph.rope import RopeHook, Rotation
from .interrupt import Interruptible


class CachedKeys:
    """The keys in the cache of `context`, one of llama_cpp's; `batch` is its own, too.

    Args:
        calls: runs what computes, so that it can be interrupted.
        fast: what computes attention here, if anything does.
        kernels: None where there are none.
        can_shift: whether llama.cpp's K-shift can rotate these keys; see `keys_can_shift`.
    """

    def __init__(
        self,
        context: Any,
        batch: Any,
        calls: Interruptible,
        graph: GraphHook,
        rope: RopeHook,
        fast: FastNodes | None,
        kernels: Kernels | None,
        *,
        n_threads: int,
        can_shift: bool,
    ) -> None:
        self._context, self._batch, self._calls = context, batch, calls
        self._graph, self._rope, self._fast, self._kernels = graph, rope, fast, kernels
        self._n_threads, self._can_shift = n_threads, can_shift
        self.caches: KeyCaches | None = None
        """Where the keys lie that the kernels can rotate; None where these are not made as expected."""
        self.serves_windows = False
        """Whether attention to these keys can have near windows, as far as is known."""
        self.use_kernels = True
        """Whether the kernels are to rotate; False leaves it to llama.cpp's K-shift."""

    @property
    def rotates_natively(self) -> bool:
        """Whether the kernels rotate the keys."""
        return self.caches is not None and self.use_kernels

    def can_rotate(self) -> bool:
        """Whether the kernels or llama.cpp's K-shift can rotate this cache, and its cell i holds position i."""
        cache = llama_cpp.llama_get_memory(self._context.ctx)
        in_order = llama_cpp.llama_memory_seq_pos_min(cache, 0) == 0  # else cells left behind by a window were reused
        one_axis = llama_cpp.llama_memory_can_shift(cache)  # and sliding windows have as many cells as other layers
        return bool(in_order and one_axis and (self.rotates_natively or self._can_shift))

    def survey(self, n_tokens: int) -> None:
        """Look at the graph of a token behind `n_tokens` cached ones, to learn what the attributes say."""
        kernels, fast = self._kernels, self._fast
        can_rotate = (lambda _: True) if kernels is None else partial(kernels.can_rotate, n_rot=self._rope.facts.n_rot)
        survey = KeySurvey(self._rope.applies, can_rotate, (lambda _: None) if fast is None else fast.windowed)

        def decode_nothing() -> int:
            if kernels is not None:
                kernels.stop(True)  # the graph is shown as a whole, and stopped after its first node
            return int(llama_cpp.llama_decode(self._context.ctx, self._batch.batch))

        self._batch.set_batch(batch=[0], n_past=n_tokens, logits_all=False)
        with self._graph.surveying(survey.handlers):
            self._calls.run_long(decode_nothing, self._context.ctx)
        self._graph.raise_kept()
        self._cut(n_tokens)
        found = survey.caches()
        self.caches = found if kernels is not None else None
        if survey.serves_windows and found is not None and fast is not None:
            self._rope.set_window, self._rope.halves = fast.use_window, found.halves
            self.serves_windows = True

    def rotate(self, rotations: Sequence[Rotation], n_tokens: int) -> bool:
        """Carry out all rotations of the first `n_tokens` keys; False if they did not reach them."""
        if self.rotates_natively:
            self._rotate_natively(rotations, n_tokens)
            return True
        return all(self._rotate_by_shift(rotation, n_tokens) for rotation in rotations)

    def _rotate_natively(self, rotations: Sequence[Rotation], n_cells: int) -> None:
        """Carry out all rotations in one pass."""
        assert self._kernels is not None and self.caches is not None
        facts = self._rope.facts
        rotate = partial(
            self._kernels.rotate,
            self.caches.layers,
            [KeyRotation(one.start, one.stop, one.before, one.after) for one in rotations],
            n_cells=n_cells,
            n_rot=facts.n_rot,
            freq_base=facts.freq_base,
            scale=math.prod(one.scale for one in rotations),
            halves=self.caches.halves,
            n_threads=self._n_threads,
        )
        self._calls.run(rotate)

    def _rotate_by_shift(self, rotation: Rotation, n_tokens: int) -> bool:
        """Run llama.cpp's K-shift graph for one rotation; False if it did not reach the keys.

        Halving position 0 leaves it unchanged and still marks the cache as shifted, so that the graph runs at the start
        of the next decode. (Adding to positions would also move the search for free cells to the first one, where a
        sliding window's old cells would be reused.)
        """
        cache = llama_cpp.llama_get_memory(self._context.ctx)
        llama_cpp.llama_memory_seq_div(cache, 0, 0, 1, 2)
        self._rope.touched = 0
        code = self.run_stopped(n_tokens, rotation)
        if code not in (0, 1):  # 1: no cell is free for the token, which does not matter here
            raise RuntimeError(f"the cached keys could not be rotated to another band (llama_decode: {code})")
        return self._rope.touched > 0

    def run_stopped(self, n_tokens: int, rotation: Rotation | None = None) -> int:
        """Start to decode a token behind `n_tokens`, stop before it is computed, and remove it.

        Returns llama_decode's return code. A K-shift that is due is run, and carries out `rotation`.
        """
        self._batch.set_batch(batch=[0], n_past=n_tokens, logits_all=False)
        handlers = {} if rotation is None else {"ROPE": partial(self._rope.set_rotation, rotation=rotation)}
        with self._graph.stopping_tokens(handlers):
            code: int = self._calls.run(lambda: llama_cpp.llama_decode(self._context.ctx, self._batch.batch))
        self._graph.raise_kept()
        self._cut(n_tokens)
        return code

    def _cut(self, n_tokens: int) -> None:
        self._context.kv_cache_seq_rm(-1, n_tokens, -1)
