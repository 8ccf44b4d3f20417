"""A bounds-checked reader for the header of a GGUF file.

No count or length from the file is trusted before it is known to fit in the bytes that are left, long values are
skipped instead of loaded, and the text that is kept is limited; so a hostile file cannot exhaust memory, and a
vocabulary of 250,000 tokens takes a fraction of a second. Versions 2 and 3, little-endian.
"""

from __future__ import annotations

import os
import stat
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from .header import Entry, GGUFError, Header, Tensor
from .tensor_types import TENSOR_TYPES
from .values import ARRAY, SCALARS, STRING, U32, U64, ValueType, decode_scalar, scalar_size

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_ENTRIES = 1 << 14
MAX_TENSORS = 1 << 16
MAX_DIMS = 4
MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME, without the terminating zero
MAX_KEY_BYTES = 65_535
MAX_ELEMENTS = 2**63 - 1
MIN_ENTRY_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8

LONG_STRING = 1 << 16  # bytes from which a string is only read when needed
MAX_KEPT_TEXT = 8 << 20  # bytes of all keys and short strings together


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the GGUF file at `path`.

    Raises:
        GGUFError: it cannot be read, is not a little-endian GGUF file of version 2 or 3, is cut short anywhere (in
            the tensor data, too), or has impossible values; the message names the file, the place and what was
            expected.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block forever
            raise GGUFError(f"{path}: {'a folder' if path.is_dir() else 'not a regular file'}, expected a GGUF file")
        with path.open("rb") as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise GGUFError(f"{path}: cannot read the model: {error.strerror or error}") from None


class _Reader:
    """A cursor over the file that refuses to read past its end or to keep more text than is sensible."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at = self.kept = 0

    def fail(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path}: {what}")

    def header(self) -> Header:
        magic = self.file.read(4)
        if magic != MAGIC:
            found = "an empty file" if self.size == 0 else f"starts with {magic!r}"
            raise self.fail(f"{found}, expected a GGUF file (b'GGUF')")
        self.at = 4
        version = self.scalar(U32, "version")
        if version not in VERSIONS:
            found = "is big-endian" if version & 0xFFFF == 0 else f"is GGUF version {version}"
            raise self.fail(f"{found}, expected little-endian GGUF version {' or '.join(map(str, VERSIONS))}")
        n_tensors = self.count("number of tensors", MIN_TENSOR_BYTES, MAX_TENSORS)
        n_entries = self.count("number of metadata entries", MIN_ENTRY_BYTES, MAX_ENTRIES)
        entries: dict[str, Entry] = {}
        for i in range(n_entries):
            entry = self.entry(f"metadata entry {i + 1} of {n_entries}")
            if entry.key in entries:
                raise self.fail(f"{entry.key}: appears twice in the metadata, again before byte {self.at}")
            entries[entry.key] = entry
        alignment = self.alignment(entries.get("general.alignment"))
        tensors = self.tensors(n_tensors, alignment)
        data_start = -(-self.at // alignment) * alignment
        for tensor in tensors:
            end = data_start + tensor.offset + tensor.n_bytes
            if end > self.size:
                raise self.fail(
                    f"cut short in tensor {tensor.name!r}: its data ends at byte {end}, the file at {self.size}"
                )
        return Header(self.path, version, alignment, entries, tensors, data_start, self.size)

    def alignment(self, entry: Entry | None) -> int:
        if entry is None:
            return DEFAULT_ALIGNMENT
        value = entry.value
        if entry.type != U32 or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise self.fail(f"general.alignment: {value!r}, expected a power of two up to {MAX_ALIGNMENT} (uint32)")
        return int(value)

    # --- parts of the header

    def fits(self, n: int, what: str) -> None:
        if n > self.size - self.at:
            raise self.fail(f"cut short at byte {self.at} in {what}: {n} bytes expected, {self.size - self.at} left")

    def skip(self, n: int, what: str) -> None:
        self.fits(n, what)
        self.file.seek(n, os.SEEK_CUR)
        self.at += n

    def take(self, n: int, what: str) -> bytes:
        self.fits(n, what)
        data = self.file.read(n)
        if len(data) != n:
            raise self.fail(f"cut short at byte {self.at + len(data)} in {what}")
        self.at += n
        return data

    def scalar(self, kind: int, what: str) -> Any:
        return decode_scalar(kind, self.take(scalar_size(kind), what))

    def count(self, what: str, item_bytes: int, limit: int = MAX_ELEMENTS) -> int:
        """Read a number of items of at least `item_bytes` each, which must fit in the bytes that are left."""
        (n,) = struct.unpack("<Q", self.take(8, what))
        if n > limit:
            raise self.fail(f"{what} at byte {self.at - 8}: {n}, expected at most {limit}")
        if n * item_bytes > self.size - self.at:
            raise self.fail(f"{what} at byte {self.at - 8}: {n}, but only {self.size - self.at} bytes are left")
        return int(n)

    def keep(self, n: int, what: str) -> bytes:
        self.kept += n
        if self.kept > MAX_KEPT_TEXT:
            raise self.fail(f"{what}: more than {MAX_KEPT_TEXT >> 20} MiB of text in the metadata up to here")
        return self.take(n, what)

    def name(self, what: str, limit: int) -> str:
        raw = self.keep(self.count(f"length of {what}", 1, limit), what)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        if not text.isprintable() or not text:
            raise self.fail(f"{what}: {raw[:20]!r}, expected printable text")
        return text

    def entry(self, where: str) -> Entry:
        key = self.name(f"key of {where}", MAX_KEY_BYTES)
        kind, start = self.scalar(U32, f"type of {key}"), self.at
        if kind in SCALARS:
            return Entry(key, kind, None, 1, start, self.at + scalar_size(kind), self.scalar(kind, key))
        if kind == STRING:
            n, text = self.count(f"length of {key}", 1), None
            if n >= LONG_STRING:
                self.skip(n, key)
            else:
                text = self.keep(n, key).decode("utf-8", errors="replace")
            return Entry(key, kind, None, 1, start, self.at, text)
        if kind != ARRAY:
            raise self.fail(f"{key}: value type {kind}, expected 0 to {max(ValueType)}")
        item = self.scalar(U32, f"item type of {key}")
        if item in SCALARS:
            n = self.count(f"length of {key}", scalar_size(item))
            self.skip(n * scalar_size(item), key)
        elif item == STRING:
            n = self.count(f"length of {key}", 8)
            for _ in range(n):
                self.skip(self.count(key, 1), key)
        else:
            raise self.fail(f"{key}: array of value type {item}, expected numbers, booleans or strings")
        return Entry(key, kind, item, n, start, self.at, None)

    def tensors(self, n_tensors: int, alignment: int) -> tuple[Tensor, ...]:
        tensors: dict[str, Tensor] = {}
        for i in range(n_tensors):
            name = self.name(f"name of tensor {i + 1} of {n_tensors}", MAX_NAME_BYTES)
            if name in tensors:
                raise self.fail(f"tensor {name!r}: appears twice")
            n_dims = self.scalar(U32, f"dimensions of tensor {name!r}")
            if n_dims > MAX_DIMS:
                raise self.fail(f"tensor {name!r}: {n_dims} dimensions, expected at most {MAX_DIMS}")
            shape = tuple(self.scalar(U64, f"shape of tensor {name!r}") for _ in range(n_dims))
            kind = self.scalar(U32, f"type of tensor {name!r}")
            offset = self.scalar(U64, f"offset of tensor {name!r}")
            if offset % alignment:
                raise self.fail(f"tensor {name!r}: offset {offset}, expected a multiple of {alignment}")
            tensors[name] = Tensor(name, shape, kind, offset, self.tensor_bytes(name, shape, kind))
        in_file = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(in_file):
            if before.offset + before.n_bytes > after.offset:
                raise self.fail(f"tensors {before.name!r} and {after.name!r} overlap at offset {after.offset}")
        return tuple(tensors.values())

    def tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        if kind not in TENSOR_TYPES:
            raise self.fail(f"tensor {name!r}: type {kind}, expected a type that ggml stores")
        _, block, size = TENSOR_TYPES[kind]
        elements = 1
        for n in shape:
            elements *= n
            if n == 0 or elements > MAX_ELEMENTS:
                raise self.fail(
                    f"tensor {name!r}: shape {list(shape)}, expected sizes of at least 1 that fit in a file"
                )
        row = shape[0] if shape else 1
        if row % block:
            raise self.fail(f"tensor {name!r}: rows of {row}, expected a multiple of {block} for its type")
        return int(elements // block * size)
