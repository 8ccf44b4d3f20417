"""The compiled library, loaded through ctypes: which instruction sets it has here, and one context's state in it.

A node that is taken over calls the library on ggml's own threads: neither Python nor its lock is involved.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import ggml


class RopeSetting(ctypes.Structure):
    """What the ROPE nodes of a model's global layers are set to: `struct rope_setting` in kernels.h.

    `factors` is the tensor of rescale factors in use; `touched` counts nodes set since it was last reset to 0.
    """

    _fields_ = (
        ("factors", ctypes.c_void_p),
        ("touched", ctypes.c_int64),
        ("freq_base", ctypes.c_float),
        ("native_scale", ctypes.c_float),
        ("attention_factor", ctypes.c_float),
        ("n_dims", ctypes.c_int32),
    )


class _KeyCacheStruct(ctypes.Structure):
    """`struct key_cache` in kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("cell_bytes", ctypes.c_int64),
        ("n_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("hadamard", ctypes.c_int32),
    )


class _RunStruct(ctypes.Structure):
    """`struct rotation_run` in kernels.h."""

    _fields_ = (
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("before", ctypes.POINTER(ctypes.c_float)),
        ("after", ctypes.POINTER(ctypes.c_float)),
    )


class _RotationStruct(ctypes.Structure):
    """`struct rotation` in kernels.h."""

    _fields_ = (
        ("caches", ctypes.POINTER(_KeyCacheStruct)),
        ("runs", ctypes.POINTER(_RunStruct)),
        ("n_caches", ctypes.c_int64),
        ("n_runs", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("next", ctypes.c_int64),
        ("n_dims", ctypes.c_int32),
        ("freq_base", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("halves", ctypes.c_bool),
    )


def _offsets(struct: type[ctypes.Structure], *fields: str) -> tuple[int, ...]:
    return tuple(getattr(struct, field).offset for field in fields)


LAYOUT = (
    *_offsets(ggml.TensorStruct, "type", "ne", "nb", "op", "op_params", "src", "view_src", "data", "name", "extra"),
    ctypes.sizeof(ggml.TensorStruct),
    *_offsets(ggml.CustomParams, "function", "userdata", "attention"),
    *_offsets(ggml.RopeParams, "n_dims", "freq_base", "freq_scale", "ext_factor", "attn_factor"),
    *_offsets(RopeSetting, *(name for name, *_ in RopeSetting._fields_)),
    ctypes.sizeof(RopeSetting),
    *_offsets(_KeyCacheStruct, *(name for name, *_ in _KeyCacheStruct._fields_)),
    ctypes.sizeof(_KeyCacheStruct),
    *_offsets(_RunStruct, *(name for name, *_ in _RunStruct._fields_)),
    ctypes.sizeof(_RunStruct),
    *_offsets(_RotationStruct, *(name for name, *_ in _RotationStruct._fields_)),
    ctypes.sizeof(_RotationStruct),
)
"""What `ropewalk_layout` in kernels.c must return."""

EXACT = "ROPEWALK_EXACT"
"""Environment variable: 1 = compute in floats where bfloat16 would be faster."""

SWITCH = "ROPEWALK_KERNELS"
"""Environment variable: 0 = do without the library."""

INSTRUCTIONS = "ROPEWALK_INSTRUCTIONS"
"""Environment variable: the name of an instruction set to use instead of the fastest one ("AVX2")."""


@dataclass(frozen=True)
class InstructionSet:
    """What the kernels can use on this processor: their number in the library, and a name for people."""

    index: int
    name: str


@dataclass(frozen=True)
class KeyCache:
    """Where the keys of one layer lie: cells of `cell_bytes`, each of heads that follow each other."""

    data: int
    """Address of the first cell."""
    cell_bytes: int
    n_heads: int
    head_size: int
    type: int
    """ggml's number."""
    hadamard: int = 0
    """Of how many values a Hadamard transform is cached in place of them; 0: the values themselves."""


@dataclass(frozen=True)
class KeyRotation:
    """Cells [start, stop), each at the position of its number, go from the rescale factors `before` to `after`."""

    start: int
    stop: int
    before: Sequence[float]
    """Shape ``(n_rot/2,)``, as `after`'s."""
    after: Sequence[float]


@dataclass(frozen=True)
class NearWindow:
    """How a near window is computed: `tokens` of it, and factors nearer than that (the model's `own`) and `far`."""

    tokens: int
    start_tokens: int
    own: Sequence[float]
    """Shape ``(n_rot/2,)``, as `far`'s."""
    far: Sequence[float]
    freq_base: float
    halves: bool = False
    """Whether a pair is a value of each half of the rotary ones, not two neighbours."""


def instruction_sets() -> tuple[InstructionSet, ...]:
    """Return those of this processor, the fastest first; empty without the library."""
    library = _library()
    found, index = [], 0
    while library is not None and (name := library.ropewalk_instruction_set(index)) is not None:
        if name:
            found.append(InstructionSet(index, name.decode()))
        index += 1
    return tuple(found)


def why_missing() -> str:
    """Return why the library is not used; empty if it is."""
    return _in_use()[1]


def instructions_in_use() -> str:
    """Return the name of the instruction set that a `Context` uses by default."""
    return _default_set().name


def exact_by_default() -> bool:
    """Whether the environment asks for floats alone."""
    return os.environ.get(EXACT, "") not in ("", "0")


def what_is_used() -> tuple[str | int, ...]:
    """Return what tells one library and its use from another: its instruction set, size and time; or why it is not."""
    if _library() is None:
        return (why_missing(),)
    facts = _path().stat()
    return (_default_set().name, facts.st_size, facts.st_mtime_ns)


class Context:
    """The library's state for one llama.cpp context; keep it alive as long as that."""

    def __init__(self, instructions: InstructionSet | None = None, exact: bool | None = None) -> None:
        """Use `instructions` (default: the fastest) and floats alone if `exact` (default: by the environment)."""
        ggml.check_layout()
        library = _library()
        assert library is not None, why_missing()
        chosen = instructions or _default_set()
        self.instructions = chosen
        self.exact = exact_by_default() if exact is None else exact
        self.address: int | None = library.ropewalk_new(chosen.index, self.exact)
        if not self.address:
            raise MemoryError("the kernels' buffers could not be allocated")
        self._library = library
        for code, kind in ggml.block_types().items():
            function = ctypes.cast(kind.dequantise, ctypes.c_void_p)  # type: ignore[arg-type]
            library.ropewalk_set_type(self.address, code, kind.block, kind.block_bytes, function, ggml.quantiser(code))
        for code in (ggml.F16, ggml.BF16):
            library.ropewalk_set_type(self.address, code, 1, 2, None, ggml.quantiser(code))

    @property
    def attention(self) -> int:
        """The address of the function that computes an attention node."""
        return _address(self._library.ropewalk_attention)

    @property
    def see(self) -> int:
        """The address of the function for `llama_context_params.cb_eval`; it is to be called with `address`."""
        return _address(self._library.ropewalk_see)

    def watch(self, rope: RopeSetting | None, nodes: bool) -> None:
        """Have `see` set ROPE nodes as in `rope`, which it keeps reading, and take over `nodes` that are covered."""
        self._rope = rope  # kept alive
        codes = (ctypes.c_int * len(_WATCHED))(*(ggml.op_code(name) for name in _WATCHED))
        if rope is None:
            codes[0] = -1
        if not nodes:
            codes[1:] = [-1] * (len(_WATCHED) - 1)
        self._library.ropewalk_watch(self.address, codes, None if rope is None else ctypes.byref(rope))

    def windowed(self, node: int) -> int | None:
        """Return the ROPE node behind an attention node's queries if a near window can be computed there, or None."""
        return self._library.ropewalk_windowed(self.address, node)  # type: ignore[no-any-return]

    def use_window(self, window: NearWindow | None) -> None:
        """Compute attention with a near window from now on, or without one. No graph may be under way.

        Raises:
            MemoryError: there is no room for it.
        """
        if window is None:
            window = NearWindow(0, 0, (), (), 1.0)
        factors = np.asarray([window.own, window.far], dtype=np.float32)
        own, far = (row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for row in factors)
        n_dims = 2 * len(window.own)
        settings = (window.tokens, window.start_tokens, n_dims, window.halves, window.freq_base)
        if not self._library.ropewalk_set_window(self.address, *settings, own, far):
            raise MemoryError("no memory for a near window")

    def reset_positions(self) -> None:
        """Take each cached cell to be at the position of its number, as after a sequence was restored."""
        self._library.ropewalk_reset_places(self.address)

    def watch_closely(self, see: Any | None) -> None:
        """Have `see` call this function, of the same kind, for every node instead; None ends that."""
        self._closely = see  # kept alive
        self._library.ropewalk_watch_closely(self.address, see and ctypes.cast(see, ctypes.c_void_p))

    @property
    def must_stop(self) -> int:
        """The address of llama.cpp's abort callback, for `address`: it stops a graph after `stop` or a failure."""
        return _address(self._library.ropewalk_must_stop)

    def stop(self, stop: bool) -> None:
        """Stop the graph that is under way, and those to come until it is called with False."""
        self._library.ropewalk_stop(self.address, stop)

    @property
    def product(self) -> int:
        """The address of the function that computes a product of a stored weight."""
        return _address(self._library.ropewalk_product)

    def covers_product(self, node: int) -> bool:
        """Whether the MUL_MAT node at an address is one that `product` computes."""
        return bool(self._library.ropewalk_covers_product(self.address, node))

    def can_rotate(self, cache: KeyCache, n_rot: int) -> bool:
        """Whether `rotate` knows the cache's type, and its heads have that many rotary values."""
        return bool(self._library.ropewalk_can_rotate(self.address, ctypes.byref(_struct(cache)), n_rot))

    def rotate(
        self,
        caches: Sequence[KeyCache],
        rotations: Sequence[KeyRotation],
        *,
        n_cells: int,
        n_rot: int,
        freq_base: float,
        scale: float = 1.0,
        halves: bool = False,
        n_threads: int = 1,
    ) -> None:
        """Rotate cached keys in place, each by the difference of its position's angles, and scale those of all cells.

        Pairs are neighbours, or values of the two `halves` of the rotary ones. A cell is scaled with its rotation, or
        if it has none, by itself. No graph may be under way.
        """
        rows = [np.asarray([one.before, one.after], dtype=np.float32) for one in rotations]
        pointers = [[row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for row in pair] for pair in rows]
        runs = [_RunStruct(one.start, one.stop, *pair) for one, pair in zip(rotations, pointers, strict=True)]
        every = scale != 1.0
        rotation = _RotationStruct(
            caches=(_KeyCacheStruct * len(caches))(*map(_struct, caches)),
            runs=(_RunStruct * len(runs))(*runs),
            n_caches=len(caches),
            n_runs=len(runs),
            next=0 if every else min((one.start for one in rotations), default=0),
            stop=n_cells if every else max((one.stop for one in rotations), default=0),
            n_dims=n_rot,
            freq_base=freq_base,
            scale=scale,
            halves=halves,
        )
        _on_threads(n_threads, lambda: self._library.ropewalk_rotate(self.address, ctypes.byref(rotation)))

    @property
    def n_bytes(self) -> int:
        """Bytes allocated for nodes so far; see `memory.KERNELS_BYTES`."""
        return int(self._library.ropewalk_bytes(self.address))

    @property
    def taken(self) -> int:
        """Nodes computed so far."""
        return int(self._library.ropewalk_taken(self.address))

    @property
    def failure(self) -> str:
        """Why a node could not be computed since `forgive`; names it. Empty if none failed."""
        return str(self._library.ropewalk_failure(self.address).decode(errors="replace"))

    def forgive(self) -> None:
        """Forget the failure, once no graph is under way."""
        self._library.ropewalk_forgive(self.address)

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._library.ropewalk_free(self.address)
            self.address = None


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def _struct(cache: KeyCache) -> _KeyCacheStruct:
    return _KeyCacheStruct(cache.data, cache.cell_bytes, cache.n_heads, cache.head_size, cache.type, cache.hadamard)


def _on_threads(n_threads: int, work: Callable[[], bool]) -> None:
    """Call `work` on each of `n_threads` threads, this one among them.

    Raises:
        MemoryError: one of the calls returned False.
    """
    done: list[bool] = []
    threads = [threading.Thread(target=lambda: done.append(work()), daemon=True) for _ in range(n_threads - 1)]
    for thread in threads:
        thread.start()
    done.append(work())
    for thread in threads:
        thread.join()
    if len(done) < n_threads or not all(done):
        raise MemoryError("no memory to rotate cached keys in")


def _default_set() -> InstructionSet:
    sets, wanted = instruction_sets(), os.environ.get(INSTRUCTIONS, "")
    return next((one for one in sets if one.name == wanted), sets[0])


def _library() -> ctypes.CDLL | None:
    return _in_use()[0]


def _in_use() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(SWITCH, "").strip() == "0":
        return None, f"{SWITCH} is 0"
    return _loaded()


_WATCHED = (
    "ROPE", "FLASH_ATTN_EXT", "MUL_MAT", "CUSTOM", "SET_ROWS", "RESHAPE", "VIEW", "PERMUTE", "CONT", "SCALE", "CPY"
)  # fmt: skip
"""Operations that the library looks at, in the order of `struct watch`."""

_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "instruction_set": (ctypes.c_char_p, _INT),
    "new": (_POINTER, _INT, ctypes.c_bool),
    "free": (None, _POINTER),
    "set_type": (None, _POINTER, _INT, _INT64, _INT64, _POINTER, _POINTER),
    "watch": (None, _POINTER, _POINTER, _POINTER),
    "windowed": (_POINTER, _POINTER, _POINTER),
    "set_window": (
        ctypes.c_bool,
        _POINTER,
        *[_INT64] * 2,
        _INT,
        ctypes.c_bool,
        ctypes.c_float,
        *[ctypes.POINTER(ctypes.c_float)] * 2,
    ),
    "reset_places": (None, _POINTER),
    "watch_closely": (None, _POINTER, _POINTER),
    "see": (ctypes.c_bool, _POINTER, ctypes.c_bool, _POINTER),
    "attention": (None, _POINTER, _INT, _INT, _POINTER),
    "product": (None, _POINTER, _INT, _INT, _POINTER),
    "covers_product": (ctypes.c_bool, _POINTER, _POINTER),
    "can_rotate": (ctypes.c_bool, _POINTER, _POINTER, _INT64),
    "rotate": (ctypes.c_bool, _POINTER, _POINTER),
    "must_stop": (ctypes.c_bool, _POINTER),
    "stop": (None, _POINTER, ctypes.c_bool),
    "bytes": (_INT64, _POINTER),
    "taken": (_INT64, _POINTER),
    "failure": (ctypes.c_char_p, _POINTER),
    "forgive": (None, _POINTER),
    "layout": (_INT, _POINTER),
}
"""The library's functions, without `ropewalk_`: what they return and take."""


def _path() -> Path:
    return Path(__file__).with_name("_kernels" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library with its functions declared, or why it cannot be used."""
    path = _path()
    if not path.exists():
        return None, "not compiled when Ropewalk was installed (is there a C compiler?)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}"
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, f"ropewalk_{name}", None)
        if function is None:
            return None, f"it was compiled from other sources: it has no function ropewalk_{name}"
        function.restype, function.argtypes = result, arguments
    offsets = (ctypes.c_int64 * 64)()
    if tuple(offsets[: library.ropewalk_layout(offsets)]) != LAYOUT:
        return None, "it was compiled for another layout of ggml's tensors"
    return library, ""
