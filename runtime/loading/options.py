"""What is decided before a model is loaded: the options that can be taken, the schedule, the length of the context."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import operator
import os
import re
import secrets
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import llama_cpp
import numpy as np

from ...container import (
    Entry,
    Header,
    ValueType,
    freq_scale,
    model_digest,
    model_parts,
    native_schedule,
    read_header,
    schedule_of,
)
from ...errors import UserError
from ...factors import Band, Provenance, Schedule, check_matches, read_schedule
from ..memory import head_size, is_quantised

ROPE_OPTIONS = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
)
"""llama_cpp's own options for scaling RoPE; where one of them is given, no schedule is applied."""

HADAMARD = 64
"""llama.cpp transforms quantised keys of heads with a multiple of so many dimensions."""
STOCK_OPTIONS = inspect.signature(llama_cpp.Llama.__init__).parameters
"""llama_cpp's options and their defaults; read here, before anybody puts `ropewalk.Llama` in that class's place."""

MAX_THREADS = 512  # ggml's GGML_MAX_N_THREADS, beyond which it aborts

FLOAT_KEYS = (".rope.freq_base", ".rope.scale_linear", ".rope.scaling.factor", ".rope.scaling.attn_factor", "_epsilon")
"""Endings of keys that llama.cpp reads as floats; it ignores an override of another type."""

_logger = logging.getLogger("ropewalk")


def whole_number(name: str, value: Any, least: int, expected: str, most: int = 2**63 - 1) -> int:
    """Return `value`, of any whole-number type, as an int; `expected` describes it in the error.

    Raises:
        UserError: it is not a whole number from `least` to `most`.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not least <= number <= most:
        raise UserError(f"{name}: {value!r}, expected {expected}")
    return number


def thread_count(name: str, given: Any, default: int) -> int:
    """Return the number of threads to run; None, 0 and negative numbers mean the default, as in llama.cpp.

    Raises:
        UserError: not a whole number, or more than ggml can have.
    """
    if given is None:
        return default
    number = whole_number(name, given, -(2**31), f"a number of threads up to {MAX_THREADS}", MAX_THREADS)
    return number if number > 0 else default


def leave_out_gpu(options: dict[str, Any]) -> None:
    """Take `n_gpu_layers` out of the options: a build for the CPU ignores it, and a note says so.

    Raises:
        UserError: this build of llama.cpp would move layers to a GPU, where rope cannot be rescaled.
    """
    if not options.pop("n_gpu_layers", 0):
        return
    if llama_cpp.llama_supports_gpu_offload():
        raise UserError("n_gpu_layers: ropewalk rescales rope on the CPU, expected 0")
    _logger.warning("ropewalk: n_gpu_layers is ignored: this build of llama.cpp runs on the CPU")


def take_overrides(header: Header, options: dict[str, Any]) -> Header:
    """Return the header as llama.cpp will see it with the option `kv_overrides`, whose values get the file's types.

    Raises:
        UserError: a value is of a type that llama.cpp ignores for its key.
    """
    given = options.get("kv_overrides")
    if not given:
        return header
    if not isinstance(given, Mapping):
        raise UserError(f"kv_overrides: {type(given).__name__}, expected a dict of metadata keys and values")
    taken = {str(key): _as_in_file(header, str(key), value) for key, value in given.items()}
    options["kv_overrides"] = taken
    entries = dict(header.entries)
    for key, value in taken.items():
        if key not in entries or entries[key].item_type is None:  # llama.cpp overrides no arrays
            entries[key] = Entry(key, _gguf_type(value), None, 1, 0, 0, value)
    return replace(header, entries=entries)


def _as_in_file(header: Header, key: str, value: Any) -> bool | int | float | str:
    entry = header.entries.get(key)
    in_file = header.get(key) if entry is not None and entry.item_type is None else None
    if isinstance(value, (bool, str)) or type(in_file) in (bool, str):
        found: bool | int | float | str | None = value if isinstance(value, (bool, str)) else None
    elif isinstance(in_file, float) or (in_file is None and key.endswith(FLOAT_KEYS)):
        found = _float(value)
    else:
        try:
            found = operator.index(value)
        except TypeError:
            found = _float(value)
    if found is None or (in_file is not None and type(found) is not type(in_file)):
        expected = f"a value like the file's, {in_file!r:.80}" if in_file is not None else "a bool, a number or a text"
        raise UserError(f"kv_overrides: {key}: {value!r:.80}, expected {expected}")
    return found


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _gguf_type(value: bool | int | float | str) -> int:
    kinds = {
        bool: ValueType.BOOL,
        int: ValueType.INT64,
        float: ValueType.FLOAT64,
        str: ValueType.STRING,
    }
    return int(kinds[type(value)])


def check_adapter(path: str | os.PathLike[str], arch: str) -> Header:
    """Return the header of the LoRA adapter at `path`, after checking that it is one for the architecture `arch`.

    Raises:
        UserError: it is not.
    """
    header = read_header(path)
    kind = header.get("general.type")
    if kind != "adapter":
        raise UserError(f"lora_path: {path}: general.type: {kind!r:.80}, expected 'adapter' (a LoRA adapter in GGUF)")
    if header.arch != arch:
        raise UserError(f"lora_path: {path}: an adapter for architecture {header.arch!r}, the model's is {arch!r}")
    return header


class WeightsKey:
    """A digest of what keys and values depend on besides the tokens and the schedule: weights, adapter, overrides.

    Args:
        header: of the model's file, before it is loaded.
        options: llama_cpp's, of which `lora_path`, `lora_scale` and `kv_overrides` count.
    """

    def __init__(self, header: Header, options: Mapping[str, Any]) -> None:
        adapter = options.get("lora_path")
        headers = [header] if not adapter else [header, check_adapter(adapter, header.arch)]
        self._paths = [header.path for header in headers]
        self._parts = [part.path for header in headers for part in model_parts(header)]
        self._options = repr((options.get("lora_scale", 1.0), sorted((options.get("kv_overrides") or {}).items())))
        self._files = self._state()
        self._value = ""

    @property
    def value(self) -> str:
        """16 hexadecimal digits; of no other model's, if the files have changed since it was loaded."""
        if not self._value:
            try:
                parts: object = ([model_digest(path) for path in self._paths], self._options)
                unchanged = self._state() == self._files
            except UserError:  # removed, or no model any more
                unchanged = False
            if not unchanged:
                parts = secrets.token_hex(16)
            self._value = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return self._value

    def _state(self) -> list[tuple[int, int, int, int]]:
        """Return what changes when one of the files is replaced or written to."""
        try:
            files = [path.stat() for path in self._parts]
        except OSError as error:
            raise UserError(f"{error.filename}: cannot read the model: {error.strerror or error}") from None
        return [(file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns) for file in files]


def resolve_schedule(
    header: Header, given: Schedule | str | os.PathLike[str] | None, n_ctx: int, options: dict[str, Any]
) -> tuple[Schedule, bool]:
    """Return the schedule to run with, and whether it needs the rope callback.

    Raises:
        UserError: a schedule for another model, or one together with llama_cpp's own rope options.
    """
    native = native_schedule(header)
    scheduled = given is not None or schedule_of(header) != native
    _leave_out_models_own(header, native.facts.freq_base, scheduled, options)
    own = [name for name in ROPE_OPTIONS if name in options]
    if own and scheduled:
        default = STOCK_OPTIONS[own[0]].default
        raise UserError(
            f"{own[0]}: the model has a rescale schedule; leave this out, or pass {own[0]}={default:g}"
            f" (found {options[own[0]]!r})"
        )
    if own:
        last = native.bands[-1]
        band = Band(
            context=max(n_ctx, 1) if n_ctx else last.context,
            rescale_factors=last.rescale_factors,
            found=Provenance(method="llama.cpp options"),
        )
        return Schedule(facts=native.facts, bands=(band,)), False
    if given is None:
        schedule = schedule_of(header)
        return schedule, schedule != native or len(native.bands) > 1
    if isinstance(given, Schedule):
        where, schedule = "schedule", given
    else:
        where, schedule = str(given), read_schedule(given)
    check_matches(schedule, native.facts, where)
    return schedule, True


def _leave_out_models_own(header: Header, freq_base: float, scheduled: bool, options: dict[str, Any]) -> None:
    """Take the rope options out that only repeat llama_cpp's defaults, or what the model does without them.

    LangChain, for one, passes `rope_freq_base` 10000 and `rope_freq_scale` 1 with any model.

    Raises:
        UserError: one of them is not a number.
    """
    for name in ROPE_OPTIONS:
        value = options.get(name)
        number = None if isinstance(value, str) else _float(value)
        if value is not None and number is None:
            raise UserError(f"{name}: {value!r}, expected a number")
        same = number is None or number == STOCK_OPTIONS[name].default
        if name == "rope_freq_base" and number is not None:
            same = same or math.isclose(number, freq_base, rel_tol=1e-6)
        if name == "rope_freq_scale":
            same = same or number == freq_scale(header) or (scheduled and number == 1)
        if same:
            options.pop(name, None)


def context_length(n_ctx: Any) -> int:
    """Return the option `n_ctx` as an int.

    Raises:
        UserError: it is not a number of tokens.
    """
    return whole_number("n_ctx", n_ctx, 0, "a number of tokens (0 for the model's longest)")


def check_context(n_ctx: int, schedule: Schedule) -> int:
    """Return the context to run with: `n_ctx`, or for 0 all that the last band holds.

    Raises:
        UserError: it is more than the last band holds.
    """
    if n_ctx > schedule.context:
        raise UserError(
            f"n_ctx: {n_ctx:,} tokens, expected at most {schedule.context:,}, which the model's last band holds;"
            f" to extend a model: ropewalk convert --context {n_ctx}"
        )
    return n_ctx or schedule.context


def import_torch() -> None:
    """Import torch, if it is not yet imported, in a thread of its own.

    Exceptions caught during that import live until the garbage collector runs, and with them the frames of its callers:
    among them that of the model's constructor, so that the first model would not be freed with its last reference.

    Raises:
        UserError: it cannot be imported, for lack of memory perhaps.
    """
    if "torch" not in sys.modules:
        failures: list[str] = []
        thread = threading.Thread(target=_import, args=("torch", failures), daemon=True)
        thread.start()
        thread.join()
        if failures:
            raise UserError(f"torch cannot be loaded ({failures[0]}); fast_prefill=False does without it")


def _import(name: str, failures: list[str]) -> None:
    try:
        import_module(name)
    except (ImportError, OSError, MemoryError) as error:
        failures.append(" ".join(str(error).split()) or type(error).__name__)


def has_cells(state: np.ndarray[Any, np.dtype[np.uint8]], start: int, n_tokens: int) -> bool:
    """Whether a serialised state describes, from byte `start` on, one stream of `n_tokens` cells of one sequence.

    llama.cpp (`llama_kv_cache::state_write`) writes the number of streams and of cells, then for each cell its
    position, the number of its sequences and the sequence. It believes what it reads back: a forged number makes it
    take all memory, or crash.
    """
    end = start + 8 + 12 * n_tokens
    if len(state) < end or state[start : start + 8].view(np.uint32).tolist() != [1, n_tokens]:
        return False
    positions, counts, sequences = state[start + 8 : end].view(np.int32).reshape(n_tokens, 3).T
    return bool((np.sort(positions) == np.arange(n_tokens)).all() and (counts == 1).all() and (sequences == 0).all())


def keys_can_shift(header: Header, n_rot: int, type_k: str) -> bool:
    """Whether llama.cpp's K-shift can rotate the keys of a context that is created now, with keys of `type_k`.

    Where it cannot, it does not say so, but crashes: its ROPE knows no BF16; and with quantised keys, it takes for
    granted that they are Hadamard-transformed, which they are only in heads of a multiple of 64 dimensions, of one size
    in all layers, and unless LLAMA_ATTN_ROT_DISABLE is set; and that they have no dimensions that are not rotated.
    """
    if not is_quantised(type_k):
        return type_k != "bf16"
    size = head_size(header)
    others = [header.get(f"{header.arch}.{key}_swa") for key in ("attention.key_length", "rope.dimension_count")]
    one_size = n_rot == size and all(other in (None, size) for other in others)
    return one_size and size % HADAMARD == 0 and not _is_set("LLAMA_ATTN_ROT_DISABLE")


def _is_set(name: str) -> bool:
    """Whether llama.cpp takes an environment variable for true: C's atoi of it is not 0."""
    return re.match(r"\s*[+-]?0*[1-9]", os.environ.get(name, "")) is not None
