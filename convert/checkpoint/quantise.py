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

import numpy as np
import torch
from gguf import GGMLQuantizationType, quant_shape_to_byte_shape
from gguf.quants import quantize

from .tensors import Planned, TensorPart

CHUNK_NUMBERS = 1 << 20
AHEAD = 16  # chunks in flight: enough for any number of cores that a disk can keep busy

Read = Callable[[str], torch.Tensor]


def tensor_bytes(planned: Planned) -> int:
    """The number of bytes that the tensor takes in the file."""
    return math.prod(quant_shape_to_byte_shape(planned.shape, planned.type)) if planned.shape else 4


def quantised(planned: Planned, read: Read, pool: ThreadPoolExecutor, on_nan: Callable[[str], None]) -> Iterator[bytes]:
    """Yield the tensor's bytes in order; `on_nan` is called with the name of a stored tensor that contains NaNs."""
    ahead: deque[Future[tuple[bytes, bool]]] = deque()
    for part in planned.parts:
        tensor = part.view(read(part.stored.name))
        bad = False
        for rows in _chunks(tensor):
            ahead.append(pool.submit(_quantise, rows, part, planned.type))
            while len(ahead) >= AHEAD:
                raw, nan = ahead.popleft().result()
                bad |= nan
                yield raw
        while ahead:
            raw, nan = ahead.popleft().result()
            bad |= nan
            yield raw
        if bad:
            on_nan(part.stored.name)


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


def _quantise(rows: torch.Tensor, part: TensorPart, kind: GGMLQuantizationType) -> tuple[bytes, bool]:
    if kind == GGMLQuantizationType.BF16 and rows.dtype == torch.bfloat16 and not part.shift:
        nan = bool(rows.isnan().any())
        if not nan:  # nothing to round
            return rows.contiguous().view(torch.uint8).numpy().tobytes(), False
    floats = rows if rows.dtype in (torch.float16, torch.float32) else rows.to(torch.float32)
    numbers = (floats + part.shift if part.shift else floats).contiguous().numpy()
    nan = bool(np.isnan(np.min(numbers))) if numbers.size else False
    with np.errstate(invalid="ignore"):  # NaNs are reported once
        return quantize(numbers, kind).tobytes(), nan
