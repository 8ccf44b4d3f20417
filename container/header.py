"""The head of a GGUF file, read with bounds: metadata, tensor infos, and where each value lies.

No count or length from the file is believed before it is known to fit into the bytes that are left, and arrays are
stepped over, not loaded; so a hostile file costs no memory and a 250,000 token vocabulary a fraction of a second.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ..errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME, less its end mark
MAX_STRING_BYTES = 64 << 20
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
MAX_VALUE = 2**63 - 1
MIN_ENTRY_BYTES = 8 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8

SCALARS: Mapping[int, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<B",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
"""struct formats of the value types that have a fixed size."""


class GGUFError(UserError):
    """A file that is no GGUF, or a broken or hostile one."""


@dataclass(frozen=True)
class Entry:
    """One metadata value: its type, and the bytes [start, end) of the file that hold it, after the type's tag.

    For an array, `item_type` and `count` describe its items, the span begins with them, and `value` is None.
    """

    key: str
    type: int
    item_type: int | None
    count: int
    start: int
    end: int
    value: Any


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` in ggml's order (fastest first), `offset` in bytes from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """Everything a GGUF file says before its tensors' data."""

    path: Path
    version: int
    alignment: int
    entries: Mapping[str, Entry]
    tensors: tuple[Tensor, ...]
    data_start: int
    file_size: int

    @property
    def arch(self) -> str:
        """The architecture's name, the prefix of its keys."""
        name = self.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise GGUFError(f"{self.path}: general.architecture: {name!r}, expected the architecture's name")
        return name

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a scalar or string; `default` where there is none (or an array)."""
        entry = self.entries.get(key)
        return default if entry is None or entry.value is None else entry.value

    def number(self, key: str, default: float | None = None) -> float:
        """The value of `key` as a finite number.

        Raises:
            GGUFError: it is missing (and has no default) or is something else.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
            raise GGUFError(f"{self.path}: {key}: {value!r}, expected a number")
        return value

    def array(self, key: str) -> list[Any]:
        """The items of an array, decoded now; bytes that are no UTF-8 are replaced in strings.

        Raises:
            GGUFError: there is no such key or it is no array.
        """
        entry = self.entries.get(key)
        if entry is None or entry.item_type is None:
            raise GGUFError(f"{self.path}: {key}: expected an array")
        with self.path.open("rb") as file:
            file.seek(entry.start + 12)
            raw = file.read(entry.end - entry.start - 12)
        if entry.item_type != GGUFValueType.STRING:
            items = struct.unpack(f"<{entry.count}{SCALARS[entry.item_type][1]}", raw)
            return [bool(item) for item in items] if entry.item_type == GGUFValueType.BOOL else list(items)
        strings, at = [], 0
        for _ in range(entry.count):
            (length,) = struct.unpack_from("<Q", raw, at)
            strings.append(raw[at + 8 : at + 8 + length].decode("utf-8", errors="replace"))
            at += 8 + length
        return strings

    def tensor(self, name: str) -> Tensor | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the head of the GGUF file at `path`.

    Raises:
        GGUFError: it cannot be read, is no little-endian GGUF of version 2 or 3, is cut short anywhere (tensor data
            too), or claims what cannot be; the message names the file, the place and what was expected.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise GGUFError(f"{path}: cannot read the model: {error.strerror or error}") from None


class _Reader:
    """A cursor over the file that refuses to pass its end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.at = path, file, size, 0

    def fail(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path}: {what}")

    def header(self) -> Header:
        magic = self.file.read(4)
        if magic != MAGIC:
            found = "an empty file" if self.size == 0 else f"first bytes {magic!r}"
            raise self.fail(f"{found}, expected a GGUF file (b'GGUF')")
        self.at = 4
        version = self.scalar(GGUFValueType.UINT32, "version")
        if version not in VERSIONS:
            hint = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise self.fail(f"GGUF version {version}{hint}, expected {' or '.join(map(str, VERSIONS))}, little-endian")
        n_tensors = self.count("tensor count", MIN_TENSOR_BYTES)
        n_entries = self.count("metadata count", MIN_ENTRY_BYTES)
        entries: dict[str, Entry] = {}
        for i in range(n_entries):
            entry = self.entry(f"metadata entry {i + 1} of {n_entries}")
            if entry.key in entries:
                raise self.fail(f"{entry.key}: stands twice in the metadata")
            entries[entry.key] = entry
        alignment = entries["general.alignment"].value if "general.alignment" in entries else 32
        power_of_two = (
            isinstance(alignment, int) and 0 < alignment <= MAX_ALIGNMENT and alignment & (alignment - 1) == 0
        )
        if not power_of_two or alignment % 8:
            raise self.fail(f"general.alignment: {alignment!r}, expected a power of two from 8 to {MAX_ALIGNMENT}")
        tensors = self.tensors(n_tensors, alignment)
        data_start = -(-self.at // alignment) * alignment
        for tensor in tensors:
            end = data_start + tensor.offset + tensor.n_bytes
            if end > self.size:
                raise self.fail(
                    f"cut short in tensor {tensor.name!r}: its data ends at byte {end}, the file at {self.size}"
                )
        return Header(self.path, version, alignment, entries, tensors, data_start, self.size)

    # --- pieces

    def skip(self, n: int, what: str) -> None:
        if n > self.size - self.at:
            raise self.fail(f"cut short at byte {self.at} in {what}: {n} bytes expected, {self.size - self.at} left")
        self.file.seek(n, os.SEEK_CUR)
        self.at += n

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.at:
            raise self.fail(f"cut short at byte {self.at} in {what}: {n} bytes expected, {self.size - self.at} left")
        data = self.file.read(n)
        if len(data) != n:
            raise self.fail(f"cut short at byte {self.at + len(data)} in {what}")
        self.at += n
        return data

    def scalar(self, kind: int, what: str) -> Any:
        form = SCALARS[kind]
        (value,) = struct.unpack(form, self.take(struct.calcsize(form), what))
        return bool(value) if kind == GGUFValueType.BOOL else value

    def count(self, what: str, item_bytes: int) -> int:
        n: int = self.scalar(GGUFValueType.UINT64, what)
        if n * item_bytes > self.size - self.at:
            raise self.fail(f"{what} {n} cannot be: {n * item_bytes} bytes at least, {self.size - self.at} left")
        return n

    def string(self, what: str, limit: int) -> str:
        n = self.count(f"length of {what}", 1)
        if n > limit:
            raise self.fail(f"{what}: {n} bytes long, expected at most {limit}")
        raw = self.take(n, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what}: {raw[:20]!r} is no UTF-8") from None

    def entry(self, where: str) -> Entry:
        key = self.string(f"key of {where}", MAX_KEY_BYTES)
        kind = self.scalar(GGUFValueType.UINT32, f"type of {key!r}")
        start = self.at
        if kind in SCALARS:
            value = self.scalar(kind, key)
            return Entry(key, kind, None, 1, start, self.at, value)
        if kind == GGUFValueType.STRING:
            text = self.string(key, MAX_STRING_BYTES)
            return Entry(key, kind, None, 1, start, self.at, text)
        if kind != GGUFValueType.ARRAY:
            raise self.fail(f"{key}: value type {kind}, expected 0 to {max(GGUFValueType)}")
        item = self.scalar(GGUFValueType.UINT32, f"item type of {key}")
        if item in SCALARS:
            size = struct.calcsize(SCALARS[item])
            n = self.count(f"length of {key}", size)
            self.skip(n * size, key)
        elif item == GGUFValueType.STRING:
            n = self.count(f"length of {key}", 8)
            for _ in range(n):
                self.skip(self.count(f"a string of {key}", 1), key)
        else:
            raise self.fail(f"{key}: array of value type {item}, expected numbers, booleans or strings")
        return Entry(key, kind, item, n, start, self.at, None)

    def tensors(self, n_tensors: int, alignment: int) -> tuple[Tensor, ...]:
        tensors: dict[str, Tensor] = {}
        for i in range(n_tensors):
            name = self.string(f"name of tensor {i + 1} of {n_tensors}", MAX_NAME_BYTES)
            if name in tensors:
                raise self.fail(f"tensor {name!r}: stands twice")
            n_dims = self.scalar(GGUFValueType.UINT32, f"dimensions of tensor {name!r}")
            if not 0 <= n_dims <= MAX_DIMS:
                raise self.fail(f"tensor {name!r}: {n_dims} dimensions, expected at most {MAX_DIMS}")
            shape = tuple(self.scalar(GGUFValueType.UINT64, f"shape of tensor {name!r}") for _ in range(n_dims))
            kind = self.scalar(GGUFValueType.UINT32, f"type of tensor {name!r}")
            offset = self.scalar(GGUFValueType.UINT64, f"offset of tensor {name!r}")
            n_bytes = self.tensor_bytes(name, shape, kind)
            if offset % alignment:
                raise self.fail(f"tensor {name!r}: offset {offset}, expected a multiple of {alignment}")
            tensors[name] = Tensor(name, shape, kind, offset, n_bytes)
        found = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in zip(found, found[1:]):
            if before.offset + before.n_bytes > after.offset:
                raise self.fail(f"tensors {before.name!r} and {after.name!r} overlap at offset {after.offset}")
        return tuple(tensors.values())

    def tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise self.fail(f"tensor {name!r}: type {kind} is not one that ggml stores") from None
        elements = 1
        for n in shape:
            elements *= n
            if n == 0 or elements > MAX_VALUE:
                raise self.fail(f"tensor {name!r}: shape {list(shape)} cannot be")
        row = shape[0] if shape else 1
        if row % block:
            raise self.fail(f"tensor {name!r}: rows of {row}, expected a multiple of {block} for its type")
        return elements // block * size
