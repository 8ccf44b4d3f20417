"""Causal attention for float32 on a CPU, in tiles of scores that a few products and one power of two need.

It is more than twice as fast as torch's fused kernel (see `onednn`). A tile is ``(keys, rows)``: then a constant for
each row is the bias of a product, and costs nothing. Forward, this constant is the largest score of a row over the
block of keys that ends with its own, not over all: a sum of larger ones is only inexact where it overflows, and then
there is no result. Backward, it is the log-sum-exp. Scores are in base 2, whose power is the fastest.

Each of our threads computes whole tiles. Were single operations divided among torch's, these would wait for each other
after every one, which takes many times as long on a busy machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .onednn import product

KEYS = 1024
"""Keys of a tile; a row's own block has fewer."""

ROWS, LEAST_ROWS, MOST_ROWS = 1024, 64, 256
"""Rows of a tile over all heads of a group, and the least and the most of one head."""

LN2 = math.log(2)


@dataclass(frozen=True)
class _Strand:
    """Every `of`-th block of rows of a KV head, from block `start` on: what one thread computes at a time."""

    head: int
    start: int
    of: int


@dataclass(frozen=True)
class _Block:
    """Some query rows of a group's heads, ``(group * rows, size)``, in base 2, and the last keys that they see."""

    rows: slice
    own: slice
    q: torch.Tensor

    def earlier(self) -> Iterator[slice]:
        return (slice(c, min(c + KEYS, self.own.start)) for c in range(0, self.own.start, KEYS))


def _blocks(strand: _Strand, q: torch.Tensor, n_keys: int, scale: float) -> Iterator[_Block]:
    _, group, n_rows, size = q.shape
    step, first = min(max(LEAST_ROWS, ROWS // group), MOST_ROWS), n_keys - n_rows
    for start in range(strand.start * step, n_rows, strand.of * step):
        rows = slice(start, min(start + step, n_rows))
        own = slice(first + start, first + rows.stop)
        yield _Block(rows, own, (q[strand.head, :, rows] * (scale / LN2)).reshape(-1, size))


def _in_threads(run: Callable[[_Strand], None], n_heads: int) -> None:
    """Run strands of all heads in as many threads as torch uses here; sums are the same each time."""
    threads = torch.get_num_threads()
    of = threads // math.gcd(threads, n_heads)
    strands = [_Strand(head, start, of) for head in range(n_heads) for start in range(of)]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(torch.no_grad()(run), strands):
                pass
    finally:
        torch.set_num_threads(threads)  # what the last one set is for MKL, and for new threads, the number of all


def _own_scores(k: torch.Tensor, block: _Block, offset: torch.Tensor | None = None) -> torch.Tensor:
    """A block's scores over its own keys, minus infinity where a row does not see a key."""
    scores = product(k, block.q, offset)
    n = len(k)
    scores.view(n, -1, n).add_(torch.full((n, n), -torch.inf).tril_(-1)[:, None])
    return scores


def attend_tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Result and log-sum-exp of attention, for the arguments of `attend`; nothing if a sum overflows."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    log_sum = out.new_empty(out.shape[:-1])
    group, size = q.shape[1], q.shape[3]
    k = k[:, 0].contiguous()
    ones = v.new_ones(len(v), 1, v.shape[2])
    v = torch.cat((v[:, 0].transpose(1, 2), ones), dim=1)  # ones, so that they add up the weights as well

    def run(strand: _Strand) -> None:
        keys, values = k[strand.head], v[strand.head]
        for block in _blocks(strand, q, len(keys), scale):
            scores = _own_scores(keys[block.own], block)
            largest = scores.amax(0)
            total = product(values[:, block.own], scores.sub_(largest).exp2_().T)
            offset = largest.neg()
            for part in block.earlier():
                total += product(values[:, part], product(keys[part], block.q, offset).exp2_().T)
            out[strand.head, :, block.rows] = (total[:size] / total[size]).T.reshape(group, -1, size)
            log_sum[strand.head, :, block.rows] = (largest + total[size].log2()).mul_(LN2).view(group, -1)

    _in_threads(run, len(q))
    return (out, log_sum) if log_sum.isfinite().all() and out.isfinite().all() else None


def attend_tiles_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to `q`, `k` and `v`; see `attend_backward`."""
    of_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    group, size = q.shape[1], q.shape[3]
    k, v = k[:, 0].contiguous(), v[:, 0].contiguous()
    k_t = k.transpose(1, 2).contiguous()
    of_cells: dict[_Strand, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(strand: _Strand) -> None:
        head = strand.head
        of_k, of_v = of_cells[strand] = torch.zeros_like(k[head]), torch.zeros_like(v[head])
        for block in _blocks(strand, q, k.shape[1], scale):
            of_rows = grad[head, :, block.rows].reshape(-1, size)
            offset = log_sum[head, :, block.rows].reshape(-1) / -LN2
            mean = (of_rows * out[head, :, block.rows].reshape(-1, size)).sum(1).neg_()
            q_t, of_rows_t = block.q.T.contiguous(), of_rows.T.contiguous()
            of_q_t = torch.zeros_like(q_t)
            for part in (block.own, *block.earlier()):
                keys, own = k[head, part], part == block.own
                scores = _own_scores(keys, block, offset) if own else product(keys, block.q, offset)
                weights = scores.exp2_()
                of_v[part] += product(weights, of_rows_t)
                of_scores = product(v[head, part], of_rows, mean).mul_(weights)
                of_k[part] += product(of_scores, q_t)
                of_q_t += product(k_t[head, :, part], of_scores.T)
            of_q[head, :, block.rows] = of_q_t.T.reshape(group, -1, size)

    _in_threads(run, len(q))
    of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
    for strand in sorted(of_cells, key=lambda strand: strand.start):
        of_k[strand.head] += of_cells[strand][0]
        of_v[strand.head] += of_cells[strand][1]
    return of_q.mul_(scale), of_k.mul_(LN2)[:, None], of_v[:, None]
