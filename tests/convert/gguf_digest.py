"""A digest of a GGUF file's contents, short enough to be kept: equal for two files exactly if their contents are.

It uses gguf's own reader and nothing else, so that it can check the files of any writer.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARRAY, STRING = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
SHORT_ARRAY, SHORT_STRING = 16, 100
"""Arrays and strings up to these lengths are kept whole, longer ones as a digest."""


class _Reader(gguf.GGUFReader):
    """gguf's reader with the items of an array in one part; the original takes seconds to split off every string."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        start = end = orig_offs + 12
        if kind[0] == STRING:
            view = memoryview(self.data)
            for _ in range(int(length[0])):
                end += 8 + int.from_bytes(view[end : end + 8], "little")
        else:
            end += int(length[0]) * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(kind[0])]).itemsize
        parts = [kind, length, self.data[start:end]]
        return end - orig_offs, parts, [2], [gguf.GGUFValueType(raw_type), gguf.GGUFValueType(kind[0])]


def gguf_digest(path: Path) -> dict[str, dict[str, Any]]:
    """Metadata and tensors of a file, in the file's order, as JSON values.

    Returns:
        ``metadata``: key → [type, value]; ``tensors``: name → [type, shape as GGUF has it, digest of the numbers].
        An array's type is that of its items and ``[]``. A long value is ``{"length": …, "sha256": …}``, with the
        digest of a string's bytes, or of an array's items as GGUF stores them (each string after 8 bytes of length).
        Digests are the first half of a SHA-256.
    """
    reader = _Reader(path)
    return {
        "metadata": {
            name: _value(field) for name, field in reader.fields.items() if not name.startswith("GGUF.")
        },  # "GGUF." fields are the reader's own, about the file's header
        "tensors": {
            tensor.name: [tensor.tensor_type.name, [int(n) for n in tensor.shape], _sha256(tensor.data.tobytes())]
            for tensor in reader.tensors
        },
    }


def string_arrays(path: Path) -> dict[str, tuple[str, ...]]:
    """All metadata values that are arrays of strings."""
    return {
        name: tuple(_items(field.parts[5].tobytes(), STRING, int(field.parts[4][0])))
        for name, field in _Reader(path).fields.items()
        if field.types == [ARRAY, STRING]
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One line for each entry that differs between two parts of a digest."""
    lines = [f"{name}: missing, expected {expected[name]}" for name in expected if name not in found]
    lines += [f"{name}: {found[name]}, expected none" for name in found if name not in expected]
    both = [name for name in expected if name in found and found[name] != expected[name]]
    return lines + [f"{name}: {found[name]}, expected {expected[name]}" for name in both]


def _value(field: gguf.ReaderField) -> list[Any]:
    if field.types[0] != ARRAY:
        value = field.contents()
        long = isinstance(value, str) and len(value) > SHORT_STRING
        return [field.types[0].name, _long(len(value), value.encode()) if long else value]
    kind, length = gguf.GGUFValueType(int(field.parts[3][0])), int(field.parts[4][0])
    raw = field.parts[5].tobytes()
    return [f"{kind.name}[]", _items(raw, kind, length) if length <= SHORT_ARRAY else _long(length, raw)]


def _items(raw: bytes, kind: gguf.GGUFValueType, length: int) -> list[Any]:
    if kind != STRING:
        return np.frombuffer(raw, gguf.GGUFReader.gguf_scalar_to_np[kind], length).tolist()
    items, at = [], 0
    for _ in range(length):
        end = at + 8 + int.from_bytes(raw[at : at + 8], "little")
        items.append(raw[at + 8 : end].decode())
        at = end
    return items


def _long(length: int, raw: bytes) -> dict[str, Any]:
    return {"length": length, "sha256": _sha256(raw)}


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:32]
