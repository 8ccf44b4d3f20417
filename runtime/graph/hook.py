"""The graph callback: llama.cpp reports each node before it is computed, and handlers set what it reads or does.

Where the kernels' library is there, the callback is native code (kernels/hook.c), which does what the handlers of a
token's graph do; the callback in Python then sees nodes only while the cache is rotated. Otherwise it sees all of them.

An exception inside it (Ctrl-C among them) cannot cross C code: it is kept, the graph is stopped, and `raise_kept`
raises it after the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import llama_cpp

from . import ggml
from .kernels import Context

Handler = Callable[[int], None]
"""Called with the address of a node about to be computed; sets what the node reads, or what it does."""


class NodeError(RuntimeError):
    """A node could not be computed; names the node. No result of its graph is used."""


class GraphHook:
    """Handlers for operations of one context's graphs; keep it alive as long as the context.

    `callback` and `userdata` are for `llama_context_params`; the keys of `handlers` are ggml's operation names. With
    `kernels`, these look at a token's graph in place of the handlers: they have been told what to do (`Context.watch`).
    """

    def __init__(self, handlers: Mapping[str, Handler], kernels: Context | None = None) -> None:
        ggml.check_layout()
        self._kernels = kernels
        self._handlers = {ggml.op_code(name): handler for name, handler in handlers.items()}
        self._shift_handlers: dict[int, Handler] = {}
        self._survey_handlers: dict[int, Handler] = {}
        self._get_rows = ggml.op_code("GET_ROWS")
        self._stopping = False
        self._kept: BaseException | None = None
        self._reading = True
        """Only `handlers` are to be called: no pass over the cache is under way and no exception is kept."""
        self._python = llama_cpp.ggml_backend_sched_eval_callback(self._make_callback())
        if kernels is None:
            self.callback, self.userdata = self._python, None
        else:
            self.callback = llama_cpp.ggml_backend_sched_eval_callback(kernels.see)
            self.userdata = kernels.address

    @contextmanager
    def surveying(self, handlers: Mapping[str, Handler]) -> Iterator[None]:
        """While the block runs, pass the nodes of a token's graph to `handlers` instead, all before one is computed."""
        self._survey_handlers = {ggml.op_code(name): handler for name, handler in handlers.items()}
        self._set_reading(False)
        try:
            yield
        finally:
            self._survey_handlers = {}
            self._set_reading(self._kept is None)

    @contextmanager
    def stopping_tokens(self, handlers: Mapping[str, Handler]) -> Iterator[None]:
        """While the block runs, pass a K-shift graph's nodes to `handlers`, and stop a token's graph at once."""
        self._shift_handlers = {ggml.op_code(name): handler for name, handler in handlers.items()}
        self._stopping = False
        self._set_reading(False)
        try:
            yield
        finally:
            self._stopping = False
            self._set_reading(self._kept is None)

    def raise_kept(self) -> None:
        """Raise the exception kept inside the callback since the last call, if any."""
        kept, self._kept = self._kept, None
        if not self._reading:
            self._set_reading(True)
        if kept is not None:
            raise kept

    def _set_reading(self, reading: bool) -> None:
        self._reading = reading
        if self._kernels is not None:
            self._kernels.watch_closely(None if reading else self._python)

    def _make_callback(self) -> ggml.GraphCallback:
        # Called for some thousand nodes per token: check the op code first and return at once. The names are bound here
        # because a local is read faster than an attribute.
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
            if self._survey_handlers and self._kept is None:
                self._survey_handlers.get(op, _leave)(node)
                return False
            # A token's graph starts with a GET_ROWS; a K-shift graph has none. To stop a graph, answer True when asked
            # whether a node is needed, and False once it has been computed.
            self._stopping = self._stopping or op == self._get_rows
            if self._stopping or self._kept is not None:
                return ask
            if op in self._shift_handlers:
                self._shift_handlers[op](node)
            return False
        except BaseException as error:
            self._kept = error
            self._set_reading(False)
            return ask


def _leave(_: int) -> None:
    """Do nothing with a node."""
