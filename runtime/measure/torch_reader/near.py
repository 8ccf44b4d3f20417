"""Attention with a near window: keys nearer than it and those beyond have scores of their own, under one softmax.

On a CPU, the scores that count are divided into triangles, each of which is a call of `attend`, so that none is
computed in vain and none has to be masked: one of all far keys; in each block of `near_tokens` rows, one of the block's
own keys; and one of the near keys in the block before it, which is like the others once rows and keys are in reverse
order. The results are joined by their log-sum-exp, as in `attention`. Elsewhere the scores of some rows at a time are
computed as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .attention import Attended, attend, attend_backward

SCORES = 1 << 26
"""How many scores are computed at a time where they are computed as such."""

Heads = tuple[torch.Tensor, ...]
"""Near queries and keys, far queries and keys, and values, in the shapes of `attend`."""


@dataclass(frozen=True)
class _Triangle:
    """Rows and keys of one call of `attend`, in which a row sees one key more than the row before it, and the last all.

    If `reversed`, it is so once both are in reverse order.
    """

    far: bool
    rows: slice
    keys: slice
    reversed: bool = False

    def heads(self, heads: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k = heads[2:4] if self.far else heads[:2]
        return self.cut(q, self.rows), self.cut(k, self.keys), self.cut(heads[4], self.keys)

    def cut(self, x: torch.Tensor, part: slice) -> torch.Tensor:
        return self.turn(x[:, :, part])

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(2) if self.reversed else x


def _triangles(n_rows: int, n_keys: int, near_tokens: int) -> Iterator[_Triangle]:
    before = n_keys - n_rows  # keys before the first row's own
    first_far = max(before, near_tokens)
    if first_far < n_keys:
        yield _Triangle(True, slice(first_far - before, n_rows), slice(n_keys - near_tokens))
    for start in range(before // near_tokens * near_tokens, n_keys, near_tokens):
        first, stop = max(start, before), min(start + near_tokens, n_keys)
        yield _Triangle(False, slice(first - before, stop - before), slice(start, stop))
        stop = min(stop, start + near_tokens - 1)  # a whole block's last row sees none of the block before
        if start and first < stop:
            yield _Triangle(
                False, slice(first - before, stop - before), slice(first - near_tokens + 1, start), reversed=True
            )


def attend_apart(heads: Heads, near_tokens: int, scale: float) -> Attended:
    """Attention with near scores where the key is nearer than `near_tokens`, and far ones elsewhere.

    Not differentiable; see `attend_apart_backward`.
    """
    with torch.no_grad():
        if heads[0].device.type != "cpu":
            pieces = _pieces(heads)
            return Attended(torch.cat([_dense(piece, near_tokens, scale) for _, piece in pieces], dim=2), None)
        out = torch.zeros_like(heads[0], memory_format=torch.contiguous_format)
        log_sum = torch.full(out.shape[:-1], -torch.inf, dtype=out.dtype)
        for part in _triangles(out.shape[2], heads[4].shape[2], near_tokens):
            found = attend(*part.heads(heads), scale)
            assert found.log_sum is not None
            so_far, more = log_sum[:, :, part.rows], part.turn(found.log_sum)
            total = torch.logaddexp(so_far, more)
            rows = out[:, :, part.rows].mul_((so_far - total).exp_()[..., None])
            rows.addcmul_(part.turn(found.out), (more - total).exp_()[..., None])
            so_far.copy_(total)
        return Attended(out, log_sum)


def attend_apart_backward(
    grad: torch.Tensor, heads: Heads, attended: Attended, near_tokens: int, scale: float
) -> Heads:
    """Gradients with respect to `heads`, given the gradient `grad` of ``attended.out``."""
    log_sum = attended.log_sum
    if log_sum is None:
        return _dense_backward(grad, heads, near_tokens, scale)
    with torch.no_grad():
        of_heads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in heads)
        for part in _triangles(grad.shape[2], heads[4].shape[2], near_tokens):
            of_rows, out, its_sum = (part.cut(x, part.rows) for x in (grad, attended.out, log_sum))
            found = attend_backward(of_rows, *part.heads(heads), Attended(out, its_sum), scale)
            of_q, of_k = of_heads[2:4] if part.far else of_heads[:2]
            for total, where, more in zip(
                (of_q, of_k, of_heads[4]), (part.rows, part.keys, part.keys), found, strict=True
            ):
                total[:, :, where] += part.turn(more)
        return of_heads


# --- elsewhere than on a CPU


def _pieces(heads: Heads) -> Iterator[tuple[slice, Heads]]:
    """Some rows at a time: which, and the heads as if the text ended with them."""
    q, keys = heads[0], heads[4].shape[2]
    step = max(1, SCORES // (q.shape[0] * q.shape[1] * keys))
    for start in range(0, q.shape[2], step):
        rows = slice(start, min(start + step, q.shape[2]))
        seen = slice(keys - q.shape[2] + rows.stop)
        cuts = (rows, seen, rows, seen, seen)
        yield rows, tuple(x[:, :, cut] for x, cut in zip(heads, cuts, strict=True))


def _dense(heads: Heads, near_tokens: int, scale: float) -> torch.Tensor:
    q, k, far_q, far_k, v = heads
    rows, keys = q.shape[2], k.shape[2]
    at = torch.arange(keys, device=q.device)
    distance = at[keys - rows :, None] - at
    near, far = q @ k.transpose(2, 3), far_q @ far_k.transpose(2, 3)
    scores = torch.where(distance < near_tokens, near, far).mul(scale)
    return scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v


def _dense_backward(grad: torch.Tensor, heads: Heads, near_tokens: int, scale: float) -> Heads:
    of_heads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in heads)
    for rows, piece in _pieces(heads):
        leaves = [x.detach().requires_grad_() for x in piece]
        with torch.enable_grad():
            out = _dense(tuple(leaves), near_tokens, scale)
        found = torch.autograd.grad(out, leaves, grad[:, :, rows])
        seen = slice(piece[4].shape[2])
        for total, where, more in zip(of_heads, (rows, seen, rows, seen, seen), found, strict=True):
            total[:, :, where] += more
    return of_heads
