"""Causal attention in torch, forward and backward, without a score matrix and without repeated keys.

Query rows are the last of the text: row *i* of `rows` sees the first ``keys - rows + i + 1`` keys. On a CPU, float32 is
computed in `tiles`, and other types by torch's fused kernel, called directly, since it returns the log-sum-exp: with
it, the results over earlier keys and over the rows' own keys are combined (Dao et al., "FlashAttention", arXiv
2205.14135, section 3.1), and the backward pass need not repeat the forward pass. Elsewhere torch chooses the kernel; a
GPU has a far faster one for 16 bits (`half`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import onednn
from .tiles import attend_tiles, attend_tiles_backward

ROWS = 1024
"""Query rows at a time where torch chooses the kernel: it needs a mask of that many rows."""

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Attended:
    """Attention's result, shape ``(kv heads, group, rows, head size)``, and the log-sum-exp of each row's scores.

    Without a log-sum-exp, the backward pass repeats the forward pass.
    """

    out: torch.Tensor
    log_sum: torch.Tensor | None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, half: bool = False) -> Attended:
    """Attention of `q` ``(kv heads, group, rows, size)`` over `k` and `v` ``(kv heads, 1, keys, size)``.

    Not differentiable; see `attend_backward`. `half`: in float16, on a GPU; the result has the type of `q`.
    """
    with torch.no_grad():
        if half:
            return Attended(_flash(q.half(), k.half(), v.half(), scale).to(q.dtype), None)
        if q.device.type != "cpu":
            return Attended(torch.cat([_plain(*piece, scale) for piece in _pieces(q, k, v)], dim=2), None)
        found = attend_tiles(q, k, v, scale) if onednn.covers(q) else None
        return Attended(*found) if found is not None else _attend_fused(q, k, v, scale)


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attended: Attended,
    scale: float,
    half: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to `q`, `k` and `v` (of their shapes), given the gradient `grad` of ``attended.out``.

    `half`: in bfloat16, on a GPU, as gradients can be too small for float16.
    """
    if half:
        return _flash_backward(grad, q, k, v, scale)
    if attended.log_sum is None:
        return _plain_backward(grad, q, k, v, scale)
    with torch.no_grad():
        if onednn.covers(q):
            return attend_tiles_backward(grad, q, k, v, attended.out, attended.log_sum, scale)
        k, v = _for_group(q, k, v)
        first = k.shape[2] - q.shape[2]
        saved = (attended.out, attended.log_sum, 0.0)
        # With the result and log-sum-exp over all keys, each part's gradients are exact, and their sum is the whole.
        of_q, of_k, of_v = _fused_backward(grad, q, k[:, :, first:], v[:, :, first:], *saved, True, scale=scale)
        of_k, of_v = of_k.sum(1, keepdim=True), of_v.sum(1, keepdim=True)
        if first:
            more_q, more_k, more_v = _fused_backward(
                grad, q, k[:, :, :first], v[:, :, :first], *saved, False, scale=scale
            )
            of_q = of_q + more_q
            of_k = torch.cat((more_k.sum(1, keepdim=True), of_k), dim=2)
            of_v = torch.cat((more_v.sum(1, keepdim=True), of_v), dim=2)
        return of_q, of_k, of_v


def _attend_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Attended:
    k, v = _for_group(q, k, v)
    first = k.shape[2] - q.shape[2]
    own, own_sum = _fused(q, k[:, :, first:], v[:, :, first:], 0.0, True, scale=scale)
    if not first:
        return Attended(own, own_sum)
    earlier, earlier_sum = _fused(q, k[:, :, :first], v[:, :, :first], 0.0, False, scale=scale)
    total = torch.logaddexp(own_sum, earlier_sum)
    out = own.mul_((own_sum - total).exp_()[..., None])
    return Attended(out.addcmul_(earlier, (earlier_sum - total).exp_()[..., None]), total)


def _for_group(q: torch.Tensor, *cells: torch.Tensor) -> list[torch.Tensor]:
    """Keys or values expanded to all heads of a group: the same memory with a stride of zero."""
    return [x.expand(-1, q.shape[1], -1, -1) for x in cells]


def _pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    first = k.shape[2] - q.shape[2]
    for start in range(0, q.shape[2], ROWS):
        stop = min(start + ROWS, q.shape[2])
        yield q[:, :, start:stop], k[:, :, : first + stop], v[:, :, : first + stop]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    rows, keys = q.shape[2], k.shape[2]
    mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril_(keys - rows)
    k, v = _for_group(q, k, v)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _plain_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_q, of_k, of_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    start = 0
    for piece in _pieces(q, k, v):
        leaves = [x.detach().requires_grad_() for x in piece]
        stop = start + piece[0].shape[2]
        with torch.enable_grad():
            out = _plain(leaves[0], leaves[1], leaves[2], scale)
        found = torch.autograd.grad(out, leaves, grad[:, :, start:stop])
        of_q[:, :, start:stop] = found[0]
        of_k[:, :, : piece[1].shape[2]] += found[1]
        of_v[:, :, : piece[1].shape[2]] += found[2]
        start = stop
    return of_q, of_k, of_v


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The GPU's fused kernel for 16 bits, called directly: torch would not choose it for rows after earlier keys."""
    k, v = _for_group(q, k, v)
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]
    return out


def _flash_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    leaves = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = _flash(leaves[0], leaves[1], leaves[2], scale)
    of_q, of_k, of_v = torch.autograd.grad(out, leaves, grad.bfloat16())
    return of_q.to(q.dtype), of_k.to(q.dtype), of_v.to(q.dtype)
