"""The header of a GGUF file: metadata, tensor infos, and where each value is stored. `reader` reads it.

Long values stay in the file until they are needed, and are then read with a size limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .values import ARRAY, ARRAY_HEAD, decode_array

MAX_READ = 64 << 20  # bytes of one array, long string or small tensor


class GGUFError(UserError):
    """A file that is not a GGUF file, or a broken or hostile one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One metadata value: its type, and the bytes [start, end) of the file that hold it, after the type tag.

    For an array, `item_type` and `count` describe its items, and the span starts with them. `value` is None for an
    array or a very long string: use the header's `array` or `get`.
    """

    key: str
    type: int
    item_type: int | None
    count: int
    start: int
    end: int
    value: Any


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: `shape` in ggml's order (fastest first), `offset` in bytes from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """Everything in a GGUF file that comes before the tensor data."""

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
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise GGUFError(f"{self.path}: general.architecture: {name!r}, expected the architecture's name")
        return name

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a scalar or string; `default` if there is none (or it is an array)."""
        entry = self.entries.get(key)
        if entry is None or entry.type == ARRAY:
            return default
        if entry.value is None:
            return self._read(entry, 8).decode("utf-8", errors="replace")
        return entry.value

    def number(self, key: str, default: float | None = None) -> float:
        """The value of `key` as a finite number.

        Raises:
            GGUFError: it is missing (without a default) or not a finite number.
        """
        value = self.get(key, default if key not in self.entries else None)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
            found = "an array" if key in self.entries and value is None else "missing" if value is None else repr(value)
            raise GGUFError(f"{self.path}: {key}: {found[:80]}, expected a number")
        return value

    def array(self, key: str) -> list[Any]:
        """The items of an array, decoded on this call; invalid UTF-8 in strings is replaced.

        Raises:
            GGUFError: the key is missing, its value is not an array, or it is larger than 64 MiB.
        """
        entry = self.entries.get(key)
        if entry is None or entry.item_type is None:
            raise GGUFError(f"{self.path}: {key}: {'missing' if entry is None else 'one value'}, expected an array")
        return decode_array(entry.item_type, entry.count, self._read(entry, ARRAY_HEAD))

    def tensor(self, name: str) -> Tensor | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)

    def tensor_data(self, tensor: Tensor) -> bytes:
        """The bytes of a (small) tensor.

        Raises:
            GGUFError: it is larger than 64 MiB, or cannot be read.
        """
        return self._bytes(tensor.name, self.data_start + tensor.offset, tensor.n_bytes)

    def _read(self, entry: Entry, head: int) -> bytes:
        return self._bytes(entry.key, entry.start + head, entry.end - entry.start - head)

    def _bytes(self, what: str, start: int, n: int) -> bytes:
        if n > MAX_READ:
            raise GGUFError(f"{self.path}: {what}: {n} bytes, expected at most {MAX_READ}")
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                raw = file.read(n)
        except OSError as error:
            raise GGUFError(f"{self.path}: cannot read the model: {error.strerror or error}") from None
        if len(raw) != n:
            raise GGUFError(f"{self.path}: {what}: the file became shorter while it was being read")
        return raw
