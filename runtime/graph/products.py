"""Fast products of weights with many rows: llama.cpp's matrix products are taken over while a prompt is read.

For a quantised weight that it has no repacked form of, llama.cpp quantises the activations and multiplies row by row,
at a fraction of what the machine can do. Here each thread dequantises some rows of the weight, which costs little
compared with multiplying them by many rows, and leaves the product to torch in f32: faster, and more exact. Weights
that llama.cpp has repacked for the machine (among them those for AMX) are left to it.
"""

from __future__ import annotations

import itertools

import torch

from . import ggml
from .takeover import TakenNodes

MIN_ROWS = 64
"""Rows (tokens) from which dequantising a weight pays off."""

SCRATCH_FLOATS = 1 << 18
"""Values that a thread dequantises at a time: few enough to stay in its cache while they are multiplied."""


class ProductJob:
    """One node; threads claim ranges of the weight's rows by counting up."""

    def __init__(self, node: int, n_threads: int) -> None:
        tensor = ggml.tensor_at(node)
        self.weight, rows = ggml.tensor_at(tensor.src[0]), ggml.values(ggml.tensor_at(tensor.src[1]))
        out = ggml.values(tensor)
        assert rows is not None and out is not None
        self.rows, self.out = torch.from_numpy(rows[0, 0]), torch.from_numpy(out[0, 0])
        n_out, n_in = self.weight.ne[1], self.weight.ne[0]
        max_rows = max(16, SCRATCH_FLOATS // n_in)
        shares = n_threads * -(-n_out // (n_threads * max_rows))  # the same number for each thread
        self.step = -(-n_out // shares)
        self.claims = itertools.count()
        self.given_up = False

    def give_up(self) -> None:
        self.given_up = True

    def work(self, thread: int) -> None:
        """Compute one thread's share."""
        n_out, n_in = self.weight.ne[1], self.weight.ne[0]
        scratch = torch.empty(self.step, n_in)
        while (start := next(self.claims) * self.step) < n_out and not self.given_up:
            stop = min(start + self.step, n_out)
            floats = scratch[: stop - start]
            ggml.dequantise(self.weight, start, stop, floats.data_ptr())
            torch.mm(self.rows, floats.T, out=self.out[:, start:stop])


class FastProducts:
    """Takes over the products with weights in one context's graphs; keep it alive as long as the context."""

    def __init__(self) -> None:
        self.nodes = TakenNodes("product", ProductJob)

    def see(self, node: int) -> None:
        """Take the node over if it is covered; called before llama.cpp computes a graph with this MUL_MAT node."""
        if covers(node):
            self.nodes.take(node)


def covers(node: int) -> bool:
    """Whether a MUL_MAT node is a plain product of a stored weight with enough rows."""
    tensor = ggml.tensor_at(node)
    if tensor.ne[1] < MIN_ROWS or tensor.ne[2] != 1 or tensor.ne[3] != 1:
        return False
    weight, rows = ggml.tensor_at(tensor.src[0]), ggml.tensor_at(tensor.src[1])
    stored = weight.op == 0 and weight.view_src is None and weight.extra is None
    if not stored or weight.ne[2] != 1 or weight.ne[3] != 1 or not ggml.is_blocks(weight.type):
        return False
    return bool(rows.type == 0 and rows.nb[0] == 4 and tensor.nb[0] == 4 and weight.nb[1] == ggml.row_bytes(weight))
