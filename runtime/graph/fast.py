"""Nodes that are computed faster here than by llama.cpp: attention over cached cells, products of many rows.

The native kernels compute them; where these were not compiled, torch does. It takes seconds to import, and is imported
only then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from . import ggml
from .hook import Handler, NodeError
from .kernels import Context, NearWindow

if TYPE_CHECKING:
    from .attention import FastAttention
    from .near_window import NearWindows
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

    def windowed(self, node: int) -> int | None:
        """Return the ROPE node behind an attention node's queries if a near window can be computed there, or None."""
        return self._kernels.windowed(node)

    def use_window(self, window: NearWindow | None) -> None:
        """Compute attention with a near window from the next graph on, or without one."""
        self._kernels.use_window(window)

    def reset_positions(self) -> None:
        """Take each cached cell to be at the position of its number, as after a sequence was restored."""
        self._kernels.reset_positions()

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

    def __init__(self, applies: Callable[[int], bool] | None = None) -> None:
        """`applies` tells the ROPE nodes that rotate by λ."""
        ggml.check_layout()
        from .attention import FastAttention
        from .near_window import NearWindows
        from .products import FastProducts

        self.windows: NearWindows | None = NearWindows(applies) if applies is not None else None
        self.attention: FastAttention = FastAttention(self.windows)
        self.products: FastProducts = FastProducts()
        self.handlers: dict[str, Handler] = {
            "FLASH_ATTN_EXT": self.attention.see,
            "CUSTOM": self.attention.see,
            "MUL_MAT": self.products.see,
        }
        if self.windows is not None:
            self.handlers |= {"ROPE": self.windows.see_rope, "SET_ROWS": self.windows.see_write}

    @property
    def failed(self) -> bool:
        """Whether a node could not be computed, so that the graph must be aborted."""
        return self.attention.nodes.failure is not None or self.products.nodes.failure is not None

    @property
    def taken(self) -> int:
        """Nodes computed so far."""
        return self.attention.nodes.taken + self.products.nodes.taken

    def windowed(self, node: int) -> int | None:
        """Return the ROPE node behind an attention node's queries if a near window can be computed there, or None."""
        return self.attention.windowed(node)

    def use_window(self, window: NearWindow | None) -> None:
        """Compute attention with a near window from the next graph on, or without one."""
        if self.windows is not None:
            self.windows.window = window

    def reset_positions(self) -> None:
        """Take each cached cell to be at the position of its number, as after a sequence was restored."""
        if self.windows is not None:
            self.windows.reset_positions()

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
