"""GGUF's metadata values as bytes: the table of their types, decoding and encoding.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple


class ValueType(IntEnum):
    """The format's numbers for the types of values."""

    UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)


U32, U64, F32, F64 = ValueType.UINT32, ValueType.UINT64, ValueType.FLOAT32, ValueType.FLOAT64
I64, BOOL, STRING, ARRAY = ValueType.INT64, ValueType.BOOL, ValueType.STRING, ValueType.ARRAY

SCALARS: Mapping[int, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    U32: "I",
    ValueType.INT32: "i",
    F32: "f",
    BOOL: "?",
    U64: "Q",
    I64: "q",
    F64: "d",
}
"""`struct` format characters of the value types that have a fixed size."""

EVALUATION = "ropewalk.evaluation."
"""What the keys of an evaluation start with."""

ARRAY_HEAD = 4 + 8
"""Bytes of an array before its items: their type and their count."""


class Value(NamedTuple):
    """One metadata value to write, with its GGUF type; `item_type` is that of an array's items."""

    key: str
    type: int
    value: Any
    item_type: int | None = None


def scalar_size(kind: int) -> int:
    return struct.calcsize("<" + SCALARS[kind])


def decode_scalar(kind: int, raw: bytes) -> Any:
    return struct.unpack("<" + SCALARS[kind], raw)[0]


def decode_array(item_type: int, count: int, raw: bytes) -> list[Any]:
    """The items of an array, from the bytes after its head; invalid UTF-8 in strings is replaced."""
    if item_type != STRING:
        return list(struct.unpack(f"<{count}{SCALARS[item_type]}", raw))
    strings, at = [], 0
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, at)
        strings.append(raw[at + 8 : at + 8 + length].decode("utf-8", errors="replace"))
        at += 8 + length
    return strings


def encode_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def encode(value: Value) -> bytes:
    """The bytes that follow a value's type tag in the file."""
    if value.type == STRING:
        return encode_string(value.value)
    if value.type != ARRAY:
        return struct.pack("<" + SCALARS[value.type], value.value)
    assert value.item_type is not None
    items: Sequence[Any] = value.value
    head = struct.pack("<IQ", value.item_type, len(items))
    if value.item_type == STRING:
        return head + b"".join(map(encode_string, items))
    return head + struct.pack(f"<{len(items)}{SCALARS[value.item_type]}", *items)
