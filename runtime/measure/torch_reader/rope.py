"""Rotation in torch, as a differentiable function of ln λ and ln attention factor."""

from __future__ import annotations

import numpy as np
import torch

from ....factors import Array, Band, RopeFacts

Tables = tuple[torch.Tensor, ...]
"""Cosines and sines times the attention factor, each ``(tokens, n_rot/2)``: ``(cos, sin)`` for all queries and keys,
or six for a near window: those of near queries and keys, then of far queries, then of far keys."""


class RopeTable:
    """The rotation of positions 0 to n - 1 in a band.

    Angles are float64: in float32, an angle at position 30,000 is off by a thousandth of a radian. The attention factor
    scales all that is rotated, start tokens included, as in `Llama`.

    Attributes:
        near_tokens: the band's near window; 0 if the whole text lies in it, as one rotation then serves all.
    """

    def __init__(self, facts: RopeFacts, band: Band, n: int, device: torch.device) -> None:
        def leaf(values: object) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device).log().requires_grad_()

        half = facts.n_rot // 2
        self._leaves = (leaf(band.rescale_factors), leaf(band.attention_factor))
        self.near_tokens = band.near_tokens if band.near_tokens < n else 0
        base = float(np.float32(facts.freq_base))  # llama.cpp's is a float32
        plain = base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        native = plain / torch.tensor(facts.start_factors, dtype=torch.float64, device=device)
        at = torch.arange(n, dtype=torch.float64, device=device)[:, None]
        with torch.enable_grad():
            rescaled = plain * (-self._leaves[0]).exp()
            far_keys = torch.where(at < band.start_tokens, at * native, at * rescaled)
            if not band.near_tokens:
                angles = [far_keys]
            elif not self.near_tokens:
                angles = [at * native]
            else:
                far_queries = at * rescaled + band.near_tokens * (native - rescaled)
                angles = [at * native, far_queries, far_keys]
            attention = self._leaves[1].exp()
            self._tables = tuple(attention * part for angle in angles for part in (angle.cos(), angle.sin()))

    def cast(self, dtype: torch.dtype) -> Tables:
        """Return the tables in `dtype`, without their history."""
        return tuple(table.detach().to(dtype) for table in self._tables)

    def gradient(self, of_tables: Tables) -> tuple[Array, float]:
        """Turn gradients of the tables into those of ln λ ``(n_rot/2,)`` and of ln attention factor."""
        found = torch.autograd.grad(self._tables, self._leaves, of_tables, materialize_grads=True)
        return np.asarray(found[0].cpu().numpy(), dtype=np.float64), float(found[1])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate dimensions (i, n_rot/2 + i) of `x` ``(…, rows, head size)`` by tables ``(rows, n_rot/2)``.

    Dimensions from n_rot on are neither rotated nor scaled.
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
