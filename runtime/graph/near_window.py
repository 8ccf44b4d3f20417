"""A band's near window in torch: positions of rows and cells, and both rotations of queries and keys.

What the kernels do in window.c and near.h, for where there are none; see window.c for the angles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import ggml
from .kernels import NearWindow
from .key_caches import HALVES, NEIGHBOURS
from .rope_trace import RopeTrace, hadamard

Positions = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Windowed:
    """An attention node to which the near window applies."""

    window: NearWindow
    row_positions: torch.Tensor
    """Shape ``(streams, rows)``."""
    cell_positions: torch.Tensor
    """Of the first stream's first cell and all that follow it, shape ``(cells,)``."""
    stream_cells: int
    """Cells from one stream's first to the next's."""
    hadamard: int

    def near(self, stream: int, rows: slice, cells: slice) -> torch.Tensor:
        """Return whether each cell is near to each row, shape ``(rows, cells)``."""
        return self.row_positions[stream, rows, None] - self._cells(stream, cells) < self.window.tokens

    def _cells(self, stream: int, cells: slice) -> torch.Tensor:
        first = stream * self.stream_cells
        return self.cell_positions[first + cells.start : first + cells.stop]

    def near_keys(self, keys: torch.Tensor, stream: int, cells: slice) -> torch.Tensor:
        """Return cached keys, shape ``(heads, cells, size)``, as near rows see them."""
        return self._turned(self._transformed(keys), self._angles(self._cells(stream, cells)))

    def queries(self, q: torch.Tensor, stream: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries, shape ``(heads, rows, size)``, as they see near keys and as they see far ones."""
        w = self.window
        q = self._transformed(q)
        near = self._turned(q, self._angles(self.row_positions[stream, rows]))
        border = torch.tensor(w.tokens * self._theta * (1 / np.asarray(w.own) - 1 / np.asarray(w.far)))[None]
        return near, self._transformed(self._turned(q, border))

    @property
    def _theta(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        half = len(self.window.own)
        return float(self.window.freq_base) ** (-np.arange(half) / half)

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the angles from the far rotation to the model's own, as differences of ggml's, in floats."""
        w, half = self.window, len(self.window.own)
        theta = np.empty((len(positions), half), dtype=np.float32)
        theta[:, 0] = positions.numpy()
        scale = np.float32(np.float32(w.freq_base) ** np.float32(-1 / half))
        for i in range(1, half):
            theta[:, i] = theta[:, i - 1] * scale
        own, far = (theta / np.asarray(factors, dtype=np.float32) for factors in (w.own, w.far))
        angles = torch.from_numpy(own.astype(np.float64) - far)
        return torch.where(positions[:, None] < w.start_tokens, 0.0, angles)

    def _turned(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        half = angles.shape[-1]
        cos, sin = angles.cos().float(), angles.sin().float()
        pairs = slice(0, half), slice(half, 2 * half)
        if not self.window.halves:
            pairs = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        a, b = x[..., pairs[0]], x[..., pairs[1]]
        out = x.clone()
        out[..., pairs[0]], out[..., pairs[1]] = a * cos - b * sin, b * cos + a * sin
        return out

    def _transformed(self, x: torch.Tensor) -> torch.Tensor:
        if not self.hadamard:
            return x
        matrix = torch.from_numpy(hadamard(self.hadamard)).float()
        return (x.reshape(*x.shape[:-1], -1, self.hadamard) @ matrix).reshape(x.shape)


class NearWindows:
    """Where the tokens of one context's graphs are, and which attention nodes its near window applies to."""

    def __init__(self, applies: Callable[[int], bool]) -> None:
        self.window: NearWindow | None = None
        """That of the band in use."""
        self._applies, self._trace = applies, RopeTrace()
        self._rows: Positions = np.empty(0, dtype=np.int32)
        self._places: dict[int, Positions] = {}
        self._first: set[int] = set()

    def see_rope(self, node: int) -> None:
        """Note the positions of a graph's tokens.

        A copy, as ggml reuses the memory behind the last rotation, before that layer's attention is computed.
        """
        positions = ggml.int32_row(ggml.tensor_at(ggml.tensor_at(node).src[1]))
        cache = self._trace.cache_behind(ggml.tensor_at(node).src[0])
        if cache in self._first:  # llama.cpp shifts cached keys: of all layers, of which one is enough
            self._places_of(ggml.tensor_at(cache))[:] += positions
        else:
            self._rows = positions.copy()

    def see_write(self, node: int) -> None:
        """Note the positions of the cells that a SET_ROWS node writes."""
        tensor = ggml.tensor_at(node)
        if not (tensor.view_src and tensor.src[1]):
            return
        cache, index = ggml.tensor_at(tensor.view_src), ggml.tensor_at(tensor.src[1])
        if index.type == ggml.I64 and index.ne[0] == len(self._rows) and index.data:
            if ggml.n_values(cache) // cache.ne[0] not in self._places:
                self._first.add(tensor.view_src)
            self._places_of(cache)[ggml.int64_row(index)] = self._rows

    def _places_of(self, cache: ggml.TensorStruct) -> Positions:
        n_cells = ggml.n_values(cache) // cache.ne[0]
        if n_cells not in self._places:
            self._places[n_cells] = np.arange(n_cells, dtype=np.int32)
        return self._places[n_cells]

    def reset_positions(self) -> None:
        """Take each cached cell to be at the position of its number, as after a sequence was restored."""
        for places in self._places.values():
            places[:] = np.arange(len(places))

    def needed(self, node: int) -> bool:
        """Whether the window applies to an attention node."""
        return self.window is not None and self._trace.rope_before(ggml.tensor_at(node).src[0], self._applies)

    def windowed(self, node: int) -> int | None:
        """Return the ROPE node behind an attention node's queries if a near window can be computed there, or None."""
        tensor = ggml.tensor_at(node)
        rope, _ = self._trace.rope_behind(tensor.src[0])
        if rope is None:
            return None
        q, k, params = ggml.tensor_at(tensor.src[0]), _cells_behind(tensor.src[1]), ggml.rope_params(rope)
        positions = ggml.tensor_at(ggml.tensor_at(rope).src[1])
        known = params.mode in (NEIGHBOURS, HALVES) and params.n_dims <= k.ne[0]
        one_axis = positions.type == ggml.I32 and positions.ne[0] == q.ne[1] * q.ne[3]
        cached = bool(k.view_src) and ggml.tensor_at(k.view_src).nb[1] == k.nb[1]
        return rope if known and one_axis and cached else None

    def of(self, node: int) -> Windowed | None:
        """Return what the window means for an attention node; None where it does not apply."""
        if self.window is None or not self.needed(node):
            return None
        tensor = ggml.tensor_at(node)
        q, k = ggml.tensor_at(tensor.src[0]), _cells_behind(tensor.src[1])
        _, size = self._trace.rope_behind(tensor.src[0])
        cache = ggml.tensor_at(k.view_src)
        cells = self._places_of(cache)[(k.data - cache.data) // cache.nb[1] :]
        return Windowed(
            self.window,
            torch.from_numpy(self._rows.reshape(q.ne[3], q.ne[1])),
            torch.from_numpy(cells),
            k.nb[3] // k.nb[1],
            size,
        )


def _cells_behind(keys: int) -> ggml.TensorStruct:
    """Return the view of a cache that an attention node's keys come from: llama.cpp casts an f32 cache to f16."""
    tensor = ggml.tensor_at(keys)
    return ggml.tensor_at(tensor.src[0]) if ggml.op_name(tensor.op) == "CPY" and tensor.src[0] else tensor
