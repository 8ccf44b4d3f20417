"""Rotation in torch, as a differentiable function of ln λ and ln attention factor."""

from __future__ import annotations

import numpy as np
import torch

from ....factors import Array, Band, RopeFacts


class RopeTable:
    """The rotation of positions 0 to n - 1 in a band.

    Angles are float64: in float32, an angle at position 30,000 is off by a thousandth of a radian. The attention factor
    scales all that is rotated, start tokens included, as in `Llama`.
    """

    def __init__(self, facts: RopeFacts, band: Band, n: int, device: torch.device) -> None:
        def leaf(values: object) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device).log().requires_grad_()

        half = facts.n_rot // 2
        self._leaves = (leaf(band.rescale_factors), leaf(band.attention_factor))
        base = float(np.float32(facts.freq_base))  # llama.cpp's is a float32
        plain = base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        native = torch.tensor(facts.start_factors, dtype=torch.float64, device=device)
        at = torch.arange(n, dtype=torch.float64, device=device)[:, None]
        with torch.enable_grad():
            angles = torch.where(at < band.start_tokens, at * (plain / native), at * (plain * (-self._leaves[0]).exp()))
            attention = self._leaves[1].exp()
            self._tables = (attention * angles.cos(), attention * angles.sin())

    def cast(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines times the attention factor, each ``(n, n_rot/2)``."""
        cos, sin = (table.detach().to(dtype) for table in self._tables)
        return cos, sin

    def gradient(self, of_cos: torch.Tensor, of_sin: torch.Tensor) -> tuple[Array, float]:
        """Turn gradients of the tables into those of ln λ ``(n_rot/2,)`` and of ln attention factor."""
        by_factors, by_attention = torch.autograd.grad(self._tables, self._leaves, (of_cos, of_sin))
        return np.asarray(by_factors.cpu().numpy(), dtype=np.float64), float(by_attention)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate dimensions (i, n_rot/2 + i) of `x` ``(…, rows, head size)`` by tables ``(rows, n_rot/2)``.

    Dimensions from n_rot on are neither rotated nor scaled.
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
