"""All that Ropewalk knows about ggml's memory: where a tensor keeps its fields, and how a graph's nodes are read.

Nothing else in the project knows an offset. The layout below is ggml's public `struct ggml_tensor` (ggml.h) on a
64-bit machine; `check_layout` verifies it at start-up on tensors created by ggml's own functions, so that another build
is refused before a byte is written to a wrong place.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._ctypes_extensions import load_shared_library

from ...errors import UserError

NEWEST = "0.3.36"
SUPPORTED = f"0.3.30 to {NEWEST}"  # releases that `make matrix` passes with; another may do, if its self-test passes


class TensorStruct(ctypes.Structure):
    """`struct ggml_tensor`, field for field."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class RopeParams(ctypes.Structure):
    """A ROPE node's `op_params`, as written by `ggml_rope_impl` in ggml.c."""

    _fields_ = (
        ("n_past", ctypes.c_int32),
        ("n_dims", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("n_ctx", ctypes.c_int32),
        ("n_ctx_orig", ctypes.c_int32),
        ("freq_base", ctypes.c_float),
        ("freq_scale", ctypes.c_float),
        ("ext_factor", ctypes.c_float),
        ("attn_factor", ctypes.c_float),
        ("beta_fast", ctypes.c_float),
        ("beta_slow", ctypes.c_float),
    )


class AttentionParams(ctypes.Structure):
    """A FLASH_ATTN_EXT node's `op_params`, as written by `ggml_flash_attn_ext` in ggml.c."""

    _fields_ = (("scale", ctypes.c_float), ("max_bias", ctypes.c_float), ("logit_softcap", ctypes.c_float))


class CustomParams(ctypes.Structure):
    """A CUSTOM node's `op_params` (`ggml_custom_op_params` in ggml-impl.h), and behind it the attention's own."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("n_tasks", ctypes.c_int),
        ("userdata", ctypes.c_void_p),
        ("attention", AttentionParams),
    )


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantised", ctypes.c_bool),
        ("dequantise", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


CustomFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
"""The function that a CUSTOM node calls on each of ggml's threads: ``(node, thread, n_threads, userdata)``."""

_Quantise = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_Dequantise = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_N_TASKS_MAX = -1  # GGML_N_TASKS_MAX: one per thread
_PLAIN_TYPES = {0: np.float32, 1: np.float16, 26: np.int32, 30: np.int16}  # bf16 has no numpy type: its bits

F32, F16, I32, I64, BF16 = 0, 1, 26, 27, 30
PLAIN_FLOATS = (F32, F16, BF16)

PARAMS_OFFSET: int = TensorStruct.op_params.offset
OP_INDEX: int = TensorStruct.op.offset // 4
SRC2_INDEX: int = TensorStruct.src.offset // 8 + 2

# Reading one word of a node must cost next to nothing, as every node of every graph is looked at: these arrays cover
# the address space, so that WORDS[address >> 2] is a single C-level read. They are never sliced or iterated.
WORDS = (ctypes.c_int32 * (1 << 60)).from_address(0)
POINTERS = (ctypes.c_uint64 * (1 << 59)).from_address(0)

_FOLDER = Path(llama_cpp.__file__).parent / "lib"

GraphCallback = Callable[[int, bool, "int | None"], bool]


class LayoutError(UserError):
    """The installed llama.cpp lays its tensors out in a way this release does not know."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def library_files() -> list[Path]:
    """The files of the installed llama.cpp, sorted."""
    return sorted(path for path in _FOLDER.iterdir() if path.is_file())


@cache
def _library() -> ctypes.CDLL:
    lib: ctypes.CDLL = load_shared_library("ggml-base", _FOLDER)
    pointer, c_int, c_float, c_int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
    declarations: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("ggml_init", pointer, (_InitParams,)),
        ("ggml_free", None, (pointer,)),
        ("ggml_op_name", ctypes.c_char_p, (c_int,)),
        ("ggml_set_name", pointer, (pointer, ctypes.c_char_p)),
        ("ggml_get_data", pointer, (pointer,)),
        ("ggml_tensor_overhead", ctypes.c_size_t, ()),
        ("ggml_new_tensor_1d", pointer, (pointer, c_int, c_int64)),
        ("ggml_new_tensor_3d", pointer, (pointer, c_int, c_int64, c_int64, c_int64)),
        ("ggml_rope_ext", pointer, (*[pointer] * 4, *[c_int] * 3, *[c_float] * 6)),
        ("ggml_flash_attn_ext", pointer, (*[pointer] * 5, *[c_float] * 3)),
        ("ggml_custom_4d", pointer, (pointer, c_int, *[c_int64] * 4, pointer, c_int, pointer, c_int, pointer)),
        ("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), (c_int,)),
        ("ggml_type_name", ctypes.c_char_p, (c_int,)),
        ("ggml_type_size", ctypes.c_size_t, (c_int,)),
        ("ggml_blck_size", c_int64, (c_int,)),
    )
    for name, result, arguments in declarations:
        function = getattr(lib, name, None)
        if function is None:
            raise LayoutError(refusal(f"it has no function {name}"))
        function.restype, function.argtypes = result, arguments
    return lib


@cache
def op_code(name: str) -> int:
    """Return the number of an operation by ggml's own name for it ("ROPE", "GET_ROWS").

    Raises:
        LayoutError: this ggml has no such operation.
    """
    for code in range(512):
        found = _library().ggml_op_name(code)
        if found == name.encode():
            return code
        if code and found in (b"COUNT", None):
            break
    raise LayoutError(refusal(f"it has no operation {name}"))


@cache
def op_name(code: int) -> str:
    """Return ggml's own name for an operation ("ROPE", "GET_ROWS")."""
    return str(_library().ggml_op_name(code).decode())


class Arena:
    """Host memory for small tensors of our own, created by ggml; it lives as long as this object."""

    def __init__(self, n_bytes: int) -> None:
        self._context = _library().ggml_init(_InitParams(n_bytes, None, False))
        if not self._context:
            raise MemoryError(f"ggml_init could not allocate {n_bytes} bytes")

    def floats(self, values: Sequence[float], name: bytes = b"") -> int:
        """Return the address of a new one-dimensional F32 tensor that holds `values`."""
        tensor: int = _library().ggml_new_tensor_1d(self._context, 0, len(values))
        row = np.asarray(values, dtype=np.float32)
        ctypes.memmove(_library().ggml_get_data(tensor), row.ctypes.data, row.nbytes)
        _library().ggml_set_name(tensor, name)
        return tensor

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            _library().ggml_free(self._context)


def floats_size(n: int) -> int:
    """Bytes of an `Arena` that one tensor of `n` floats takes."""
    return int(_library().ggml_tensor_overhead()) + 4 * n + 64


def n_values(tensor: TensorStruct) -> int:
    """Return how many values a tensor has."""
    return math.prod(tensor.ne)


def tensor_at(address: int) -> TensorStruct:
    """Return the tensor at an address, to read and to write in place."""
    return TensorStruct.from_address(address)


def rope_params(address: int) -> RopeParams:
    """Return the parameters of the ROPE node at an address, to read and to write in place."""
    return RopeParams.from_address(address + PARAMS_OFFSET)


def scale_bias(address: int) -> float:
    """Return what the SCALE node at an address adds to the values that it has multiplied."""
    return float(ctypes.c_float.from_address(address + PARAMS_OFFSET + 4).value)


def int32_row(tensor: TensorStruct) -> npt.NDArray[np.int32]:
    """Return the data of a one-dimensional I32 tensor as an array over the same memory, shape ``(ne[0],)``."""
    row = (ctypes.c_int32 * tensor.ne[0]).from_address(tensor.data)
    return np.frombuffer(row, dtype=np.int32)


def int64_row(tensor: TensorStruct) -> npt.NDArray[np.int64]:
    """Return the data of a one-dimensional I64 tensor as an array over the same memory, shape ``(ne[0],)``."""
    row = (ctypes.c_int64 * tensor.ne[0]).from_address(tensor.data)
    return np.frombuffer(row, dtype=np.int64)


def values(tensor: TensorStruct) -> npt.NDArray[Any] | None:
    """Return a tensor's data as an array over the same memory, shape ``(ne[3], ne[2], ne[1], ne[0])``, any strides.

    None where numpy has no such type (quantised blocks); bf16 is returned as the int16 of its bits.
    """
    kind = _PLAIN_TYPES.get(tensor.type)
    if kind is None:
        return None
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    size = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + np.dtype(kind).itemsize
    return np.ndarray(shape, kind, (ctypes.c_char * size).from_address(tensor.data), strides=strides)


@dataclass(frozen=True)
class BlockType:
    """A type that is stored in blocks: `block` values in `block_bytes`."""

    block: int
    block_bytes: int
    dequantise: Callable[[int, int, int], None]
    """``(address of blocks, address of floats, number of values)``; runs without the GIL."""


@cache
def block_type(code: int) -> BlockType | None:
    """Return ggml's type number `code` with ggml's own function to dequantise it; None if it is not stored in blocks.

    Raises:
        LayoutError: the traits are not where they should be.
    """
    lib = _library()
    traits = lib.ggml_get_type_traits(code).contents
    found = (traits.type_name, traits.block, traits.block_bytes)
    expected = (lib.ggml_type_name(code), lib.ggml_blck_size(code), lib.ggml_type_size(code))
    if found != expected:
        raise LayoutError(refusal(f"type {code}'s traits read {found!r} where ggml says {expected!r}"))
    if traits.block == 1 or not traits.dequantise:
        return None
    return BlockType(int(traits.block), int(traits.block_bytes), _Dequantise(traits.dequantise))


def quantiser(code: int) -> int | None:
    """Return the address of ggml's function ``(floats, blocks, number of values)`` that writes its type number `code`.

    It rounds as ggml's tools do; None where ggml writes this type only with more information.
    """
    block_type(code)  # proves where the traits are
    function: int | None = _library().ggml_get_type_traits(code).contents.from_float_ref
    return function


def block_types() -> dict[int, BlockType]:
    """Return all types of this ggml that are stored in blocks, by their numbers."""
    kinds = ((code, block_type(code)) for code in range(llama_cpp.GGML_TYPE_COUNT))
    return {code: kind for code, kind in kinds if kind is not None}


def is_blocks(code: int) -> bool:
    """Whether ggml's type number `code` is stored in blocks that `dequantise` can read."""
    return block_type(code) is not None


def row_bytes(tensor: TensorStruct) -> int:
    """Bytes of one packed row of a tensor of blocks: ``ne[0]`` values."""
    kind = block_type(tensor.type)
    assert kind is not None
    return int(tensor.ne[0] // kind.block * kind.block_bytes)


def dequantise(tensor: TensorStruct, start: int, stop: int, out: int, stream: int = 0) -> None:
    """Dequantise entries [start, stop) along dimension 1 of a tensor of packed blocks, as F32 to the address `out`.

    An entry is one step of dimension 1: a row of a weight, or a cell of a cache with all its heads.
    """
    kind = block_type(tensor.type)
    assert kind is not None
    first = tensor.data + stream * tensor.nb[3] + start * tensor.nb[1]
    kind.dequantise(first, out, (stop - start) * tensor.nb[1] // kind.block_bytes * kind.block)


def quantise(code: int, floats: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return rows of floats, shape ``(rows, n)``, as blocks of ggml's type number `code`: ``(rows, bytes of a row)``.

    Raises:
        ValueError: ggml has no function for that which needs nothing but the floats.
    """
    kind, function = block_type(code), _library().ggml_get_type_traits(code).contents.from_float_ref
    if kind is None or not function or floats.shape[1] % kind.block:
        raise ValueError(f"type {code} cannot be quantised to from rows of {floats.shape[1]}")
    floats = np.ascontiguousarray(floats, np.float32)
    blocks = np.empty((len(floats), floats.shape[1] // kind.block * kind.block_bytes), np.uint8)
    _Quantise(function)(floats.ctypes.data, blocks.ctypes.data, floats.size)
    return blocks


def attention_params(address: int) -> AttentionParams:
    """Return the parameters of the FLASH_ATTN_EXT node at an address."""
    return AttentionParams.from_address(address + PARAMS_OFFSET)


def take_over(address: int, function: Any) -> None:
    """Change the node at an address into a CUSTOM one that calls `function` on every thread.

    `function` is a `CustomFunction` and must outlive the graph. An attention's own parameters move to
    `custom_params(address).attention`, so that a reused graph still has them.
    """
    kept = AttentionParams.from_buffer_copy(attention_params(address))
    params = custom_params(address)
    params.function = ctypes.cast(function, ctypes.c_void_p).value
    params.n_tasks, params.userdata, params.attention = _N_TASKS_MAX, None, kept
    WORDS[(address >> 2) + OP_INDEX] = op_code("CUSTOM")


def custom_params(address: int) -> CustomParams:
    """Return the parameters of the CUSTOM node at an address."""
    return CustomParams.from_address(address + PARAMS_OFFSET)


@cache
def check_layout() -> None:
    """Verify `TensorStruct` and `RopeParams` on a rope node created by ggml itself.

    Raises:
        LayoutError: something is not where it should be; names what.
    """
    lib = _library()
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        raise LayoutError(refusal("the machine is not 64-bit"))
    if lib.ggml_tensor_overhead() <= ctypes.sizeof(TensorStruct):
        raise LayoutError(refusal("its tensor struct is smaller"))
    context = lib.ggml_init(_InitParams(1 << 16, None, False))
    try:
        vectors = lib.ggml_new_tensor_3d(context, 0, 8, 3, 5)
        positions = lib.ggml_new_tensor_1d(context, 26, 5)  # GGML_TYPE_I32
        factors = lib.ggml_new_tensor_1d(context, 0, 4)
        node = lib.ggml_rope_ext(context, vectors, positions, factors, 8, 2, 77, 5e4, 0.5, 0.25, 1.5, 31.0, 2.0)
        lib.ggml_set_name(node, b"proof")
        tensor, params = tensor_at(node), rope_params(node)
        facts = {
            "type": (tensor.type, 0),
            "ne": (list(tensor.ne), [8, 3, 5, 1]),
            "nb": (list(tensor.nb), [4, 32, 96, 480]),
            "op": (lib.ggml_op_name(tensor.op), b"ROPE"),
            "src": (list(tensor.src), [vectors, positions, factors] + [None] * 7),
            "data": (tensor.data, lib.ggml_get_data(node)),
            "name": (tensor.name, b"proof"),
            "view_src": (tensor.view_src, None),
            "positions": (tensor_at(positions).type, 26),
            "n_dims": (params.n_dims, 8),
            "mode": (params.mode, 2),
            "n_ctx_orig": (params.n_ctx_orig, 77),
            "freq_base": (params.freq_base, 5e4),
            "freq_scale": (params.freq_scale, 0.5),
            "ext_factor": (params.ext_factor, 0.25),
            "attn_factor": (params.attn_factor, 1.5),
            "beta_fast": (params.beta_fast, 31.0),
            "beta_slow": (params.beta_slow, 2.0),
            "word access": (WORDS[(node >> 2) + OP_INDEX], tensor.op),
            "pointer access": (POINTERS[(node >> 3) + SRC2_INDEX], factors),
        }
        _prove(facts)
        _prove(_attention_facts(context, vectors))  # these are written to, so not before the layout is known
    finally:
        lib.ggml_free(context)


def _prove(facts: dict[str, tuple[Any, Any]]) -> None:
    for field, (found, expected) in facts.items():
        if found != expected:
            raise LayoutError(refusal(f"{field} reads {found!r} where {expected!r} was set"))


def _attention_facts(context: int, vectors: int) -> dict[str, tuple[Any, Any]]:
    """Return fields of FLASH_ATTN_EXT and CUSTOM nodes: as found on nodes created by ggml, and as expected."""
    lib = _library()
    function = CustomFunction(lambda *_: None)
    mask = lib.ggml_new_tensor_3d(context, 1, 3, 64, 1)  # GGML_TYPE_F16; older releases want its rows padded to 64
    node = lib.ggml_flash_attn_ext(context, vectors, vectors, vectors, mask, 0.5, 0.25, 3.0)
    tensor, params = tensor_at(node), attention_params(node)
    sources = (ctypes.c_void_p * 1)(vectors)
    custom = custom_params(lib.ggml_custom_4d(context, 0, 8, 3, 5, 1, sources, 1, function, _N_TASKS_MAX, 77))
    facts = {
        "attention op": (lib.ggml_op_name(tensor.op), b"FLASH_ATTN_EXT"),
        "attention src": (list(tensor.src)[:5], [vectors, vectors, vectors, mask, None]),
        "attention ne": (list(tensor.ne), [8, 5, 3, 1]),
        "scale": (params.scale, 0.5),
        "max_bias": (params.max_bias, 0.25),
        "logit_softcap": (params.logit_softcap, 3.0),
        "custom function": (custom.function, ctypes.cast(function, ctypes.c_void_p).value),
        "custom n_tasks": (custom.n_tasks, _N_TASKS_MAX),
        "custom userdata": (custom.userdata, 77),
        "custom size": (ctypes.sizeof(CustomParams) <= TensorStruct.op_params.size, True),
    }
    take_over(node, function)
    facts["taken over"] = (lib.ggml_op_name(tensor_at(node).op), b"CUSTOM")
    facts["kept scale"] = (custom_params(node).attention.scale, 0.5)
    return facts


def refusal(what: str) -> str:
    """The line that says why the installed llama-cpp-python is refused, and what to install."""
    return (
        f"llama-cpp-python {llama_cpp.__version__} cannot be used ({what}); supported: {SUPPORTED}."
        f" Install one with: pip install llama-cpp-python=={NEWEST}"
    )
