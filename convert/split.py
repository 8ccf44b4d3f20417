"""Split a GGUF file into several smaller ones, in the format of llama.cpp's gguf-split: loading the first loads all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from gguf import GGUFValueType

from ..container import GGUFError, Header, Tensor, Value, read_header
from ..container.writer import Advance, MetadataSource, TensorSource, copied, gguf_bytes, write_gguf
from ..errors import UserError
from .embed import check_source, encoded
from .from_gguf import Bar, no_bar
from .output import check_space, output_file, whole_file

UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}
MAX_PARTS = 65535  # counted in 16 bits, and named in five digits


def parse_size(text: str) -> int:
    """Return the bytes in a size like 500M or 2G; units are powers of 1000, as in gguf-split.

    Raises:
        UserError: it is not such a size.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if not match or not int(match[1]):
        raise UserError(f"split size: {text!r}, expected a number like 500M or 2G")
    return int(match[1]) * UNITS[match[2]]


def split_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    max_bytes: int,
    *,
    force: bool = False,
    on_progress: Advance | None = None,
) -> tuple[Path, ...]:
    """Write the model in `source` as files with at most `max_bytes` of tensors each, and return their paths.

    They are `target`-00001-of-00003.gguf and so on, or `target` itself if one is enough; the first, which loads the
    others, appears last.

    Raises:
        UserError: a tensor is larger than that, or the output cannot be written; nothing of it is left then.
    """
    header = read_header(source)
    check_source(header)
    parts = _parts(header, max_bytes)
    place = Path(target)
    names = [place] if len(parts) == 1 else [_name(place, i, len(parts)) for i in range(len(parts))]
    total = sum(tensor.n_bytes for tensor in header.tensors)
    before = 0
    with ExitStack() as stack, _open(header) as file:
        outputs = [stack.enter_context(output_file(name, source=header.path, force=force)) for name in names]
        check_space(place, header.file_size)
        for i, (tensors, output) in enumerate(zip(parts, outputs, strict=True)):
            metadata = list(_metadata(header, file, i, len(parts)))
            sources = [_copy(header, file, tensor) for tensor in tensors]
            size = gguf_bytes(metadata, sources, header.alignment)

            def advance(done: int, of: int, before: int = before) -> None:
                if on_progress is not None:
                    on_progress(min(before + done, total), total)

            with output.part.open("rb+") as part:
                write_gguf(part, metadata, sources, alignment=header.alignment, on_progress=advance)
            before += size
    return tuple(names)


def in_parts(
    convert: Callable[[Path], None], target: Path, max_bytes: int, *, force: bool = False, bar: Bar = no_bar
) -> tuple[Path, ...]:
    """Let `convert` write a whole file next to `target`, split it, and remove it again.

    Raises:
        UserError: as for `split_model`, and as raised by `convert`; or another run is writing there.
    """
    with whole_file(target) as whole:
        convert(whole)
        with bar("Splitting") as advance:
            return split_model(whole, target, max_bytes, force=force, on_progress=advance)


def _parts(header: Header, max_bytes: int) -> list[list[Tensor]]:
    parts: list[list[Tensor]] = [[]]
    size = 0
    for tensor in header.tensors:
        if tensor.n_bytes > max_bytes:
            raise UserError(
                f"split size: {max_bytes:,} bytes, expected at least the {tensor.n_bytes:,} of {tensor.name} alone"
            )
        if size + tensor.n_bytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.n_bytes
    if len(parts) > MAX_PARTS:
        raise UserError(
            f"split size: {max_bytes:,} bytes would make {len(parts):,} files, expected at most {MAX_PARTS:,}"
        )
    return parts


def _name(target: Path, i: int, n: int) -> Path:
    return target.with_name(f"{target.stem}-{i + 1:05d}-of-{n:05d}.gguf")


def _open(header: Header) -> BinaryIO:
    try:
        return header.path.open("rb", buffering=0)
    except OSError as error:
        raise GGUFError(f"{header.path}: cannot read the model: {error.strerror or error}") from None


def _metadata(header: Header, file: BinaryIO, i: int, n: int) -> Iterator[MetadataSource]:
    """All of the model's metadata in the first file; in every file, its number and how many there are."""
    for key, entry in header.entries.items() if i == 0 else ():
        if not key.startswith("split."):
            n_bytes = entry.end - entry.start
            yield MetadataSource(key, entry.type, n_bytes, copied(header.path, file, entry.start, n_bytes))
    if n > 1:
        yield encoded(Value("split.no", GGUFValueType.UINT16, i))
        yield encoded(Value("split.count", GGUFValueType.UINT16, n))
        yield encoded(Value("split.tensors.count", GGUFValueType.INT32, len(header.tensors)))


def _copy(header: Header, file: BinaryIO, tensor: Tensor) -> TensorSource:
    chunks = copied(header.path, file, header.data_start + tensor.offset, tensor.n_bytes)
    return TensorSource(tensor.name, tensor.shape, tensor.type, tensor.n_bytes, chunks)
