"""Quantise a tensor for the file, a few rows at a time, with gguf's own quantisers, on all cores.

The result is that of quantising the whole tensor at once, since the blocks of gguf's types are within rows. Rows are
quantised in threads (numpy releases the GIL while it computes) and come back in order, only a few chunks ahead of the
writer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quant_shape_to_byte_shape
from gguf.quants import quantize

from ...errors import UserError
from .tensors import Planned, TensorPart

CHUNK_NUMBERS = 1 << 20
AHEAD = 16  # chunks in flight: enough for any number of cores that a disk can keep busy

Read = Callable[[str], torch.Tensor]

LARGEST = {
    GGMLQuantizationType.F32: 3.4028235677973366e38,
    GGMLQuantizationType.F16: 65520.0,
    GGMLQuantizationType.BF16: 3.3961775292304612e38,
    GGMLQuantizationType.Q8_0: 127 * 65520.0,  # a block's scale is a float16
}
"""The smallest numbers that would become infinite, by type."""


class TooLarge(UserError):
    """A finite number that would become infinite in the type to be written."""


def tensor_bytes(planned: Planned) -> int:
    """The number of bytes that the tensor takes in the file."""
    return math.prod(quant_shape_to_byte_shape(planned.shape, planned.type)) if planned.shape else 4


def quantised(
    planned: Planned, read: Read, pool: ThreadPoolExecutor, on_odd: Callable[[str, str], None]
) -> Iterator[bytes]:
    """Yield the tensor's bytes in order; `on_odd` is called with a stored tensor's name, and "NaNs" or "infinities".

    Raises:
        TooLarge: a finite number would become infinite in the tensor's type.
    """
    ahead: deque[Future[tuple[bytes, frozenset[str]]]] = deque()
    for part in planned.parts:
        tensor = part.view(read(part.stored.name))
        odd: set[str] = set()
        for rows in _chunks(tensor):
            ahead.append(pool.submit(_quantise, rows, part, planned.type))
            while len(ahead) >= AHEAD:
                raw, found = ahead.popleft().result()
                odd |= found
                yield raw
        while ahead:
            raw, found = ahead.popleft().result()
            odd |= found
            yield raw
        for what in sorted(odd):
            on_odd(part.stored.name, what)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield views of some rows each."""
    if tensor.dim() > 2:
        for slice_ in tensor:
            yield from _chunks(slice_)
        return
    rows = tensor if tensor.dim() == 2 else tensor.reshape(1, -1)
    step = max(1, CHUNK_NUMBERS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step]


def _quantise(rows: torch.Tensor, part: TensorPart, kind: GGMLQuantizationType) -> tuple[bytes, frozenset[str]]:
    as_stored = kind == GGMLQuantizationType.BF16 and rows.dtype == torch.bfloat16 and not part.shift
    if as_stored and bool(rows.isfinite().all()):  # nothing to round
        return rows.contiguous().view(torch.uint8).numpy().tobytes(), frozenset()
    floats = rows if rows.dtype in (torch.float16, torch.float32) else rows.to(torch.float32)
    numbers = (floats + part.shift if part.shift else floats).contiguous().numpy()
    odd = _check_range(rows, numbers, part, kind)
    with np.errstate(invalid="ignore", over="ignore"):  # NaNs and infinities are reported once
        return quantize(numbers, kind).tobytes(), odd


def _check_range(
    rows: torch.Tensor, numbers: np.ndarray[Any, np.dtype[Any]], part: TensorPart, kind: GGMLQuantizationType
) -> frozenset[str]:
    """Refuse finite numbers that are too large for the type; return what else there is besides finite numbers."""
    if not numbers.size:
        return frozenset()
    low, high = float(np.min(numbers)), float(np.max(numbers))
    if max(-low, high) < LARGEST.get(kind, np.inf):  # false for NaNs
        return frozenset()
    wide = rows.to(torch.float64)  # float8 has no functions of its own
    finite = wide[wide.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if largest >= LARGEST.get(kind, np.inf):
        raise TooLarge(f"{part.stored.shard}: {part.stored.name}: {largest:.4g} is too large for {kind.name.lower()}")
    found = {"NaNs": bool(wide.isnan().any()), "infinities": bool(wide.isinf().any())}
    return frozenset(what for what, there in found.items() if there)
