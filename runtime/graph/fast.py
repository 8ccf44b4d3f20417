"""Nodes that are computed faster here than by llama.cpp: attention over cached cells, products of many rows.

The native kernels compute them; where these were not compiled, torch does. It takes seconds to import, and is imported
only then.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from . import ggml
from .hook import Handler, NodeError
from .kernels import Context

if TYPE_CHECKING:
    from .attention import FastAttention
    from .products import FastProducts


def switched_off() -> bool:
    """Whether the environment variable ROPEWALK_FAST_PREFILL turns this off."""
    return os.environ.get("ROPEWALK_FAST_PREFILL", "1").strip().lower() in ("0", "off", "no", "false")


class NativeNodes:
    """Nodes of one context's graphs that `kernels` take over and compute."""

    def __init__(self, kernels: Context) -> None:
        self._kernels = kernels
        self.handlers: dict[str, Handler] = {}
        """None: the kernels see the nodes themselves."""

    @property
    def failed(self) -> bool:
        """Whether a node could not be computed, so that the graph must be aborted."""
        return bool(self._kernels.failure)

    @property
    def taken(self) -> int:
        """Nodes computed so far."""
        return self._kernels.taken

    def raise_kept(self) -> None:
        """Raise the failure on one of ggml's threads since the last call, if any.

        Raises:
            NodeError: names the node.
        """
        failure = self._kernels.failure
        if failure:
            self._kernels.forgive()
            raise NodeError(f"node {failure}")

    def working(self) -> AbstractContextManager[None]:
        """Return a context in which a graph is computed: nothing needs to be set."""
        return nullcontext()


class TorchNodes:
    """Takes over nodes of one context's graphs, and computes them in torch; keep it alive as long as the context."""

    def __init__(self) -> None:
        ggml.check_layout()
        from .attention import FastAttention
        from .products import FastProducts

        self.attention: FastAttention = FastAttention()
        self.products: FastProducts = FastProducts()
        self.handlers: dict[str, Handler] = {
            "FLASH_ATTN_EXT": self.attention.see,
            "CUSTOM": self.attention.see,
            "MUL_MAT": self.products.see,
        }

    @property
    def failed(self) -> bool:
        """Whether a node could not be computed, so that the graph must be aborted."""
        return self.attention.nodes.failure is not None or self.products.nodes.failure is not None

    @property
    def taken(self) -> int:
        """Nodes computed so far."""
        return self.attention.nodes.taken + self.products.nodes.taken

    def raise_kept(self) -> None:
        """Raise the exception kept on ggml's threads since the last call, if any.

        Raises:
            NodeError: names the node.
        """
        for nodes in (self.attention.nodes, self.products.nodes):
            nodes.raise_kept()

    def working(self) -> AbstractContextManager[None]:
        """While the block runs, torch leaves the cores to ggml's threads."""
        from .takeover import torch_on_one_thread

        return torch_on_one_thread()


FastNodes = NativeNodes | TorchNodes
