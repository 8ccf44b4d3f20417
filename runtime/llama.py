"""`ropewalk.Llama`: a `llama_cpp.Llama` that runs with a rescale schedule.

Same constructor and methods. In addition, every sequence runs in the smallest band that holds it and moves up, or back
down, by rotating the cached keys; the first n̂ tokens keep the model's own factors; memory is planned before it is
allocated; reading a long prompt reports its progress and can be interrupted at any time.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, TypeVar

import llama_cpp
import numpy as np
from llama_cpp.llama import LlamaState as StockState
from llama_cpp.llama_tokenizer import LlamaTokenizer

from ..container import check_has_tensors, freq_scale, read_header
from ..errors import UserError
from ..factors import Band, Schedule, check_matches, without_windows
from . import log, memory
from .cached_keys import CachedKeys
from .graph.admission import Verdict, check_engine
from .graph.fast import FastNodes, NativeNodes, TorchNodes, switched_off
from .graph.hook import GraphHook, Handler
from .graph.kernels import Context as Kernels
from .graph.kernels import why_missing
from .graph.rope import BandChange, RopeHook, plan_rotations
from .graph.spans import Span, add_span, read_before, rotatable, rotated
from .interrupt import Closed, Interruptible, holds_context
from .loading import (
    WeightsKey,
    alphabet_of,
    check_context,
    check_loadable,
    check_special_tokens,
    context_length,
    has_cells,
    import_torch,
    keys_can_shift,
    leave_out_gpu,
    resolve_schedule,
    take_overrides,
    thread_count,
    whole_number,
)
from .losses import Logits, Predicted, Scored
from .prompts.chat_formatter import chat_handlers
from .prompts.control_tokens import CUT_BYTES, ControlSpellings, text_of
from .prompts.rendering import check_templates
from .repacking import may_repack
from .threads import FreeCores, default_threads

Rows = TypeVar("Rows", Scored, Predicted)
_logger = logging.getLogger("ropewalk")

PROMPT_ROWS = 32  # a decode of at least so many tokens takes long enough that Ctrl-C should abort it

TOO_LONG = re.compile(r"(Requested tokens \(\d+\) exceed context window of )\d+")
"""llama_cpp's refusal of a prompt, which servers look for."""


ONE_AXIS_ROPES = (-1, 0, 2)  # LLAMA_ROPE_TYPE_NONE, NORM and NEOX: a cached cell has one position

FEW = 8
"""Cached tokens are read again when their band changes if so many times as many are to be read anyway: it costs little,
and a document is then read as if its instructions had not been read in another document's band before."""


class LlamaState(StockState):
    """llama_cpp's saved state, with the band its keys are in, how they came to it, and the model's `weights_key`."""

    band: Band
    spans: tuple[Span, ...]
    weights_key: str


class StateMismatch(UserError, KeyError):
    """A saved state that this model cannot take up: a miss to llama_cpp's completions, which catch KeyError."""

    __str__ = Exception.__str__  # KeyError's puts the message in quotes


class Llama(llama_cpp.Llama):
    """A model, its context, and the schedule it runs with.

    Args beyond llama_cpp's:
        schedule: the bands to run with, or the path of their JSON; default: the file's own (its `ropewalk.` schedule,
            or the equivalent of its scaling).
        kv: cache type: "f16", "q8_0", "q4_0", …, "K:V" for one each, or "auto" for the most exact that fits.
            Default: llama_cpp's `type_k` and `type_v`.
        n_ctx: as in llama_cpp; 0 = as long as the last band.
        flash_attn: None = on, as attention is computed by our own kernels; without these (not compiled, or fast_prefill
            off) and over f32, which llama.cpp casts to f16 then, on if the cache is quantised.
        fast_prefill: with flash attention, compute attention and matrix products here (see `graph.fast`); the
            environment variable ROPEWALK_FAST_PREFILL=0 also turns it off.
        exact: there, compute in floats where bfloat16 or whole numbers would be faster; the default is what the
            environment variable ROPEWALK_EXACT says.
        n_threads, n_threads_batch: default: the physical cores that this process may use.

    Attributes:
        plan: the `MemoryPlan` it was loaded with.
        band: the band that the cached keys are in.
        on_progress: called with (tokens read, tokens to read) while a prompt is read.
        on_band_change: called with a `BandChange` after each change.
        rotates_back: whether keys are rotated when a sequence goes back to a shorter band; see below.

    What is computed depends on how the cached tokens were read, as it does in llama_cpp wherever a prompt's start is
    reused: in other batches, and here with keys that have been to another band and back, the last bits differ, and at
    temperature 0 an answer may turn out differently. `reset()` before a prompt gives the answer of a fresh model, and
    `rotates_back = False` has tokens read again on the way back, so that no trace of the longer band is left. (Those
    that were read in the longer band always are.)

    Raises:
        UserError: not a GGUF file, an architecture without RoPE, a schedule for another model, a context that
            the last band does not hold, or too little memory; nothing has been loaded then.
    """

    n_tokens: int
    on_progress: Callable[[int, int], None] | None = None
    on_band_change: Callable[[BandChange], None] | None = None
    rotates_back: bool = True

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        schedule: Schedule | str | os.PathLike[str] | None = None,
        kv: str | None = None,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        logits_all: bool = False,
        flash_attn: bool | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        fast_prefill: bool = True,
        exact: bool | None = None,
        **options: Any,
    ) -> None:
        leave_out_gpu(options)
        header = take_overrides(read_header(model_path), options)
        if not options.get("vocab_only"):
            check_has_tensors(header)
        fast_prefill = fast_prefill and not switched_off()
        n_ctx = context_length(n_ctx)
        self._exact = exact
        self._schedule, hooked = resolve_schedule(header, schedule, n_ctx, options)
        self._rope = RopeHook(self._schedule.facts, freq_scale(header)) if hooked else None
        self._requested_ctx = check_context(n_ctx, self._schedule)
        n_batch = min(whole_number("n_batch", n_batch, 1, "a number of tokens"), self._requested_ctx)
        n_ubatch = min(whole_number("n_ubatch", n_ubatch, 1, "a number of tokens"), n_batch)
        n_threads = thread_count("n_threads", n_threads, default_threads())
        n_threads_batch = thread_count("n_threads_batch", n_threads_batch, default_threads())
        logits_all = bool(logits_all) or options.get("draft_model") is not None
        if kv is not None and (type_k, type_v) != (None, None):
            raise UserError("kv: give either kv or type_k and type_v, not both")
        check_loadable(header, bool(options.get("vocab_only")))
        if options.get("lora_path"):
            options["lora_path"] = os.fspath(options["lora_path"])
        self._weights = WeightsKey(header, options)
        self._alphabet = alphabet_of(header)
        self.plan = memory.choose_kv(
            header,
            self._requested_ctx,
            kv or f"{memory.type_name('type_k', type_k)}:{memory.type_name('type_v', type_v)}",
            flash_attn=flash_attn,
            fast_prefill=fast_prefill,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            logits_all=logits_all,
            bands=len(self._schedule.bands),
            near_windows=any(band.near_tokens for band in self._schedule.bands),
            n_threads=max(n_threads, n_threads_batch),
        )
        check_templates(header)
        engine = Verdict() if options.get("vocab_only") else check_engine()  # before ggml is touched
        fast_prefill = fast_prefill and self.plan.flash_attn
        native = (hooked or fast_prefill) and engine.kernels and not why_missing()
        self._kernels = Kernels(exact=exact) if native else None
        self._fast = self._make_fast_nodes() if fast_prefill else None
        self._graph = self._make_graph_hook()
        ours = fast_prefill and self._kernels is not None and not options.get("vocab_only")
        self._extra_buffers = (
            engine.extra_buffers
            and not (ours and self._kernels is not None and self._kernels.exact)  # llama.cpp's round the activations
            and may_repack(header, ours=ours, n_threads=n_threads, n_threads_batch=n_threads_batch)
        )
        self.band = self._schedule.bands[0]
        self._spans: tuple[Span, ...] = ()
        self._free_cores, self._threads_in_use = FreeCores(), n_threads
        self._verified = not hooked
        fast = self._fast  # not self: a model that holds itself would not be freed with its last reference
        self._calls = Interruptible(lambda: fast is not None and fast.failed, self._kernels)
        options.setdefault("swa_full", True)  # keys can be rotated, and tokens removed, only in a cache without gaps
        log.listen()
        try:
            super().__init__(
                str(model_path),
                n_ctx=self._requested_ctx,
                n_batch=n_batch,
                n_ubatch=n_ubatch,
                n_threads=n_threads,
                n_threads_batch=n_threads_batch,
                logits_all=logits_all,
                flash_attn=self.plan.flash_attn,
                type_k=memory.ggml_type(self.plan.type_k),
                type_v=memory.ggml_type(self.plan.type_v),
                **options,
            )
        except (ValueError, RuntimeError) as error:  # the latter for an adapter
            raise UserError(f"{model_path}: llama.cpp cannot run it: {log.first_error(str(error))}") from None
        check_special_tokens(model_path, self._model.vocab)
        eos = (self.token_eos(), self._text_of(self.token_eos()))
        self._chat_handlers |= chat_handlers(self.metadata, eos, self._text_of(self.token_bos()))
        if options.get("lora_path") and not self._lora_adapter:  # llama_cpp takes a null pointer for an adapter
            raise UserError(f"{options['lora_path']}: not an adapter for this model: {log.first_error('refused')}")
        self._keys: CachedKeys | None = None
        if not options.get("vocab_only"):
            self._keys = self._find_keys(keys_can_shift(header, self._schedule.facts.n_rot, self.plan.type_k))
            self._schedule = self._servable(self._schedule)
            self.band = self._schedule.bands[0]

    # llama_cpp.Llama assigns `model_params` once, before it loads the model.

    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        if not self._extra_buffers:
            params.use_extra_bufts = False
        self._model_params = params

    # llama_cpp.Llama assigns `context_params` once, before it creates the context: the callback is set there.

    @property
    def context_params(self) -> Any:
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        if self._graph is not None:
            params.cb_eval, params.cb_eval_user_data = self._graph.callback, self._graph.userdata
        self._context_params = params

    def _make_fast_nodes(self) -> FastNodes:
        if self._kernels is not None:
            return NativeNodes(self._kernels)
        import_torch()
        return TorchNodes(self._rope.applies if self._rope is not None else None)

    def _make_graph_hook(self) -> GraphHook | None:
        if self._rope is None and self._fast is None:
            return None
        handlers: dict[str, Handler] = dict(self._fast.handlers) if self._fast is not None else {}
        if self._rope is not None:
            handlers["ROPE"] = _in_turn(self._rope.set_rope, handlers.get("ROPE"))
        if self._kernels is not None:
            self._kernels.watch(None if self._rope is None else self._rope.setting, nodes=self._fast is not None)
        return GraphHook(handlers, self._kernels)

    def _find_keys(self, can_shift: bool) -> CachedKeys | None:
        """Return what rotates the cached keys, if λ is set here, having looked where they lie."""
        if self._rope is None or self._graph is None:
            return None
        parts = (self._ctx, self._batch, self._calls, self._graph, self._rope, self._fast, self._kernels)
        keys = CachedKeys(*parts, n_threads=self.n_threads_batch, can_shift=can_shift)
        if self._has_memory:
            # llama.cpp gives the callback to its scheduler with the first token, not before.
            if self._kernels is None:
                keys.run_stopped(0)
            else:
                keys.survey(0)
        return keys

    # --- what it runs with

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    @property
    def band(self) -> Band:
        """The band that the cached keys are in; others who call `llama_decode` on `ctx` get its factors, too."""
        return self._band

    @band.setter
    def band(self, band: Band) -> None:
        self._band = band
        if self._rope is not None:
            self._rope.use_band(band)

    @property
    def band_index(self) -> int:
        """Index in the schedule of the band that the cached keys are in."""
        return self._schedule.bands.index(self.band)

    @holds_context
    def set_schedule(self, schedule: Schedule) -> None:
        """Run with another schedule from now on; cached keys are rotated to it.

        Raises:
            UserError: it is for another model, or too short for the cached tokens.
        """
        if self._rope is None:
            raise UserError("schedule: this model runs with llama.cpp's own rope options")
        check_matches(schedule, self._schedule.facts, "schedule")
        schedule = self._servable(schedule)
        index = schedule.band_index(self.n_tokens)
        if self.n_tokens:  # an encoder has no cache
            self.drop_rolled_back()
        old = self._schedule
        self._schedule = schedule
        self._n_ctx = self.n_ctx()
        try:
            self._move_to(schedule.bands[index], _index_of(old, self.band), index, self.n_tokens)
        except BaseException:
            self._forget()
            raise

    def _servable(self, schedule: Schedule) -> Schedule:
        """Return `schedule`, without its near windows where attention cannot be computed with them, and say so."""
        if not any(band.near_tokens for band in schedule.bands):
            return schedule
        in_torch = self._fast is not None and self._kernels is None and self._has_memory
        if self._keys is not None and in_torch and not self._keys.serves_windows:
            self._keys.survey(self.n_tokens)  # with the kernels, this was done when the model was loaded
        if self.serves_near_windows:
            return schedule
        _logger.warning("%s: it runs without its schedule's near window, with the plain factors: %s", *self._no_windows)
        return without_windows(schedule)

    @property
    def _no_windows(self) -> tuple[str, str]:
        why = (
            "attention is left to llama.cpp" if self._fast is None else "this model's attention does not allow for one"
        )
        return str(self.model_path), why

    @property
    def serves_near_windows(self) -> bool:
        """Whether a band's near window is computed; if not, the plain band for its context is used in its place."""
        return self._keys is not None and self._keys.serves_windows

    def n_ctx(self) -> int:
        """Return the most tokens that a sequence may have: those requested, and no more than the last band holds."""
        return min(int(super().n_ctx()), self._requested_ctx, self._schedule.context)

    @property
    def runs_by_schedule(self) -> bool:
        """Whether the schedule sets rope; otherwise llama.cpp rotates by its own options."""
        return self._rope is not None

    @property
    def fast_prefill(self) -> bool:
        """Whether long prompts are computed by `graph.fast`."""
        return self._fast is not None

    @property
    def computed_by(self) -> str:
        """What computes long prompts: "llama.cpp", "torch", or an instruction set of the kernels; "exact" behind it."""
        if self._fast is None:
            return "llama.cpp"
        if self._kernels is None:
            return "torch"
        return self._kernels.instructions.name + (" exact" if self._kernels.exact else "")

    @property
    def nodes_taken(self) -> int:
        """How many nodes of llama.cpp's graphs have been computed by us so far."""
        return 0 if self._fast is None else self._fast.taken

    @property
    def kv_type(self) -> str:
        return self.plan.kv_type

    @property
    def cache_bytes(self) -> int:
        return self.plan.cache_bytes

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary, for its functions that take one."""
        return self._model.vocab

    # --- the cached sequence

    @property
    def tokens(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The cached tokens, shape ``(n_tokens,)``; a copy."""
        return np.array(self.input_ids[: self.n_tokens], dtype=np.int32)

    @property
    def can_rewind(self) -> bool:
        """Whether single tokens can be removed from the cache; a recurrent state can only be reset."""
        return not (self._is_recurrent or self._is_hybrid)

    @holds_context
    def rewind(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` of the cached sequence and drop what comes after them, with its logits.

        Raises:
            UserError: there are fewer, or this model's state cannot be rewound.
        """
        if not 0 <= n_tokens <= self.n_tokens:
            raise UserError(f"rewind: {n_tokens:,} tokens, expected 0 to the {self.n_tokens:,} cached")
        if n_tokens == self.n_tokens:
            return
        if not self.can_rewind:
            raise UserError("rewind: a recurrent model's state cannot be rewound, use reset()")
        self.n_tokens = n_tokens
        self._requires_eval = True
        self.drop_rolled_back()

    def reset(self) -> None:
        """Forget the sequence; the next one starts with the first band's factors, also where others decode it."""
        super().reset()
        if self._rope is not None:
            self._rope.use_band(self._schedule.bands[0])

    @property
    def draft_model(self) -> Any:
        """llama_cpp's draft model for speculative decoding; what it drafts past the end of a band is cut off.

        Drafts are often rejected: keys would be rotated to the next band for them, and back again.
        """
        return None if self._draft_model is None else partial(_draft, self._draft_model, self._schedule)

    @draft_model.setter
    def draft_model(self, model: Any) -> None:
        self._draft_model = model

    # --- reading tokens

    @holds_context
    def eval(self, tokens: Sequence[int]) -> None:
        """Read `tokens` after those already in the cache, in the smallest band that holds them all.

        Raises:
            UserError: they do not fit; nothing has been read then.
        """
        self._read(list(tokens))

    @holds_context
    def token_losses(
        self, tokens: Sequence[int], start: int = 1, targets: Sequence[int] | None = None
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the negative log-likelihood of each of ``tokens[start:]``, in nats, shape ``(n - start,)``.

        With `targets`, ascending positions in `tokens`, only of those tokens, shape ``(len(targets),)``. The cache is
        reused as far as it holds the same tokens, and afterwards holds all tokens before the last one scored.
        """
        return self._scored(Scored, tokens, start, targets).losses()

    @holds_context
    def token_logits(self, tokens: Sequence[int], start: int = 1) -> Logits:
        """Return the logits by which each of ``tokens[start:]`` is predicted, shape ``(n - start, vocabulary)``.

        The cache is used as by `token_losses`.
        """
        return self._scored(Predicted, tokens, start, None).logits()

    def _scored(self, kind: type[Rows], tokens: Sequence[int], start: int, targets: Sequence[int] | None) -> Rows:
        """Read `tokens`, and keep of the logits before the targets what `kind` keeps."""
        tokens, wanted = list(tokens), np.arange(start, len(tokens)) if targets is None else np.asarray(targets)
        if not len(wanted) or wanted[0] < 1 or wanted[-1] >= len(tokens) or (np.diff(wanted) < 1).any():
            raise UserError(f"start: {start}, expected 1 to {len(tokens) - 1}, and ascending targets in that range")
        first, last = int(wanted[0]) - 1, int(wanted[-1])
        same = self.longest_token_prefix(self._input_ids[:first].tolist(), tokens)
        self.n_tokens = same
        # One band for the whole text, settled here: the loss is that of the band that holds it all.
        self._make_room(last - same)
        self._read(tokens[same:first], settled=True)
        scored = kind(np.asarray(tokens), wanted, first)
        self._read(tokens[first:last], settled=True, scored=scored)
        return scored

    def _read(self, tokens: list[int], *, settled: bool = False, scored: Scored | Predicted | None = None) -> None:
        if not settled:
            self._make_room(len(tokens))
        done = 0
        while done < len(tokens):
            stop = min(done + self.n_batch, len(tokens))
            before = self._use_factors()
            if before > 0:  # start tokens are a batch of their own, with the model's own factors
                stop = min(stop, done + before)
            self._decode(tokens[done:stop], scored)
            done = stop
            if self.on_progress is not None and len(tokens) >= PROMPT_ROWS:
                self.on_progress(done, len(tokens))
        self._use_factors()

    def _use_factors(self) -> int:
        """Set the factors of the next token; return how many start tokens, which all have these, are left to read."""
        before = self.band.start_tokens - self.n_tokens
        if self._rope is not None:
            factors = self._schedule.facts.start_factors if before > 0 else self.band.rescale_factors
            self._rope.use(factors, self.band.attention_factor)
        return before if self._rope is not None else 0

    def _make_room(self, n_new: int) -> None:
        """Drop cached cells past `n_tokens`, check that `n_new` tokens fit, and move to the band that holds all."""
        total = self.n_tokens + n_new
        if total > self.n_ctx():
            raise UserError(
                f"{total:,} tokens are more than the context of {self.n_ctx():,}"
                f" (the model's last band holds {self._schedule.context:,})"
            )
        self.drop_rolled_back()
        if self._window_is_lost():
            self._read_again()
        index = self._schedule.band_index(max(total, 1))
        band, old_index = self._schedule.bands[index], _index_of(self._schedule, self.band)
        if band != self.band:
            higher = self._schedule.bands[index + 1 :]
            keep = read_before(self._spans, self.n_tokens, higher)
            if self.n_tokens * FEW <= n_new or (self.band in higher and not self.rotates_back):
                keep = 0
            self._move_to(band, old_index, index, keep)

    def _use_free_cores(self) -> None:
        n_threads = self._free_cores.threads(self.n_threads)
        if n_threads != self._threads_in_use:
            self._threads_in_use = n_threads
            llama_cpp.llama_set_n_threads(self._ctx.ctx, n_threads, self.n_threads_batch)

    def _decode(self, tokens: list[int], scored: Scored | Predicted | None = None) -> None:
        """Run one llama_decode; after a failure the cache is as it was before, or empty if it computed NaN."""
        n_past, n_new = self.n_tokens, len(tokens)
        self._batch.set_batch(batch=tokens, n_past=n_past, logits_all=self._logits_all)
        if scored is not None and not self._logits_all:
            wanted = np.ctypeslib.as_array(self._batch.batch.logits, shape=(n_new,))
            wanted[:] = 0
            wanted[scored.rows(n_new)] = 1
        n_rows = n_new if self._logits_all else 1 if scored is None else len(scored.rows(n_new))
        try:
            if n_new < PROMPT_ROWS:
                self._use_free_cores()
                self._calls.run(self._decode_batch)
            else:
                self._calls.run_long(self._decode_batch, self._ctx.ctx)
            self._raise_kept()
            self._verify()
            self._check_finite(n_rows)
        except BaseException:
            self.drop_rolled_back()
            if not self.can_rewind:
                self.reset()  # a recurrent state cannot be rewound
            self._raise_kept()  # the reason behind llama_decode's return code
            raise
        self.input_ids[n_past : n_past + n_new] = tokens
        if self._logits_all:
            self.scores[n_past : n_past + n_new, :] = self._logits(n_new)
        if scored is not None:
            rows = scored.rows(n_new)
            logits = self._logits(n_new)[rows] if self._logits_all else self._logits(len(rows))
            scored.take(n_new, rows, logits)
        self._spans = add_span(self._spans, n_past, self.band)
        self.n_tokens += n_new
        self._requires_eval = False

    def _logits(self, n_rows: int) -> Logits:
        """Return the last decode's logits, shape ``(n_rows, vocabulary)``, in llama.cpp's own memory."""
        if not n_rows:
            return np.empty((0, self._n_vocab), dtype=np.float32)
        return np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n_rows, self._n_vocab))

    def _check_finite(self, n_rows: int) -> None:
        """Check the last decode's logits: what is sampled from NaN or infinity is nonsense without a word."""
        # The largest one of a row is NaN if any is. (Minus infinity alone is how some models rule a token out.)
        if self._has_memory and not np.isfinite(self._logits(n_rows).max(axis=1)).all():
            self._forget()  # even a masked cell that holds NaN would spoil what is read later
            raise self._not_finite("logits")

    def _not_finite(self, what: str) -> UserError:
        return UserError(
            f"{self.model_path}: the model computes NaN or infinity as {what}, expected finite numbers: its weights or"
            f" its schedule are damaged, or a cache of type {self.kv_type} cannot hold its keys"
        )

    @property
    def _has_memory(self) -> bool:
        """Whether there is a cache; an encoder has none, and no logits."""
        return bool(llama_cpp.llama_get_memory(self._ctx.ctx))

    def _working(self) -> AbstractContextManager[None]:
        return nullcontext() if self._fast is None else self._fast.working()

    def _decode_batch(self) -> None:
        with self._working():
            self._ctx.decode(self._batch)

    def _raise_kept(self) -> None:
        """Raise the exception that llama.cpp's callbacks kept, if any, as they cannot raise it themselves."""
        for kept in (self._graph, self._fast):
            if kept is not None:
                kept.raise_kept()

    def _verify(self) -> None:
        """Check after the first decode that λ has reached at least one node; otherwise the model runs without it."""
        if not self._verified:
            assert self._rope is not None
            if not self._rope.touched:
                facts = self._schedule.facts
                raise UserError(
                    f"{self.model_path}: no ROPE node of this model has base {facts.freq_base:g} and {facts.n_rot}"
                    " dimensions: the schedule cannot be applied"
                )
            self._verified = True

    def drop_rolled_back(self) -> None:
        """Cut the cache to `n_tokens`: on a rollback, llama_cpp.Llama only changes that count."""
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)

    def _forget(self) -> None:
        self.n_tokens, self._spans = 0, ()
        self._requires_eval = True
        self._ctx.kv_cache_clear()

    # --- moving between bands

    def _move_to(self, band: Band, old_index: int, new_index: int, keep: int) -> None:
        """Run in `band` from now on: rotate the first `keep` keys to it, or fewer, and read the other tokens again."""
        old = self.band
        keys = self._keys
        if band == old or keys is None:
            return
        n_tokens, started = self.n_tokens, time.perf_counter()
        keep = min(keep, rotatable(self._spans, n_tokens, self.plan.type_k))
        try:
            if not plan_rotations(self._schedule.facts, old, band, n_tokens):
                keep = n_tokens
            elif not (self.can_rewind and keys.can_rotate()):
                keep = 0
            rest = self.input_ids[keep:n_tokens].tolist()
            if rest:
                self._cut(keep)
            rotations = plan_rotations(self._schedule.facts, old, band, keep)
            if not keys.rotate(rotations, keep):
                rest = self.input_ids[:n_tokens].tolist()
                self._forget()
            self._requires_eval = True
            times = min(1, len(rotations)) if keys.rotates_natively else len(rotations)
            self._spans = rotated(self._spans, times)
            self.band = band
            if rest:
                self._read(rest, settled=True)
        except BaseException:
            self._forget()  # partly rotated keys must never be read
            raise
        if n_tokens and self.on_band_change is not None:
            seconds = time.perf_counter() - started
            self.on_band_change(BandChange(old_index, new_index, old, band, n_tokens, seconds, bool(rest)))

    def _cut(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` of the cached sequence; a recurrent state can only be forgotten."""
        if n_tokens:
            self.n_tokens = n_tokens
            self.drop_rolled_back()
        else:
            self._forget()

    def _window_is_lost(self) -> bool:
        """Whether a rollback needs tokens of a sliding window that the cache no longer holds."""
        window = llama_cpp.llama_model_n_swa(self._model.model)
        if not window or not self.n_tokens or not self.can_rewind:
            return False
        oldest = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self._ctx.ctx), 0)
        return bool(oldest < 0 or oldest > max(0, self.n_tokens - window))

    def _read_again(self) -> None:
        tokens = self.input_ids[: self.n_tokens].tolist()
        self._forget()
        self._read(tokens, settled=True)

    @property
    def rotates_natively(self) -> bool:
        """Whether the kernels rotate cached keys; False leaves it to llama.cpp's K-shift, where that can do it."""
        return self._keys is not None and self._keys.rotates_natively

    @rotates_natively.setter
    def rotates_natively(self, native: bool) -> None:
        if self._keys is not None:
            self._keys.use_kernels = native

    # --- other methods of llama_cpp.Llama

    @holds_context
    def sample(self, *args: Any, **options: Any) -> int:
        return int(super().sample(*args, **options))

    @holds_context
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Return the tokens of a text, as in llama_cpp; a control token's spelling that was cut in two is only text.

        Raises:
            UserError: a SentencePiece vocabulary lacks a character and the bytes of it.
        """
        pieces = text.split(CUT_BYTES) if special else [text]
        lacking = self._alphabet.lacks(text) if self._alphabet is not None else None
        if lacking is not None:
            raise UserError(f"{self.model_path}: its vocabulary has no token for {lacking!a}, nor for its bytes")
        tokens = [token for i, piece in enumerate(pieces) for token in self._tokens(piece, add_bos and i == 0, special)]
        if llama_cpp.LLAMA_TOKEN_NULL in tokens:
            raise UserError(f"{self.model_path}: its vocabulary has no token for a part of the text")
        return tokens

    def _tokens(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        if type(self.tokenizer_) is not LlamaTokenizer:
            return list(super().tokenize(text, add_bos=add_bos, special=special))
        # llama_cpp's makes room for as many tokens as the model was trained for, gigabytes if the file says so.
        size = len(text) + 2
        for _ in range(2):
            found = (llama_cpp.llama_token * size)()
            n = llama_cpp.llama_tokenize(self.vocab, text, len(text), found, size, add_bos, special)
            if n >= 0:
                return list(found[:n])
            size = -n  # as many as it takes
        raise RuntimeError(f"llama.cpp did not tokenise {len(text):,} bytes")

    @holds_context
    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < self.n_vocab():  # llama.cpp would abort
            raise UserError(
                f"detokenize: tokens from {min(tokens):,} to {max(tokens):,}, expected 0 to {self.n_vocab() - 1:,}"
            )
        return bytes(super().detokenize(tokens, prev_tokens=prev_tokens, special=special))

    def create_chat_completion(self, messages: list[Any], *args: Any, **options: Any) -> Any:
        """Answer as in llama_cpp, except that the text of messages is never read as control tokens, and that a chat
        template of the model runs in a process of its own, within limits.

        Handlers for pictures, and those with a tokeniser of their own, get the messages as they are.
        """
        if self.chat_handler is None and not str(self.chat_format).startswith("functionary"):
            messages = self._spellings.cut_messages(messages)
        return super().create_chat_completion(messages, *args, **options)

    def _text_of(self, token: int) -> str:
        return "" if token == llama_cpp.LLAMA_TOKEN_NULL else text_of(self.vocab, token)

    @cached_property
    def _spellings(self) -> ControlSpellings:
        return ControlSpellings(self.vocab)

    def _create_completion(self, *args: Any, **options: Any) -> Iterator[Any]:
        try:
            yield from super()._create_completion(*args, **options)
        except ValueError as error:
            found = TOO_LONG.fullmatch(str(error))
            if found is None:
                raise
            raise UserError(f"{found[1]}{self.n_ctx()}") from None  # not llama.cpp's, which is rounded up

    @holds_context
    def embed(self, input: str | Iterable[str], normalize: bool = False, truncate: bool = True, **options: Any) -> Any:
        """Return embeddings as in llama_cpp, in the smallest band that holds the longest input.

        Raises:
            UserError: that band has start tokens, which a batch of several sequences cannot honour.
        """
        input = input if isinstance(input, str) else list(input)  # it is read twice
        texts = [input] if isinstance(input, str) else input
        longest = max((len(self.tokenize(text.encode())) for text in texts), default=1)
        self._forget()
        band = self._schedule.bands[self._schedule.band_index(max(1, min(longest, self.n_batch)))]
        if self._rope is not None:
            if band.start_tokens and band.rescale_factors != self._schedule.facts.start_factors:
                raise UserError(f"embed: the band has start_tokens {band.start_tokens}, expected 0 for embeddings")
            self.band = band
        stock = partial(super().embed, input, normalize=normalize, truncate=truncate, **options)

        def call() -> Any:
            with self._working():
                return stock()

        embeddings = self._calls.run(call)
        self._raise_kept()
        if not _all_finite(embeddings):
            raise self._not_finite("embeddings")
        return embeddings

    @holds_context
    def save_state(self) -> LlamaState:
        """Return the tokens, their keys and values, and the band they are in."""
        state: LlamaState = super().save_state()
        if not self._logits_all:
            state.scores = state.scores[:0]  # never written to without logits_all
        state.__class__ = LlamaState
        state.band, state.spans, state.weights_key = self.band, self._spans, self.weights_key
        return state

    @property
    def weights_key(self) -> str:
        """Digest of the weights and adapter that keys and values depend on; read from the file on first use."""
        return self._weights.value

    @holds_context
    def load_state(self, state: StockState) -> None:
        """Load a saved state, rotated to the band that holds it here.

        Raises:
            StateMismatch: a UserError: a state without a band (saved by another class), of another model or cache
                type, or with more tokens than fit here.
        """
        if not isinstance(state, LlamaState):
            raise StateMismatch("load_state: the state was not saved by ropewalk.Llama, its band is unknown")
        if getattr(state, "weights_key", None) != self.weights_key:
            raise StateMismatch("load_state: the state was saved by another model")
        if state.n_tokens > self.n_ctx():
            raise StateMismatch(f"load_state: {state.n_tokens:,} tokens are more than the context of {self.n_ctx():,}")
        data = (ctypes.c_uint8 * state.llama_state_size).from_buffer_copy(state.llama_state)
        self._forget()
        if llama_cpp.llama_state_set_data(self._ctx.ctx, data, state.llama_state_size) != state.llama_state_size:
            self._forget()
            raise StateMismatch("load_state: llama.cpp did not accept the state (another cache type?)")
        self.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        if self._logits_all and len(state.scores) == state.n_tokens:
            self.scores[: state.n_tokens] = state.scores
        self.n_tokens, self._seed, self.band = state.n_tokens, state.seed, state.band
        self._restored()
        self._spans = getattr(state, "spans", ())
        self._make_room(0)
        self._requires_eval = True

    @property
    def sequence_bytes(self) -> int:
        """Bytes that `sequence_state` returns."""
        self.drop_rolled_back()
        return int(llama_cpp.llama_state_seq_get_size(self._ctx.ctx, 0))

    @holds_context
    def sequence_state(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the keys and values as llama.cpp serialises them, for `restore`; shape ``(sequence_bytes,)``."""
        state = np.empty(self.sequence_bytes, dtype=np.uint8)
        buffer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = llama_cpp.llama_state_seq_get_data(self._ctx.ctx, buffer, state.nbytes, 0)
        if written != state.nbytes:
            raise RuntimeError(f"llama.cpp wrote {written} of {state.nbytes} bytes of its state")
        return state

    @holds_context
    def restore(self, tokens: np.ndarray[Any, Any], state: np.ndarray[Any, Any], band: Band) -> None:
        """Replace the cached sequence with `tokens`, whose keys and values are in `state`, rotated as in `band`.

        Raises:
            RuntimeError: llama.cpp refuses the state, or its positions do not match the tokens; the cache is empty.
        """
        self._forget()
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        prefix = check_engine().state_prefix
        one_axis = llama_cpp.llama_model_rope_type(self.model) in ONE_AXIS_ROPES
        if self.can_rewind and one_axis and prefix >= 0 and not has_cells(state, prefix, len(tokens)):
            raise RuntimeError("the state does not hold one cell for each of its tokens")
        try:
            if llama_cpp.llama_state_seq_set_data(self._ctx.ctx, data, state.nbytes, 0) != state.nbytes:
                raise RuntimeError("llama.cpp did not accept the saved sequence")
            last = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self._ctx.ctx), 0)
            if last != len(tokens) - 1:
                raise RuntimeError(f"the state ends at position {last}, expected {len(tokens) - 1}")
        except RuntimeError:
            self._forget()
            raise
        self.input_ids[: len(tokens)] = tokens
        self.n_tokens, self.band = len(tokens), band
        self._restored()
        self._make_room(0)
        self._requires_eval = True

    def _restored(self) -> None:
        """Cell i holds position i now, whatever graphs wrote before."""
        if self._fast is not None:
            self._fast.reset_positions()

    def close(self) -> None:
        """Free the model. A call that is under way in another thread stops and raises, as does any use afterwards."""
        if hasattr(self, "_calls"):
            self._calls.close(self._free)

    def _free(self) -> None:
        if hasattr(self, "_stack"):
            super().close()
        for name in ("_ctx", "_model", "_batch"):
            if name in self.__dict__:
                object.__setattr__(self.__dict__[name], "__class__", Closed)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state |= {
            "n_ctx": self._requested_ctx,
            "fast_prefill": self._fast is not None,
            "exact": self._exact,
            "flash_attn": self.plan.flash_attn,
            "draft_model": self._draft_model,
        }
        if self._rope is not None:
            state["schedule"] = self._schedule
        return dict(state)


def _in_turn(first: Handler, second: Handler | None) -> Handler:
    """Return a handler that calls both."""
    if second is None:
        return first

    def both(node: int) -> None:
        first(node)
        second(node)

    return both


def _draft(model: Any, schedule: Schedule, tokens: Any, /, **options: Any) -> Any:
    """Return the tokens that `model` expects after `tokens`, as far as these tokens' band reaches."""
    room = schedule.bands[schedule.band_index(len(tokens))].context - len(tokens)
    return model(tokens, **options)[:room]


def _all_finite(embeddings: Any) -> bool:
    """Whether all numbers of lists in lists are finite."""
    return math.isfinite(embeddings) if isinstance(embeddings, (int, float)) else all(map(_all_finite, embeddings))


def _index_of(schedule: Schedule, band: Band) -> int:
    return schedule.bands.index(band) if band in schedule.bands else -1
