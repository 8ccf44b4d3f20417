"""How the threads compute an attention node, for many query rows and for few.

Many rows (`PromptJob`): all threads dequantise the cells, then share blocks of rows; cells that the mask hides from a
whole block are skipped, and those that it shows to all its rows need no mask. Few rows (`TokenJob`): the threads share
the cells. Either way torch's fused attention computes in f32, and its results for different cells are combined by the
log-sum-exp of their scores (Dao et al., "FlashAttention", arXiv 2205.14135, section 3.1). So are those of near and of
far distances, where the band has a near window.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import ggml
from .near_window import Windowed
from .takeover import TIMEOUT_S

SCRATCH_BYTES = 24 << 20
"""Bytes of dequantised cells, K and V together; a longer cache takes several rounds."""

WINDOW_CELLS = 512
"""Cells at a time where the band has a near window."""

_HIDDEN = -1024  # the bits of f16's minus infinity, as an int16
_GRAIN = 64  # cells; the borders of spans are rounded to it

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Span:
    """Cells [start, stop) as a block of query rows sees them: all of them, or where `masked`, as the mask says."""

    start: int
    stop: int
    masked: bool


def visible_spans(mask: torch.Tensor) -> tuple[Span, ...]:
    """Return the spans of cells that some row of a block sees, in order.

    `mask` is f16 of shape ``(rows, cells)``, 0 and minus infinity. Borders are rounded outwards to `_GRAIN` cells; for
    a single row they are exact. Other finite numbers in the mask make a span masked, so that they are added to the
    scores.
    """
    bits = mask.view(torch.int16)
    low, high = bits.amin(0), bits.amax(0)
    hidden = (low == _HIDDEN) & (high == _HIDDEN)
    plain = (low == 0) & (high == 0)
    if len(mask) == 1:
        exact = _exact_span(hidden, plain)
        if exact is not None:
            return exact
    n = len(hidden)
    whole = n // _GRAIN * _GRAIN

    def by_grain(flags: torch.Tensor) -> list[bool]:
        grains: list[bool] = flags[:whole].view(-1, _GRAIN).all(1).tolist()
        return grains + ([bool(flags[whole:].all())] if whole < n else [])

    spans: list[Span] = []
    for i, (is_hidden, is_plain) in enumerate(zip(by_grain(hidden), by_grain(plain), strict=True)):
        start, stop = i * _GRAIN, min(n, (i + 1) * _GRAIN)
        if is_hidden:
            continue
        if spans and spans[-1].stop == start and spans[-1].masked != is_plain:
            start = spans.pop().start
        spans.append(Span(start, stop, not is_plain))
    return tuple(spans)


def _exact_span(hidden: torch.Tensor, plain: torch.Tensor) -> tuple[Span, ...] | None:
    """Return the one run of cells that a single row sees; None if it is not one run."""
    seen = (~hidden).nonzero()[:, 0]
    if not len(seen):
        return ()
    start, stop = int(seen[0]), int(seen[-1]) + 1
    return (Span(start, stop, False),) if bool(plain[start:stop].all()) else None


class Node:
    """One attention node's tensors, as torch tensors over the same memory."""

    def __init__(self, address: int, windowed: Windowed | None = None) -> None:
        tensor = ggml.tensor_at(address)
        self.windowed = windowed
        """How its near window is computed, if it has one."""
        q, k, v, self.mask_address, sinks = tensor.src[:5]
        self.scale = ggml.custom_params(address).attention.scale
        self.q = _floats(q)
        """Shape ``(streams, heads, rows, head size)``."""
        self.out = _floats(address)
        """Shape ``(streams, rows, heads, head size)``."""
        self.k, self.v = ggml.tensor_at(k), ggml.tensor_at(v)
        self._plain = {id(x): _plain(x) for x in (self.k, self.v)}
        self.sinks = None if sinks is None else _floats(sinks).reshape(-1)
        mask = None if self.mask_address is None else ggml.values(ggml.tensor_at(self.mask_address))
        self._mask = None if mask is None else torch.from_numpy(mask)
        self.streams, self.heads, self.n_rows, _ = self.q.shape
        self.n_cells, self.kv_heads = int(self.k.ne[1]), int(self.k.ne[2])
        self.k_size, self.v_size = int(self.k.ne[0]), int(self.v.ne[0])
        self.group = self.heads // self.kv_heads
        self.cell_floats = self.kv_heads * (self.k_size + self.v_size)

    def mask(self, stream: int) -> torch.Tensor | None:
        """Return a stream's mask, shape ``(at least rows, cells)``, f16."""
        return None if self._mask is None else self._mask[stream % len(self._mask), 0]

    def spans(self, stream: int, start: int, stop: int, known: dict[Any, tuple[Span, ...]]) -> tuple[Span, ...]:
        """Return the spans that query rows [start, stop) see; `known` keeps them for all layers that share a mask."""
        mask = self.mask(stream)
        if mask is None:
            return (Span(0, self.n_cells, False),)
        key = (self.mask_address, stream, start, stop, self.n_cells)
        if key not in known:
            known[key] = visible_spans(mask[start:stop])
        return known[key]

    def cells(self, buffer: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of `buffer` for `n` cells of K and of V, each of shape ``(cells, kv heads, head size)``."""
        n_k, n_v = n * self.kv_heads * self.k_size, n * self.kv_heads * self.v_size
        k, v = buffer[:n_k], buffer[n_k : n_k + n_v]
        return k.view(n, self.kv_heads, self.k_size), v.view(n, self.kv_heads, self.v_size)

    def fill(self, k: torch.Tensor, v: torch.Tensor, stream: int, start: int, stop: int) -> None:
        """Dequantise cells [start, stop) to `k` and `v`."""
        for tensor, out in ((self.k, k), (self.v, v)):
            plain = self._plain[id(tensor)]
            if plain is not None:
                out.copy_(plain[stream, :, start:stop].transpose(0, 1))
            else:
                ggml.dequantise(tensor, start, stop, out.data_ptr(), stream)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of `q` ``(heads, rows, size)`` over `k` and `v` ``(heads, cells, size)``, and its log-sum-exp."""
        size = max(self.k_size, self.v_size)
        out, log_sum = _attend(
            *(_widen(x, size)[None] for x in (q, k, v)), 0.0, False, attn_mask=mask, scale=self.scale
        )
        return out[0, ..., : self.v_size], log_sum[0]

    def attend_by_distance(
        self, where: Cells, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> PartialAttention | None:
        """Attention with the near window of `q` ``(heads, rows, size)`` over `k` and `v` ``(kv heads, cells, size)``.

        None where the mask ``(rows, cells)`` hides all cells from all rows.
        """
        assert self.windowed is not None
        cells = slice(where.start, where.stop)
        near = self.windowed.near(where.stream, where.rows, cells)
        both = self.windowed.queries(q, where.stream, where.rows)
        found = None
        for query, side in zip(both, (near, ~near), strict=True):
            shown = side if mask is None else side & (mask > -torch.inf)
            if not shown.any():
                continue
            keys = self.windowed.near_keys(k, where.stream, cells) if side is near else k
            chosen = None if shown.all() and mask is None else _shown(side, mask)
            out, log_sum = self.attend(query, *_for_each_query(query, keys, v), chosen)
            found = PartialAttention.of(out, log_sum, chosen).joined(found)
        return found

    def write(self, stream: int, heads: slice, rows: slice, part: PartialAttention | None) -> None:
        """Write a finished part, shape ``(heads, rows, size)``, to the node's output."""
        target = self.out[stream, rows, heads].transpose(0, 1)
        if part is None:
            target.zero_()  # no row sees anything: llama.cpp returns zeros, too
            return
        out = part.out
        if self.sinks is not None:  # a sink counts in the sum of the weights and adds no value
            out = out * torch.sigmoid(part.log_sum - self.sinks[heads, None])[..., None]
        target.copy_(out)


@dataclass(frozen=True)
class Cells:
    """Cells [start, stop) of a stream, as some of its query rows see them."""

    stream: int
    rows: slice
    start: int
    stop: int


def _shown(side: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return a mask that shows one side's cells alone."""
    shown = torch.zeros(side.shape) if mask is None else mask
    return shown.masked_fill(~side, -torch.inf)


def _for_each_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `k` and `v` ``(kv heads, cells, size)`` for each of the heads of `q`."""
    group = len(q) // len(k)
    return k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)


@dataclass
class PartialAttention:
    """Attention over some of the cells, shape ``(heads, rows, size)``, and the log of the sum of its weights."""

    out: torch.Tensor
    log_sum: torch.Tensor

    @classmethod
    def of(cls, out: torch.Tensor, log_sum: torch.Tensor, mask: torch.Tensor | None) -> PartialAttention:
        """Mark rows that `mask` ``(rows, cells)`` hides all cells from, as torch's sum for them is meaningless."""
        blind = None if mask is None else mask.amax(1) == -torch.inf
        if blind is not None and blind.any():
            out, log_sum = out.masked_fill(blind[:, None], 0.0), log_sum.masked_fill(blind, -torch.inf)
        return cls(out, log_sum)

    def joined(self, other: PartialAttention | None) -> PartialAttention:
        """Return the attention over the cells of both."""
        if other is None:
            return self
        total = torch.logaddexp(self.log_sum, other.log_sum)
        ours, others = (torch.exp(x - total).nan_to_num_(0.0)[..., None] for x in (self.log_sum, other.log_sum))
        return PartialAttention(self.out * ours + other.out * others, total)


@dataclass
class _Block:
    """Rows [start, stop) of one stream and KV head: the unit of work, with its result so far."""

    stream: int
    head: int
    start: int
    stop: int
    spans: tuple[Span, ...]
    part: PartialAttention | None = None


@dataclass
class _Round:
    """Cells [start, stop) of one stream: dequantised by all threads, then attended to by all threads."""

    stream: int
    start: int
    stop: int
    pieces: list[tuple[int, int]]
    blocks: list[_Block]
    next_piece: Iterator[int] = field(default_factory=itertools.count)
    next_block: Iterator[int] = field(default_factory=itertools.count)


class Scratch:
    """A buffer for the dequantised cells of one round, used by one node after the other."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def reserve(self, floats: int) -> None:
        if self.buffer.numel() < floats:
            self.buffer = torch.empty(floats)


class PromptJob:
    """A node of many rows; threads claim their share by counting up."""

    def __init__(self, node: Node, n_threads: int, known: dict[Any, tuple[Span, ...]], scratch: Scratch) -> None:
        self.node, self.n_threads, self.scratch = node, n_threads, scratch
        self.barrier = threading.Barrier(n_threads)
        self.rounds = [one for stream in range(node.streams) for one in self._plan(stream, known)]
        scratch.reserve(max((one.stop - one.start for one in self.rounds), default=0) * node.cell_floats)

    def _plan(self, stream: int, known: dict[Any, tuple[Span, ...]]) -> list[_Round]:
        node = self.node
        step = _block_rows(node.n_rows, node.streams * node.kv_heads, self.n_threads)
        blocks = []
        for start in range(0, node.n_rows, step):
            stop = min(start + step, node.n_rows)
            spans = node.spans(stream, start, stop, known)
            blocks += [_Block(stream, head, start, stop, spans) for head in range(node.kv_heads)]
        # The longest blocks first, so that the threads finish together.
        blocks.sort(key=lambda b: -sum(span.stop - span.start for span in b.spans))
        first = min((b.spans[0].start for b in blocks if b.spans), default=0)
        last = max((b.spans[-1].stop for b in blocks if b.spans), default=0)
        max_cells = max(_GRAIN, SCRATCH_BYTES // (4 * node.cell_floats) // _GRAIN * _GRAIN)
        ranges = _ranges(first, last, -(-(last - first) // max_cells), _GRAIN) or [(first, first)]
        return [_Round(stream, *r, _ranges(*r, 2 * self.n_threads), blocks) for r in ranges]

    def give_up(self) -> None:
        self.barrier.abort()

    def work(self, thread: int) -> None:
        """Compute one thread's share."""
        for i, current in enumerate(self.rounds):
            if i:
                self.barrier.wait(TIMEOUT_S)  # until no thread reads the previous round's cells any more
            k, v = self.node.cells(self.scratch.buffer, current.stop - current.start)
            while (at := next(current.next_piece)) < len(current.pieces):
                start, stop = current.pieces[at]
                into = slice(start - current.start, stop - current.start)
                self.node.fill(k[into], v[into], current.stream, start, stop)
            self.barrier.wait(TIMEOUT_S)
            last = i + 1 == len(self.rounds) or self.rounds[i + 1].stream != current.stream
            while (at := next(current.next_block)) < len(current.blocks):
                self._attend(current.blocks[at], current, k, v)
                if last:
                    block = current.blocks[at]
                    self.node.write(block.stream, self._heads(block), slice(block.start, block.stop), block.part)

    def _heads(self, block: _Block) -> slice:
        return slice(block.head * self.node.group, (block.head + 1) * self.node.group)

    def _attend(self, block: _Block, current: _Round, k: torch.Tensor, v: torch.Tensor) -> None:
        group, rows = self.node.group, block.stop - block.start
        q = self.node.q[block.stream, self._heads(block), block.start : block.stop].contiguous()
        for span in block.spans:
            start, stop = max(span.start, current.start), min(span.stop, current.stop)
            if start >= stop:
                continue
            keys, vals = (x[start - current.start : stop - current.start, block.head][None] for x in (k, v))
            all_rows = self.node.mask(block.stream) if span.masked else None
            if self.node.windowed is not None:
                self._attend_by_distance(block, q, keys, vals, start, stop, all_rows)
                continue
            if all_rows is None:  # the group's heads are rows of one product
                mask = None
                out, log_sum = self.node.attend(q.view(1, group * rows, -1), keys, vals, None)
            else:
                mask = all_rows[block.start : block.stop, start:stop].float()
                out, log_sum = self.node.attend(q, keys.expand(group, -1, -1), vals.expand(group, -1, -1), mask)
            part = PartialAttention.of(out.reshape(group, rows, -1), log_sum.reshape(group, rows), mask)
            block.part = part.joined(block.part)

    def _attend_by_distance(
        self,
        block: _Block,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        first: int,
        last: int,
        all_rows: torch.Tensor | None,
    ) -> None:
        rows = slice(block.start, block.stop)
        for start in range(first, last, WINDOW_CELLS):  # so that most cells are all near, or all far
            stop = min(last, start + WINDOW_CELLS)
            mask = None if all_rows is None else all_rows[rows, start:stop].float()
            some = slice(start - first, stop - first)
            where = Cells(block.stream, rows, start, stop)
            part = self.node.attend_by_distance(where, q, k[:, some], v[:, some], mask)
            block.part = block.part if part is None else part.joined(block.part)


@dataclass(frozen=True)
class _Piece:
    """Cells [start, stop) of one stream, for all heads and rows."""

    stream: int
    start: int
    stop: int
    mask: torch.Tensor | None


class TokenJob:
    """A node of few rows: each thread attends to the cells that it claims, for all heads; the last joins the parts.

    Threads that take many small steps in Python block each other, so what can be is prepared here, by one thread.
    """

    def __init__(self, node: Node, n_threads: int, known: dict[Any, tuple[Span, ...]], scratch: Scratch) -> None:
        self.node = node
        self.pieces = [piece for stream in range(node.streams) for piece in self._plan(stream, n_threads, known)]
        rows = node.group * node.n_rows
        self.q = [node.q[stream].reshape(node.kv_heads, rows, -1) for stream in range(node.streams)]
        self.longest = max((piece.stop - piece.start for piece in self.pieces), default=0)
        scratch.reserve(n_threads * self.longest * node.cell_floats)
        buffers = scratch.buffer[: n_threads * self.longest * node.cell_floats].view(n_threads, -1)
        self.buffers = [node.cells(buffers[i], self.longest) for i in range(n_threads)]
        self.claims = itertools.count()
        self.parts: list[tuple[int, PartialAttention]] = []
        self.given_up = False
        self.left = len(self.pieces)
        self.lock = threading.Lock()
        if not self.pieces:
            self._finish()

    def _plan(self, stream: int, n_threads: int, known: dict[Any, tuple[Span, ...]]) -> list[_Piece]:
        node = self.node
        spans = node.spans(stream, 0, node.n_rows, known)
        if not spans:
            return []
        first, last = spans[0].start, spans[-1].stop
        max_cells = max(_GRAIN, SCRATCH_BYTES // (4 * node.cell_floats * n_threads))
        masked = len(spans) > 1 or spans[0].masked
        all_rows = node.mask(stream) if masked else None
        pieces = []
        for start, stop in _ranges(first, last, max(n_threads, -(-(last - first) // max_cells))):
            mask = None if all_rows is None else all_rows[: node.n_rows, start:stop].float().repeat(node.group, 1)
            pieces.append(_Piece(stream, start, stop, mask))
        return pieces

    def give_up(self) -> None:
        self.given_up = True

    def work(self, thread: int) -> None:
        """Compute one thread's share."""
        while (at := next(self.claims)) < len(self.pieces) and not self.given_up:
            piece = self.pieces[at]
            k, v = self.buffers[thread]
            if (n := piece.stop - piece.start) < self.longest:
                k, v = k[:n], v[:n]
            self.node.fill(k, v, piece.stream, piece.start, piece.stop)
            part = self._attend(piece, k.transpose(0, 1), v.transpose(0, 1))
            with self.lock:
                if part is not None:
                    self.parts.append((piece.stream, part))
                self.left -= 1
                last = self.left == 0
            if last:
                self._finish()

    def _attend(self, piece: _Piece, k: torch.Tensor, v: torch.Tensor) -> PartialAttention | None:
        node = self.node
        if node.windowed is None:
            out, log_sum = node.attend(self.q[piece.stream], k, v, piece.mask)
            return PartialAttention.of(out, log_sum, piece.mask)
        where = Cells(piece.stream, slice(0, node.n_rows), piece.start, piece.stop)
        mask = None if piece.mask is None else piece.mask[: node.n_rows]
        part = node.attend_by_distance(where, node.q[piece.stream], k, v, mask)
        if part is None:
            return None
        shape = (node.kv_heads, node.group * node.n_rows)
        return PartialAttention(part.out.reshape(*shape, -1), part.log_sum.reshape(shape))

    def _finish(self) -> None:
        node = self.node
        shape = (node.heads, node.n_rows)
        for stream in range(node.streams):
            joined = None
            for of_stream, part in self.parts:
                joined = part.joined(joined) if of_stream == stream else joined
            if joined is not None:
                joined = PartialAttention(joined.out.reshape(*shape, -1), joined.log_sum.reshape(shape))
            node.write(stream, slice(0, node.heads), slice(0, node.n_rows), joined)


def _floats(address: int) -> torch.Tensor:
    array = ggml.values(ggml.tensor_at(address))
    assert array is not None
    return torch.from_numpy(array)


def _plain(tensor: ggml.TensorStruct) -> torch.Tensor | None:
    """Return a view of shape ``(streams, kv heads, cells, head size)``; None for blocks."""
    array = ggml.values(tensor)
    if array is None:
        return None
    view = torch.from_numpy(array)
    return view.view(torch.bfloat16) if view.dtype == torch.int16 else view


def _widen(x: torch.Tensor, size: int) -> torch.Tensor:
    """Pad the last dimension with zeros, which change no score and no sum; torch needs K and V of one head size."""
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def _block_rows(n_rows: int, heads: int, n_threads: int) -> int:
    """Return the rows of a block: many for the matrix products, few enough that every thread gets several blocks."""
    step = 256
    while step > 32 and heads * -(-n_rows // step) < 4 * n_threads:
        step //= 2
    return step


def _ranges(start: int, stop: int, count: int, grain: int = 1) -> list[tuple[int, int]]:
    """Return about `count` ranges of equal length, a multiple of `grain`, that cover [start, stop)."""
    step = max(1, -(-(stop - start) // (max(1, count) * grain))) * grain
    return [(at, min(at + step, stop)) for at in range(start, stop, step)]
