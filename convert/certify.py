"""An evaluation written into the GGUF file that was evaluated: everything else in it is copied byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..container import EVALUATION, Certificate, GGUFError, Header, certificate_values, read_header
from ..container.writer import Advance, MetadataSource, TensorSource, copied, gguf_bytes, write_gguf
from ..errors import UserError
from ..files import replacement
from .embed import check_source, encoded
from .output import check_space


def check_certifiable(path: Path) -> None:
    """Refuse a file that cannot be replaced by one with an evaluation in it.

    So is a link: other programs keep models under names that are digests of their contents.

    Raises:
        UserError: it is a link or has another name, is one of several parts, or not a whole model.
    """
    if path.is_symlink() or path.suffix != ".gguf":
        what = "is a link" if path.is_symlink() else "has another name"
        raise UserError(f"{path}: {what}, expected the model's own .gguf file to write the evaluation into")
    check_source(read_header(path))


def certify(path: Path, certificate: Certificate, *, on_progress: Advance | None = None) -> None:
    """Write an evaluation into a model's file, in place of one that is there; it is replaced in one step.

    Raises:
        UserError: as `check_certifiable`; the file cannot be read, or its folder not written to; the disk is full.
    """
    check_certifiable(path)
    header = read_header(path)
    try:
        with path.open("rb", buffering=0) as file:
            metadata = list(_metadata(header, certificate, file))
            tensors = list(_tensors(header, file))
            check_space(path, gguf_bytes(metadata, tensors, header.alignment))
            with replacement(path) as part:
                write_gguf(part, metadata, tensors, alignment=header.alignment, on_progress=on_progress)
    except OSError as error:
        raise GGUFError(f"{path}: cannot write: {error.strerror or error}") from None


def _metadata(header: Header, certificate: Certificate, file: BinaryIO) -> Iterator[MetadataSource]:
    for key, entry in header.entries.items():
        if not key.startswith(EVALUATION):
            n_bytes = entry.end - entry.start
            yield MetadataSource(key, entry.type, n_bytes, copied(header.path, file, entry.start, n_bytes))
    for value in certificate_values(certificate):
        yield encoded(value, "the evaluation")


def _tensors(header: Header, file: BinaryIO) -> Iterator[TensorSource]:
    for tensor in header.tensors:
        start = header.data_start + tensor.offset
        chunks = copied(header.path, file, start, tensor.n_bytes)
        yield TensorSource(tensor.name, tensor.shape, tensor.type, tensor.n_bytes, chunks)
