"""Fast attention over a long cache: llama.cpp's attention nodes are taken over where its own code is slow.

llama.cpp's flash attention on a CPU dequantises V once for every query row, and distributes a single token's work
badly. A node with enough work is taken over and computed by `attention_jobs`. What is not covered (ALiBi, soft-capped
logits, layouts that are not a KV cache's) is left to llama.cpp.
"""

from __future__ import annotations

from typing import Any

from . import ggml
from .attention_jobs import Node, PromptJob, Scratch, Span, TokenJob
from .hook import NodeError
from .near_window import NearWindows
from .takeover import Job, TakenNodes

MIN_ROWS = 32
"""Query rows (tokens) from which a node is always worth taking over."""

MIN_FLOATS = 1 << 21
"""Values in the cells from which a node of fewer rows is, too; below, llama.cpp's own code is as good."""


class FastAttention:
    """Takes over the attention nodes of one context's graphs; keep it alive as long as the context."""

    def __init__(self, windows: NearWindows | None = None) -> None:
        ggml.check_layout()
        self._windows = windows
        self.nodes = TakenNodes("attention", self._make_job)
        self._attention = ggml.op_code("FLASH_ATTN_EXT")
        self._spans: dict[Any, tuple[Span, ...]] = {}
        self._scratch = Scratch()

    def see(self, node: int) -> None:
        """Take the node over if it is covered; called before llama.cpp computes a graph with this node.

        Raises:
            NodeError: the near window in use applies to it, and cannot be computed.
        """
        self._spans.clear()  # a new graph has a new mask in the same place
        if ggml.WORDS[(node >> 2) + ggml.OP_INDEX] != self._attention:
            return
        needs_window = self._windows is not None and self._windows.needed(node)
        if needs_window and self.windowed(node) is None:
            raise NodeError("this attention cannot be computed with a near window")
        if covers(node) and (needs_window or has_work(node)):
            self.nodes.take(node)

    def windowed(self, node: int) -> int | None:
        """Return the ROPE node behind an attention node's queries if a near window can be computed there, or None."""
        return self._windows.windowed(node) if self._windows is not None and covers(node) else None

    def _make_job(self, address: int, n_threads: int) -> Job:
        node = Node(address, None if self._windows is None else self._windows.of(address))
        if node.n_rows < MIN_ROWS:
            return TokenJob(node, n_threads, self._spans, self._scratch)
        return PromptJob(node, n_threads, self._spans, self._scratch)


def covers(node: int) -> bool:
    """Whether a FLASH_ATTN_EXT node can be computed here exactly."""
    tensor, params = ggml.tensor_at(node), ggml.attention_params(node)
    if params.max_bias != 0.0 or params.logit_softcap != 0.0:
        return False
    q, k, v = (ggml.tensor_at(source) for source in tensor.src[:3])
    if q.type != 0 or k.ne[2] != v.ne[2] or k.ne[3] != q.ne[3] or q.ne[2] % k.ne[2]:
        return False
    if tensor.src[3] is not None:
        mask = ggml.tensor_at(tensor.src[3])
        if mask.type != 1 or mask.ne[2] != 1 or mask.ne[0] != k.ne[1] or mask.ne[1] < q.ne[1]:
            return False
    return all(_is_cells(x) for x in (k, v))


def has_work(node: int) -> bool:
    """Whether a FLASH_ATTN_EXT node has so much work that it is computed faster here than by llama.cpp."""
    q, k, v = (ggml.tensor_at(source) for source in ggml.tensor_at(node).src[:3])
    return bool(q.ne[1] >= MIN_ROWS or k.ne[1] * k.ne[2] * (k.ne[0] + v.ne[0]) >= MIN_FLOATS)


def _is_cells(tensor: ggml.TensorStruct) -> bool:
    """Whether a tensor's type and strides can be read here: any strides of plain numbers, packed cells of blocks."""
    if tensor.type in ggml.PLAIN_FLOATS:
        return bool(tensor.nb[0] == (4 if tensor.type == 0 else 2))
    if not ggml.is_blocks(tensor.type):
        return False
    head = ggml.row_bytes(tensor)
    return bool((tensor.ne[2] == 1 or tensor.nb[2] == head) and tensor.nb[1] == head * tensor.ne[2])
