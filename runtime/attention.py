"""Attention over a long cache, fast: llama.cpp's attention nodes are taken over while a prompt is read.

llama.cpp's flash attention on a CPU makes floats of a quantised V once for every query row. Here a node of at least
`MIN_ROWS` rows becomes a custom one: ggml's own threads call back, make floats of each cached cell once, and share out
the query rows among them to torch's fused attention, which computes in f32. Cells that the mask hides from a block of
rows are never looked at, those it shows to all of it need no mask, and the pieces are put together by their
log-sum-exp (Dao et al., "FlashAttention", arXiv 2205.14135, section 3.1).

What is not covered (ALiBi, soft-capped logits, layouts that are not a KV cache's) is left to llama.cpp.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import ggml

MIN_ROWS = 32
"""Query rows (tokens) from which on a node is worth taking over; below it llama.cpp's own is as good."""

SCRATCH_BYTES = 24 << 20
"""Of cells made floats, K and V together; a longer cache is gone through in several rounds."""

PATIENCE_S = 600.0
"""Seconds that a thread waits for the others before it gives up."""

_HIDDEN = -1024  # the bits of f16's minus infinity, as an int16
_GRAIN = 64  # cells; the mask's borders are rounded to it

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class AttentionError(RuntimeError):
    """An attention node could not be computed; names the node. Nothing of its graph is used."""


@dataclass(frozen=True)
class Span:
    """Cells [start, stop) as a block of query rows sees them: all of them, or as the mask says."""

    start: int
    stop: int
    masked: bool


def visible_spans(mask: torch.Tensor) -> tuple[Span, ...]:
    """The cells that some row of a block sees, in order, shape ``(rows, cells)`` f16 of 0 and minus infinity.

    Other finite numbers in the mask make a span masked, so that they are added to the scores.
    """
    bits = mask.view(torch.int16)
    low, high = bits.amin(0), bits.amax(0)
    hidden = (low == _HIDDEN) & (high == _HIDDEN)
    plain = (low == 0) & (high == 0)
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


@dataclass
class _Cells:
    """K or V of one node: how a run of cells of one stream becomes floats, shape ``(cells, heads, head size)``."""

    tensor: ggml.TensorStruct
    plain: torch.Tensor | None
    """A view of the whole, shape ``(streams, heads, cells, head size)``; None for blocks."""

    @classmethod
    def of(cls, address: int) -> _Cells:
        tensor = ggml.tensor_at(address)
        array = ggml.values(tensor)
        plain = None if array is None else torch.from_numpy(array)
        if plain is not None and plain.dtype == torch.int16:
            plain = plain.view(torch.bfloat16)
        return cls(tensor, plain)

    def to_floats(self, out: torch.Tensor, stream: int, start: int, stop: int) -> None:
        """Fill `out` with cells [start, stop)."""
        if self.plain is not None:
            out.copy_(self.plain[stream, :, start:stop].transpose(0, 1))
            return
        kind = ggml.block_type(self.tensor.type)
        first = self.tensor.data + stream * self.tensor.nb[3] + start * self.tensor.nb[1]
        kind.to_float(first, out.data_ptr(), out.numel())


@dataclass
class _Block:
    """Rows [start, stop) of one stream, one KV head: the unit of work, and its result so far."""

    stream: int
    head: int
    start: int
    stop: int
    spans: tuple[Span, ...]
    out: torch.Tensor | None = None
    """Shape ``(group, rows, head size)``."""
    log_sum: torch.Tensor | None = None
    """Shape ``(group, rows)``."""


@dataclass
class _Round:
    """Cells [start, stop) of one stream: made floats by all threads, then attended by all threads."""

    stream: int
    start: int
    stop: int
    pieces: list[tuple[int, int]]
    blocks: list[_Block]
    next_piece: Iterator[int] = field(default_factory=itertools.count)
    next_block: Iterator[int] = field(default_factory=itertools.count)


class _Job:
    """One node in the making: every thread calls `work`; what they share out is claimed by counting."""

    def __init__(self, node: int, n_threads: int, scratch: _Scratch, spans: dict[Any, tuple[Span, ...]]) -> None:
        tensor = ggml.tensor_at(node)
        q, k, v, mask, sinks = tensor.src[:5]
        self.name = tensor.name.decode(errors="replace")
        self.n_threads, self.left = n_threads, n_threads
        self.barrier = threading.Barrier(n_threads)
        self.scale = ggml.custom_params(node).attention.scale
        self.q = _floats(q)  # (streams, heads, rows, head size)
        self.out = _floats(node)  # (streams, rows, heads, head size)
        self.k, self.v = _Cells.of(k), _Cells.of(v)
        self.sinks = None if sinks is None else _floats(sinks).reshape(-1)
        mask_values = None if mask is None else ggml.values(ggml.tensor_at(mask))
        self.mask = None if mask_values is None else torch.from_numpy(mask_values)
        self.kv_heads, self.n_cells = self.k.tensor.ne[2], self.k.tensor.ne[1]
        self.k_size, self.v_size = self.k.tensor.ne[0], self.v.tensor.ne[0]
        self.group = self.q.shape[1] // self.kv_heads
        self.scratch = scratch
        self.rounds = self._plan(mask, spans)

    def _plan(self, mask: int | None, known: dict[Any, tuple[Span, ...]]) -> list[_Round]:
        streams, _, n_rows, _ = self.q.shape
        step = _rows_of_block(n_rows, streams * self.kv_heads, self.n_threads)
        cell_bytes = 4 * self.kv_heads * (self.k_size + self.v_size)
        most = max(_GRAIN, SCRATCH_BYTES // cell_bytes // _GRAIN * _GRAIN)
        rounds = []
        for stream in range(streams):
            blocks = []
            for start in range(0, n_rows, step):
                stop = min(start + step, n_rows)
                key = (mask, stream, start, stop, self.n_cells)
                if key not in known:
                    known[key] = self._spans(stream, start, stop)
                blocks += [_Block(stream, head, start, stop, known[key]) for head in range(self.kv_heads)]
            first = min((b.spans[0].start for b in blocks if b.spans), default=0)
            last = max((b.spans[-1].stop for b in blocks if b.spans), default=0)
            # The longest blocks first, so that the threads end together.
            blocks.sort(key=lambda b: -sum(span.stop - span.start for span in b.spans))
            count = max(1, -(-(last - first) // most))
            length = -(-(last - first) // count // _GRAIN) * _GRAIN
            for start in range(first, max(last, first + 1), max(length, 1)):
                stop = min(start + length, last)
                rounds.append(_Round(stream, start, stop, _pieces(start, stop, 2 * self.n_threads), blocks))
        return rounds

    def _spans(self, stream: int, start: int, stop: int) -> tuple[Span, ...]:
        if self.mask is None:
            return (Span(0, self.n_cells, False),)
        return visible_spans(self._mask_of(stream)[start:stop])

    def _mask_of(self, stream: int) -> torch.Tensor:
        assert self.mask is not None
        return self.mask[stream % len(self.mask), 0]

    def work(self) -> None:
        """One thread's share."""
        for i, turn in enumerate(self.rounds):
            if i:
                self.barrier.wait(PATIENCE_S)  # nobody reads the floats of the round before any more
            k, v = self.scratch.take(turn.stop - turn.start, self.kv_heads, self.k_size, self.v_size)
            while (at := next(turn.next_piece)) < len(turn.pieces):
                start, stop = turn.pieces[at]
                into = slice(start - turn.start, stop - turn.start)
                self.k.to_floats(k[into], turn.stream, start, stop)
                self.v.to_floats(v[into], turn.stream, start, stop)
            self.barrier.wait(PATIENCE_S)
            last = i + 1 == len(self.rounds) or self.rounds[i + 1].stream != turn.stream
            while (at := next(turn.next_block)) < len(turn.blocks):
                self._attend(turn.blocks[at], turn, k, v)
                if last:
                    self._finish(turn.blocks[at])

    def _attend(self, block: _Block, turn: _Round, k: torch.Tensor, v: torch.Tensor) -> None:
        heads = slice(block.head * self.group, (block.head + 1) * self.group)
        rows = block.stop - block.start
        q = self.q[block.stream, heads, block.start : block.stop].contiguous()
        for span in block.spans:
            start, stop = max(span.start, turn.start), min(span.stop, turn.stop)
            if start >= stop:
                continue
            keys = k[start - turn.start : stop - turn.start, block.head][None, None]
            vals = v[start - turn.start : stop - turn.start, block.head][None, None]
            size = max(self.k_size, self.v_size)
            if span.masked:
                mask = self._mask_of(block.stream)[block.start : block.stop, start:stop].float()
                blind = mask.amax(1) == -torch.inf
                keys, vals = (x.expand(1, self.group, -1, -1) for x in (keys, vals))
                queries = q[None]
            else:
                mask = blind = None
                queries = q.view(1, 1, self.group * rows, -1)
            out, log_sum = _attend(
                *(_widen(x, size) for x in (queries, keys, vals)), 0.0, False, attn_mask=mask, scale=self.scale
            )
            out = out[..., : self.v_size].reshape(self.group, rows, self.v_size)
            _add(block, out, log_sum.reshape(self.group, rows), blind)

    def _finish(self, block: _Block) -> None:
        heads = slice(block.head * self.group, (block.head + 1) * self.group)
        target = self.out[block.stream, block.start : block.stop, heads].transpose(0, 1)
        if block.out is None or block.log_sum is None:
            target.zero_()  # no row sees anything: llama.cpp gives zeros, too
            return
        if self.sinks is not None:  # a sink takes part in the sum of the weights and adds nothing
            block.out *= torch.sigmoid(block.log_sum - self.sinks[heads, None])[..., None]
        target.copy_(block.out)


def _add(block: _Block, out: torch.Tensor, log_sum: torch.Tensor, blind: torch.Tensor | None) -> None:
    """Put the attention over some more cells together with that over those before; `blind` rows saw none of them."""
    if blind is not None and blind.any():  # torch gives such a row a sum that is no number or means nothing
        out = out.masked_fill(blind[:, None], 0.0)
        log_sum = log_sum.masked_fill(blind, -torch.inf)
    if block.out is None or block.log_sum is None:
        block.out, block.log_sum = out, log_sum
        return
    total = torch.logaddexp(block.log_sum, log_sum)
    before, now = (torch.exp(x - total).nan_to_num_(0.0)[..., None] for x in (block.log_sum, log_sum))
    block.out = block.out * before + out * now
    block.log_sum = total


def _floats(address: int) -> torch.Tensor:
    array = ggml.values(ggml.tensor_at(address))
    assert array is not None
    return torch.from_numpy(array)


def _widen(x: torch.Tensor, size: int) -> torch.Tensor:
    """Zeros added to the last dimension change no score and no sum; torch wants K and V of one head size."""
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def _rows_of_block(n_rows: int, heads: int, n_threads: int) -> int:
    """Rows of a unit of work: large for the matrix products, small enough that every thread gets several."""
    step = 256
    while step > 32 and heads * -(-n_rows // step) < 4 * n_threads:
        step //= 2
    return step


def _pieces(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    step = max(1, -(-(stop - start) // count))
    return [(at, min(at + step, stop)) for at in range(start, stop, step)]


class _Scratch:
    """Room for the floats of one round, used by one node after the other."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def take(self, cells: int, heads: int, k_size: int, v_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        n_k, n_v = cells * heads * k_size, cells * heads * v_size
        room = self._room[: n_k + n_v]
        return room[:n_k].view(cells, heads, k_size), room[n_k:].view(cells, heads, v_size)

    def reserve(self, floats: int) -> None:
        if self._room.numel() < floats:
            self._room = torch.empty(floats)


class FastAttention:
    """Takes over the attention nodes of one context's graphs; keep it alive as long as the context."""

    def __init__(self) -> None:
        ggml.check_layout()
        self.taken = 0
        """Nodes computed here so far."""
        self._function = ggml.CustomFunction(self._compute)
        self._attention, self._custom = ggml.op_code("FLASH_ATTN_EXT"), ggml.op_code("CUSTOM")
        self._jobs: dict[int, _Job] = {}
        self._spans: dict[Any, tuple[Span, ...]] = {}
        self._scratch = _Scratch()
        self._lock = threading.Lock()
        self.failure: AttentionError | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """While the block decodes, torch computes on the thread that calls it: ggml's threads are the workers."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def see(self, node: int) -> None:
        """llama.cpp is about to compute a graph with this FLASH_ATTN_EXT or CUSTOM node."""
        self._spans.clear()  # a new graph has a new mask in the same place
        if ggml.WORDS[(node >> 2) + ggml.OP_INDEX] == self._attention and covers(node):
            ggml.take_over_attention(node, self._function)

    def raise_kept(self) -> None:
        """Raise what went wrong on ggml's threads since the last time, if anything did.

        Raises:
            AttentionError: names the node.
        """
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def _compute(self, node: int, thread: int, n_threads: int, _: int | None) -> None:
        job = None
        try:
            job = self._join(node, n_threads)
            job.work()
        except threading.BrokenBarrierError:
            pass  # another thread failed, and says why
        except BaseException as error:
            self._fail(node, error)
            if job is not None:
                job.barrier.abort()
        finally:
            if job is not None:
                self._leave(node, job)

    def _join(self, node: int, n_threads: int) -> _Job:
        with self._lock:
            if self.failure is not None:
                raise threading.BrokenBarrierError
            if node not in self._jobs:
                job = _Job(node, n_threads, self._scratch, self._spans)
                longest = max((turn.stop - turn.start for turn in job.rounds), default=0)
                self._scratch.reserve(longest * job.kv_heads * (job.k_size + job.v_size))
                self._jobs[node] = job
            return self._jobs[node]

    def _leave(self, node: int, job: _Job) -> None:
        with self._lock:
            job.left -= 1
            if job.left == 0:
                del self._jobs[node]
                self.taken += 1

    def _fail(self, node: int, error: BaseException) -> None:
        name = ggml.tensor_at(node).name.decode(errors="replace")
        with self._lock:
            if self.failure is None:
                self.failure = AttentionError(f"attention node {name}: {type(error).__name__}: {error}")
                self.failure.__cause__ = error


def covers(node: int) -> bool:
    """Whether a FLASH_ATTN_EXT node can be computed here exactly."""
    tensor, params = ggml.tensor_at(node), ggml.attention_params(node)
    if params.max_bias != 0.0 or params.logit_softcap != 0.0:
        return False
    q, k, v = (ggml.tensor_at(source) for source in tensor.src[:3])
    if q.ne[1] < MIN_ROWS or q.type != 0 or k.ne[2] != v.ne[2] or k.ne[3] != q.ne[3] or q.ne[2] % k.ne[2]:
        return False
    if tensor.src[3] is not None:
        mask = ggml.tensor_at(tensor.src[3])
        if mask.type != 1 or mask.ne[2] != 1 or mask.ne[0] != k.ne[1] or mask.ne[1] < q.ne[1]:
            return False
    return all(_is_cells(x) for x in (k, v))


def _is_cells(tensor: ggml.TensorStruct) -> bool:
    """Whether a tensor's type and strides can be read here: any for plain numbers, packed cells for blocks."""
    if tensor.type in ggml.PLAIN_FLOATS:
        return True
    if tensor.type not in ggml.BLOCK_TYPES:
        return False
    kind = ggml.block_type(tensor.type)
    if tensor.ne[0] % kind.block:
        return False
    head = tensor.ne[0] // kind.block * kind.block_bytes
    return (tensor.ne[2] == 1 or tensor.nb[2] == head) and tensor.nb[1] == head * tensor.ne[2]

