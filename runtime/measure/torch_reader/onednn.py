"""Products with a matrix of constants by oneDNN, for float32 on a CPU.

They are as precise as torch's own, which are MKL's; but MKL does not use AVX-512 on AMD's processors, so that oneDNN is
2.3 times as fast there. The operation is the one that torch's compiler inserts for a linear layer.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.functional import linear as torch_linear


@cache
def _available() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


def covers(x: torch.Tensor) -> bool:
    """Whether `product` takes such tensors."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and _available()


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``; see `covers`. Not differentiable."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias``, differentiable in `x` alone."""
    if not covers(x):
        return torch_linear(x, weight, bias)
    found: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        return product(grad, weight.T), None, None
