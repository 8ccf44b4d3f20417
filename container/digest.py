"""Digests that tell one model from another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import UserError
from .parts import model_parts
from .reader import read_header
from .values import EVALUATION

WHOLE_DIGEST_BYTES = 256 << 20
SAMPLE_BYTES, SAMPLE_EVERY = 4096, 1 << 20


def model_digest(path: str | os.PathLike[str]) -> str:
    """Return a SHA-256 digest that tells one model from another, in one file or several.

    It covers all of a file up to 256 MiB; of a larger one its size, its first 16 MiB (the header) and 4 KiB in every
    MiB, which reaches into every large tensor: another fine-tune or quantisation differs in all of them.

    Raises:
        UserError: a file cannot be read, or is not a GGUF file.
    """
    digest = hashlib.sha256()
    for part in model_parts(read_header(path)):
        try:
            _add(part.path, digest)
        except OSError as error:
            raise UserError(f"{part.path}: cannot read the model: {error.strerror or error}") from None
    return digest.hexdigest()


def uncertified_digest(path: str | os.PathLike[str]) -> str:
    """Return a digest like `model_digest` that stays the same when an evaluation is written into the file.

    Raises:
        UserError: as `model_digest`.
    """
    digest = hashlib.sha256()
    for part in model_parts(read_header(path)):
        try:
            with part.path.open("rb") as file:
                for entry in part.entries.values():
                    if not entry.key.startswith(EVALUATION):
                        file.seek(entry.start)
                        digest.update(repr((entry.key, entry.type, entry.end - entry.start)).encode())
                        for start in range(entry.start, entry.end, SAMPLE_EVERY):
                            digest.update(file.read(min(SAMPLE_EVERY, entry.end - start)))
            digest.update(repr(part.tensors).encode())
            _add(part.path, digest, part.data_start)
        except OSError as error:
            raise UserError(f"{part.path}: cannot read the model: {error.strerror or error}") from None
    return digest.hexdigest()


def _add(path: Path, digest: hashlib._Hash, first: int = 0) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - first
        digest.update(str(size).encode())
        whole = size if size <= WHOLE_DIGEST_BYTES else 16 << 20
        for start in range(0, size, SAMPLE_EVERY):
            file.seek(first + start)
            digest.update(file.read(SAMPLE_EVERY if start < whole else SAMPLE_BYTES))
