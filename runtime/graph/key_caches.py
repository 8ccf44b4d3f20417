"""Which layers' keys lie where in the cache, and how they are attended to: read from the graph of one token.

A SET_ROWS node writes a token's keys to a layer's cache. Followed back, through changes of shape and at most one
Hadamard transform (which llama.cpp puts behind the rotation of keys that it will quantise), it leads to the ROPE node
that has rotated them, if keys are made as they are in most architectures. If anything else is found, no cache is named,
and these keys are rotated by llama.cpp itself, or read again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from . import ggml
from .hook import Handler
from .kernels import KeyCache
from .rope_trace import RopeTrace

NEIGHBOURS, HALVES = 0, 2
"""Modes of ROPE (GGML_ROPE_TYPE_NORMAL and _NEOX): a pair is two neighbours, or a value of each half."""


@dataclass(frozen=True)
class KeyCaches:
    """The caches whose keys are rotated when a sequence moves to another band."""

    layers: tuple[KeyCache, ...]
    n_cells: int
    halves: bool
    """Whether a pair is a value of each half of the rotary ones, not two neighbours."""


@dataclass(frozen=True)
class _Layer:
    keys: KeyCache
    n_cells: int
    mode: int
    """Of its ROPE nodes."""


@dataclass
class KeySurvey:
    """Looks at the nodes of one token's graph, of which `applies` tells the ROPE nodes that rotate by λ."""

    applies: Callable[[int], bool]
    can_rotate: Callable[[KeyCache], bool]
    windowed: Callable[[int], int | None]
    """Returns the ROPE node behind an attention node's queries, if a near window can be computed there; else None."""
    _n_ropes: int = 0
    _n_windowed: int = 0
    _found: list[_Layer] = field(default_factory=list)
    _trace: RopeTrace = field(default_factory=RopeTrace)

    @property
    def handlers(self) -> dict[str, Handler]:
        """What is to be called with nodes that are not yet computed."""
        return {"ROPE": self._see_rope, "SET_ROWS": self._see_write, "FLASH_ATTN_EXT": self._see_attention}

    @property
    def serves_windows(self) -> bool:
        """Whether all attention to keys that are rotated by λ can be computed with a near window."""
        return self._n_windowed > 0 and self._n_ropes == 2 * self._n_windowed and self.caches() is not None

    def caches(self) -> KeyCaches | None:
        """Return what was found in a whole graph; None if keys are not made as expected.

        Each layer has two ROPE nodes, for its queries and for its keys: a count that does not fit tells that some keys
        were not found.
        """
        layers = tuple(layer.keys for layer in self._found)
        modes, lengths = {layer.mode for layer in self._found}, {layer.n_cells for layer in self._found}
        if self._n_ropes != 2 * len(layers) or len({keys.data for keys in layers}) != len(layers):
            return None
        if len(lengths) != 1 or modes not in ({NEIGHBOURS}, {HALVES}) or not all(map(self.can_rotate, layers)):
            return None
        return KeyCaches(layers, lengths.pop(), modes == {HALVES})

    def _see_rope(self, node: int) -> None:
        self._n_ropes += self.applies(node)

    def _see_attention(self, node: int) -> None:
        rope = self.windowed(node)
        self._n_windowed += rope is not None and self.applies(rope)

    def _see_write(self, node: int) -> None:
        rope, hadamard = self._trace.rope_behind(ggml.tensor_at(node).src[0])
        cache = ggml.tensor_at(node).view_src
        if rope is None or cache is None or not self.applies(rope):
            return  # values, or keys of a layer that keeps its own rotation
        keys, stored = ggml.tensor_at(rope), ggml.tensor_at(cache)
        size, n_heads = keys.ne[0], keys.ne[1]
        if stored.ne[0] == size * n_heads and stored.ne[2] * stored.ne[3] == 1:
            where = KeyCache(stored.data, stored.nb[1], n_heads, size, stored.type, hadamard)
            self._found.append(_Layer(where, stored.ne[1], ggml.rope_params(rope).mode))
