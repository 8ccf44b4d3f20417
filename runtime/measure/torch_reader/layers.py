"""A Llama-family decoder in torch: forward over a text, and backward to the rotation tables, with bounded memory.

Each layer processes all rows of a text at once, without a cache. Wide intermediate results (of the feed-forward, and
logits) are computed for some rows at a time. A gradient keeps each layer's input and attention output, and recomputes
the rest of a layer in the backward pass; weights are constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import silu

from .attention import Attended, attend, attend_backward
from .near import attend_apart, attend_apart_backward
from .onednn import linear
from .rope import Tables, rotate
from .weights import Layer, Weights

CHUNK_BYTES = 64 << 20
"""Size of the logits, or of the feed-forward's intermediate result, that is computed at a time."""

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries ``(kv heads, group, rows, head size)``, keys and values ``(kv heads, 1, rows, head size)``."""

KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """The input: embedded rows ``(rows, n_embd)``, and for each layer the keys and values of the tokens before them.

    Earlier keys are not yet rotated; keys and values have shape ``(kv heads, 1, earlier, head size)``. The tables are
    of all tokens, ``(earlier + rows, n_rot/2)``: two, or six with a near window of `near_tokens`.
    """

    rows: torch.Tensor
    tables: Tables
    near_tokens: int = 0
    keys: tuple[torch.Tensor, ...] = ()
    values: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Targets:
    """Rows of the last hidden states, the tokens to predict from them, and their weights, each ``(targets,)``.

    Weights add up to 1, float64.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor


class Decoder:
    """The computation with one model's weights; it keeps no state of a text.

    Attributes:
        half: whether attention is computed in 16 bits (on a GPU; see `attention`).
    """

    def __init__(self, weights: Weights) -> None:
        self.half = False
        self._weights, self._shape = weights, weights.shape
        self._scale = self._shape.head_size**-0.5

    def losses(self, text: Rows, targets: Targets, n_kept: int = 0) -> tuple[npt.NDArray[np.float64], list[KeysValues]]:
        """Return ``-ln p`` of each target, shape ``(targets,)``, and each layer's keys and values of the first rows.

        These are of the first `n_kept` rows, keys before rotation, in the shapes of `Rows`.
        """
        x, kept = text.rows, []
        for i, layer in enumerate(self._weights.layers):
            q, k, v = self._heads(layer, x)
            if n_kept:  # copies, as the heads are views of queries, keys and values together
                kept.append((_copy(k[:, :, :n_kept]), _copy(v[:, :, :n_kept])))
            heads = self._rotated(i, (q, k, v), text.tables, text)
            x = self._finish(layer, x, self._attend(heads, text.near_tokens).out)
        losses = [self._head(x[at], token) for at, token, _ in self._head_pieces(targets)]
        return np.asarray(torch.cat(losses).cpu().numpy(), dtype=np.float64), kept

    def gradient(self, text: Rows, targets: Targets) -> tuple[float, Tables]:
        """Return the weighted mean loss, and its gradients with respect to `text.tables` in float64."""
        inputs, middles = [text.rows], []
        for i, layer in enumerate(self._weights.layers):
            heads = self._heads(layer, inputs[-1])
            middles.append(self._attend(self._rotated(i, heads, text.tables, text), text.near_tokens))
            inputs.append(self._finish(layer, inputs[-1], middles[-1].out))
        loss, grad = self._head_gradient(inputs.pop(), targets)
        of_tables = tuple(torch.zeros_like(table, dtype=torch.float64) for table in text.tables)
        for i in reversed(range(len(middles))):
            x, attended = inputs.pop(), middles.pop()
            by_x, of_attended = self._finish_gradient(self._weights.layers[i], x, attended.out, grad)
            more, *by_tables = self._attention_gradient(i, x, attended, of_attended, text)
            grad = by_x.add_(more)
            for total, by_table in zip(of_tables, by_tables, strict=True):
                total += by_table
        return loss, of_tables

    # --- a layer's attention

    def _heads(self, layer: Layer, x: torch.Tensor) -> Heads:
        s = self._shape
        joined = linear(normalise(x, layer.attn_norm, s.eps), layer.qkv, layer.qkv_bias)
        heads = joined.view(len(x), -1, s.head_size)
        last = s.n_head + s.n_head_kv
        q, k, v = heads[:, : s.n_head], heads[:, s.n_head : last], heads[:, last:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = normalise(q, layer.q_norm, s.eps), normalise(k, layer.k_norm, s.eps)
        shape = (len(x), s.n_head_kv, -1, s.head_size)
        q, k, v = (part.reshape(shape).permute(1, 2, 0, 3) for part in (q, k, v))
        return q, k, v

    def _rotated(self, i: int, heads: Heads, tables: Tables, text: Rows) -> tuple[torch.Tensor, ...]:
        """Heads for layer `i`'s attention: rotated, and with the earlier keys and values of `text` put before them.

        With a near window, queries and keys come twice, in the order that `attend_apart` expects.
        """
        q, k, v = heads
        if text.keys:
            k, v = torch.cat((text.keys[i].to(k), k), dim=2), torch.cat((text.values[i].to(v), v), dim=2)
        first = k.shape[2] - q.shape[2]
        cos, sin, *far = tables
        near = rotate(q, cos[first:], sin[first:]), rotate(k, cos, sin)
        if not far:
            return *near, v
        q_cos, q_sin, k_cos, k_sin = far
        return *near, rotate(q, q_cos[first:], q_sin[first:]), rotate(k, k_cos, k_sin), v

    def _attend(self, heads: tuple[torch.Tensor, ...], near_tokens: int) -> Attended:
        if near_tokens:
            return attend_apart(heads, near_tokens, self._scale)
        q, k, v = heads
        return attend(q, k, v, self._scale, self.half)

    def _attention_gradient(
        self, i: int, x: torch.Tensor, attended: Attended, grad: torch.Tensor, text: Rows
    ) -> tuple[torch.Tensor, ...]:
        """Gradients with respect to layer `i`'s input and the tables, given that of its attention output."""
        leaves = [part.detach().requires_grad_() for part in (x, *text.tables)]
        with torch.enable_grad():
            heads = self._rotated(i, self._heads(self._weights.layers[i], leaves[0]), tuple(leaves[1:]), text)
        parts = tuple(part.detach() for part in heads)
        if text.near_tokens:
            of_heads = attend_apart_backward(grad, parts, attended, text.near_tokens, self._scale)
        else:
            q, k, v = parts
            of_heads = attend_backward(grad, q, k, v, attended, self._scale, self.half)
        return torch.autograd.grad(heads, leaves, of_heads)

    # --- the rest of a layer, row by row

    def _rest(self, layer: Layer, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + linear(attended.permute(2, 0, 1, 3).reshape(len(x), -1), layer.out, layer.out_bias)
        joined = linear(normalise(x, layer.ffn_norm, self._shape.eps), layer.gate_up, layer.gate_up_bias)
        gate, up = joined.chunk(2, dim=-1)
        return x + linear(silu(gate) * up, layer.down, layer.down_bias)

    def _row_pieces(self, x: torch.Tensor) -> Iterator[slice]:
        step = max(1, CHUNK_BYTES // (4 * self._shape.n_ff * x.element_size()))
        return (slice(start, start + step) for start in range(0, len(x), step))

    def _finish(self, layer: Layer, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """A layer's output, from its input and its attention output."""
        out = torch.empty_like(x)
        for rows in self._row_pieces(x):
            out[rows] = self._rest(layer, x[rows], attended[:, :, rows])
        return out

    def _finish_gradient(
        self, layer: Layer, x: torch.Tensor, attended: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients with respect to both arguments of `_finish`, given that of its result."""
        of_x, of_attended = torch.empty_like(x), torch.empty_like(attended)
        for rows in self._row_pieces(x):
            leaves = [part.detach().requires_grad_() for part in (x[rows], attended[:, :, rows])]
            with torch.enable_grad():
                out = self._rest(layer, *leaves)
            of_x[rows], of_attended[:, :, rows] = torch.autograd.grad(out, leaves, grad[rows])
        return of_x, of_attended

    # --- the output head, for the targets only

    def _head_pieces(self, targets: Targets) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        output = self._weights.output
        step = max(1, CHUNK_BYTES // (len(output) * output.element_size()))
        for start in range(0, len(targets.rows), step):
            piece = slice(start, start + step)
            yield targets.rows[piece], targets.tokens[piece], targets.weights[piece]

    def _head(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Losses of `tokens` ``(rows,)``, predicted from hidden states `x` ``(rows, n_embd)``, in float64."""
        x = normalise(x, self._weights.output_norm, self._shape.eps)
        logits = linear(x, self._weights.output, self._weights.output_bias)
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        return torch.logsumexp(logits, dim=1).double() - chosen.double()

    def _head_gradient(self, x: torch.Tensor, targets: Targets) -> tuple[float, torch.Tensor]:
        """The weighted mean loss, and its gradient with respect to the last hidden states `x`."""
        total, grad = 0.0, torch.zeros_like(x)
        for at, tokens, weights in self._head_pieces(targets):
            leaf = x[at].requires_grad_()
            with torch.enable_grad():
                loss = self._head(leaf, tokens) @ weights
            grad.index_add_(0, at, torch.autograd.grad(loss, leaf)[0])
            total += float(loss)
        return total, grad


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)
