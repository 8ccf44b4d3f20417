"""What of a graph is computed faster by us than by llama.cpp: attention over a long cache, products of many rows.

torch, which does the computing, takes seconds to import: only a model that is loaded to run this way brings it in.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from . import ggml
from .hook import Handler

if TYPE_CHECKING:
    from .attention import FastAttention
    from .products import FastProducts


def switched_off() -> bool:
    """Whether the environment's ROPEWALK_FAST_PREFILL says no."""
    return os.environ.get("ROPEWALK_FAST_PREFILL", "1").strip().lower() in ("0", "off", "no", "false")


class FastNodes:
    """The nodes of one context's graphs that are ours; keep it alive as long as the context."""

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
        """Whether a node could not be computed, so that the graph is to be given up."""
        return self.attention.nodes.failure is not None or self.products.nodes.failure is not None

    def raise_kept(self) -> None:
        """Raise what went wrong on ggml's threads since the last time, if anything did.

        Raises:
            NodeError: names the node.
        """
        for nodes in (self.attention.nodes, self.products.nodes):
            nodes.raise_kept()

    def working(self) -> AbstractContextManager[None]:
        """While the block decodes, torch leaves the cores to ggml's threads."""
        from .takeover import workers_are_ggmls

        return workers_are_ggmls()
