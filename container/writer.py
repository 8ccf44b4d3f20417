"""A writer of GGUF files from metadata and tensors that arrive in chunks, so that a file may be larger than memory.

The caller provides the chunks: from another GGUF file, or from a checkpoint in another format.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .header import GGUFError
from .reader import DEFAULT_ALIGNMENT, MAGIC
from .values import encode_string

VERSION = 3
CHUNK_BYTES = 4 << 20

Advance = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""

Chunks = Iterable["bytes | memoryview"]


@dataclass(frozen=True)
class MetadataSource:
    """One metadata value: `chunks` yields the `n_bytes` that follow its type tag."""

    key: str
    type: int
    n_bytes: int
    chunks: Chunks


@dataclass(frozen=True)
class TensorSource:
    """One tensor, `shape` in ggml's order: `chunks` yields its data of `n_bytes`."""

    name: str
    shape: tuple[int, ...]
    type: int
    n_bytes: int
    chunks: Chunks


def copied(path: Path, file: BinaryIO, start: int, n_bytes: int) -> Iterator[memoryview]:
    """Yield the bytes [start, start + n_bytes) of an open file, in chunks that share one buffer.

    Raises:
        GGUFError: the file cannot be read, or became shorter.
    """
    buffer = memoryview(bytearray(min(n_bytes, CHUNK_BYTES)))
    try:
        file.seek(start)
        while n_bytes:
            n = file.readinto(buffer[: min(n_bytes, CHUNK_BYTES)])  # type: ignore[attr-defined]
            if not n:
                raise GGUFError(f"{path}: became shorter while it was being read")
            yield buffer[:n]
            n_bytes -= n
    except OSError as error:
        raise GGUFError(f"{path}: cannot read the model: {error.strerror or error}") from None


def gguf_bytes(metadata: Sequence[MetadataSource], tensors: Sequence[TensorSource], alignment: int) -> int:
    """The number of bytes that `write_gguf` will write."""
    return _padded(_head_bytes(metadata, tensors), alignment) + sum(_padded(t.n_bytes, alignment) for t in tensors)


def write_gguf(
    file: BinaryIO,
    metadata: Sequence[MetadataSource],
    tensors: Sequence[TensorSource],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    on_progress: Advance | None = None,
) -> None:
    """Write a GGUF file, with the tensors in the given order, each at the next aligned offset."""
    total = gguf_bytes(metadata, tensors, alignment)
    done = write_gguf_head(file, metadata, tensors, alignment=alignment)
    for tensor in tensors:
        end = done + tensor.n_bytes
        for chunk in tensor.chunks:
            done += file.write(chunk)
            if on_progress is not None:
                on_progress(done, total)
        if done != end:
            raise RuntimeError(f"{tensor.name}: {done - end + tensor.n_bytes} bytes, expected {tensor.n_bytes}")
        done += file.write(bytes(-done % alignment))
    if on_progress is not None:
        on_progress(done, total)


def write_gguf_head(
    file: BinaryIO,
    metadata: Sequence[MetadataSource],
    tensors: Sequence[TensorSource],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
) -> int:
    """Write everything that comes before the tensor data, and return how many bytes that is."""
    done = file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for entry in metadata:
        done += file.write(encode_string(entry.key) + struct.pack("<I", entry.type))
        n_bytes = sum(file.write(chunk) for chunk in entry.chunks)
        if n_bytes != entry.n_bytes:
            raise RuntimeError(f"{entry.key}: {n_bytes} bytes, expected {entry.n_bytes}")
        done += n_bytes
    offset = 0
    for tensor in tensors:
        dims = len(tensor.shape)
        info = struct.pack(f"<I{dims}QIQ", dims, *tensor.shape, tensor.type, offset)
        done += file.write(encode_string(tensor.name) + info)
        offset += _padded(tensor.n_bytes, alignment)
    return done + file.write(bytes(-done % alignment))


def _head_bytes(metadata: Sequence[MetadataSource], tensors: Sequence[TensorSource]) -> int:
    values = sum(len(encode_string(entry.key)) + 4 + entry.n_bytes for entry in metadata)
    infos = sum(len(encode_string(tensor.name)) + 4 + 8 * len(tensor.shape) + 4 + 8 for tensor in tensors)
    return len(MAGIC) + 4 + 8 + 8 + values + infos


def _padded(n: int, alignment: int) -> int:
    return n + -n % alignment
