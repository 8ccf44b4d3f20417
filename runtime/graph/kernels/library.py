"""The compiled library, loaded through ctypes: which instruction sets it has here, and one context's state in it.

A node that is taken over calls the library on ggml's own threads: neither Python nor its lock is involved.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import ggml

LAYOUT = (
    *(getattr(ggml.TensorStruct, field).offset for field in ("type", "ne", "nb", "op", "op_params", "src")),
    *(getattr(ggml.TensorStruct, field).offset for field in ("view_src", "data", "name", "extra")),
    ctypes.sizeof(ggml.TensorStruct),
    *(getattr(ggml.CustomParams, field).offset for field in ("function", "userdata", "attention")),
)
"""What `ropewalk_layout` in kernels.c must return."""

EXACT = "ROPEWALK_EXACT"
"""Environment variable: 1 = compute in floats where bfloat16 would be faster."""

INSTRUCTIONS = "ROPEWALK_INSTRUCTIONS"
"""Environment variable: the name of an instruction set to use instead of the fastest one ("AVX2")."""


@dataclass(frozen=True)
class InstructionSet:
    """What the kernels can use on this processor: their number in the library, and a name for people."""

    index: int
    name: str


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
    return _loaded()[1]


class Context:
    """The library's state for one llama.cpp context; keep it alive as long as that."""

    def __init__(self, instructions: InstructionSet | None = None, exact: bool | None = None) -> None:
        """Use `instructions` (default: the fastest) and floats alone if `exact` (default: by the environment)."""
        library = _library()
        assert library is not None, why_missing()
        chosen = instructions or _default_set()
        self.instructions = chosen
        self.exact = os.environ.get(EXACT, "") not in ("", "0") if exact is None else exact
        self.address: int | None = library.ropewalk_new(chosen.index, self.exact)
        if not self.address:
            raise MemoryError("the kernels' buffers could not be allocated")
        self._library = library
        for code, kind in ggml.block_types().items():
            function = ctypes.cast(kind.dequantise, ctypes.c_void_p)  # type: ignore[arg-type]
            library.ropewalk_set_type(self.address, code, kind.block, kind.block_bytes, function)

    @property
    def attention(self) -> int:
        """The address of the function that computes an attention node."""
        return _address(self._library.ropewalk_attention)

    @property
    def product(self) -> int:
        """The address of the function that computes a product of a stored weight."""
        return _address(self._library.ropewalk_product)

    def covers_product(self, node: int) -> bool:
        """Whether the MUL_MAT node at an address is one that `product` computes."""
        return bool(self._library.ropewalk_covers_product(self.address, node))

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


def _address(function: ctypes._CFuncPtr) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def _default_set() -> InstructionSet:
    sets, wanted = instruction_sets(), os.environ.get(INSTRUCTIONS, "")
    return next((one for one in sets if one.name == wanted), sets[0])


def _library() -> ctypes.CDLL | None:
    return _loaded()[0]


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library with its functions declared, or why it cannot be used."""
    path = Path(__file__).with_name("_kernels" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
    if os.environ.get("ROPEWALK_KERNELS", "1") == "0":
        return None, "ROPEWALK_KERNELS is 0"
    if not path.exists():
        return None, "not compiled when Ropewalk was installed (is there a C compiler?)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}"
    pointer, c_int, c_int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.ropewalk_instruction_set.restype, library.ropewalk_instruction_set.argtypes = ctypes.c_char_p, (c_int,)
    library.ropewalk_new.restype, library.ropewalk_new.argtypes = pointer, (c_int, ctypes.c_bool)
    library.ropewalk_free.restype, library.ropewalk_free.argtypes = None, (pointer,)
    library.ropewalk_set_type.restype = None
    library.ropewalk_set_type.argtypes = (pointer, c_int, c_int64, c_int64, pointer)
    library.ropewalk_taken.restype, library.ropewalk_taken.argtypes = c_int64, (pointer,)
    library.ropewalk_failure.restype, library.ropewalk_failure.argtypes = ctypes.c_char_p, (pointer,)
    library.ropewalk_forgive.restype, library.ropewalk_forgive.argtypes = None, (pointer,)
    library.ropewalk_attention.restype = None
    library.ropewalk_attention.argtypes = (pointer, c_int, c_int, pointer)
    library.ropewalk_product.restype, library.ropewalk_product.argtypes = None, (pointer, c_int, c_int, pointer)
    library.ropewalk_covers_product.restype = ctypes.c_bool
    library.ropewalk_covers_product.argtypes = (pointer, pointer)
    offsets = (c_int64 * 32)()
    if tuple(offsets[: library.ropewalk_layout(offsets)]) != LAYOUT:
        return None, "it was compiled for another layout of ggml's tensors"
    return library, ""
