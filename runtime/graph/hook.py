"""The graph callback: llama.cpp shows each node before it computes, and we have it seen by those who set nodes.

An exception inside it (Ctrl-C among them) cannot cross C code: it is kept, the graph is stopped, and `raise_kept`
raises it on the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import llama_cpp

from . import ggml

Handler = Callable[[int], None]
"""Given the address of a node that is about to be computed, sets what the node reads, or what it does."""


class GraphHook:
    """What is done at which operations of one context's graphs; keep it alive as long as the context.

    `callback` is the ctypes function for `llama_context_params.cb_eval`, `handlers` go by ggml's operation names.
    """

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        ggml.check_layout()
        self._handlers = {ggml.op_code(name): handler for name, handler in handlers.items()}
        self._shift_handlers: dict[int, Handler] = {}
        self._get_rows = ggml.op_code("GET_ROWS")
        self._stopping = False
        self._kept: BaseException | None = None
        self._reading = True
        """Nothing but `handlers` is to be done: no pass over the cache is on and no exception is waiting."""
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._make_callback())

    @contextmanager
    def stopping_tokens(self, handlers: Mapping[str, Handler]) -> Iterator[None]:
        """While the block runs, a K-shift graph's nodes go to `handlers`, and a token's graph is stopped at once."""
        self._shift_handlers = {ggml.op_code(name): handler for name, handler in handlers.items()}
        self._stopping, self._reading = False, False
        try:
            yield
        finally:
            self._stopping, self._reading = False, self._kept is None

    def raise_kept(self) -> None:
        """Raise what was raised inside the callback since the last time, if anything was."""
        kept, self._kept = self._kept, None
        self._reading = True
        if kept is not None:
            raise kept

    def _make_callback(self) -> ggml.GraphCallback:
        # Called for each of some thousand nodes a token: look at the op code first and leave at once. The names are
        # bound here since a local is read faster than an attribute.
        words, op_index, handlers = ggml.WORDS, ggml.OP_INDEX, self._handlers

        def see(node: int, ask: bool, _: int | None) -> bool:
            if self._reading and words[(node >> 2) + op_index] not in handlers:
                return False
            return self._see_closely(node, ask)

        return see

    def _see_closely(self, node: int, ask: bool) -> bool:
        try:
            op = ggml.WORDS[(node >> 2) + ggml.OP_INDEX]
            if self._reading:
                self._handlers[op](node)
                return False
            # A token's graph begins with a GET_ROWS and a K-shift graph has none. Stopping is to say that the one node
            # asked about is needed, and then that it was enough.
            self._stopping = self._stopping or op == self._get_rows
            if self._stopping or self._kept is not None:
                return ask
            if op in self._shift_handlers:
                self._shift_handlers[op](node)
            return False
        except BaseException as error:
            self._kept, self._reading = error, False
            return ask
