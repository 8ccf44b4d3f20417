"""The documents that the user named: files, folders, patterns and JSON Lines records, each with an id and its text.

A wrong name (no such file, a pattern that matches nothing) is a `UserError` before any work. A document that turns out
to be unreadable, binary, empty or not UTF-8 has its `error` set instead, and the others are still processed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from ..errors import UserError

SUFFIXES = (".txt", ".md", ".markdown", ".rst")
RECORD_SUFFIXES = (".jsonl", ".ndjson")
MAX_BYTES = 1 << 30


class DocumentError(UserError):
    """A document that exists but cannot be used."""


@dataclass(frozen=True)
class Document:
    """One text to process, or the `error` that took its place.

    `source` is the file, with the line number for a record; `digest` is the SHA-256 of the input's bytes; `n_bytes` is
    how many bytes of the file it accounts for.
    """

    id: str
    source: str
    text: str
    digest: str
    n_bytes: int
    error: str | None = None


def find_files(names: Sequence[str], *, records: bool, leave_out: Path | None = None) -> list[Path]:
    """Find the files that `names` refer to, each once, in the order given; folders and patterns in sorted order.

    A folder stands for its text files at any depth, hidden ones excepted, and with `records` for its JSON Lines files
    as well. `leave_out` is a file that is not an input even if a folder or pattern contains it: the output.

    Raises:
        UserError: a name that matches nothing, or something that is not a file.
    """
    found: dict[str, Path] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            group = _in_folder(path, records)
        elif has_magic(name) and not path.exists():
            group = _matching(name, records)
        else:
            group = [_named(path)]
        group = [file for file in group if not _is_same(file, leave_out)]
        if not group:
            raise UserError(f"{name}: no documents there (expected {', '.join(_suffixes(records))} files)")
        for file in group:
            found.setdefault(os.path.realpath(file), file)
    files = list(found.values())
    lines = [file for file in files if is_records(file)]
    if lines and not records:
        raise UserError(f"{lines[0]}: JSON Lines need --field, the name of the field that holds the text")
    if records and not lines:
        raise UserError("--field: none of the inputs is a .jsonl file")
    return files


def is_records(path: Path) -> bool:
    """Whether the file holds one document per line."""
    return path.suffix.lower() in RECORD_SUFFIXES


def read_documents(files: Sequence[Path], field: str | None = None) -> Iterator[Document]:
    """Yield every document in `files`; each is read only when it is next."""
    for file in files:
        if field is not None and is_records(file):
            yield from _read_records(file, field)
            continue
        try:
            raw = _read_bytes(file)
        except DocumentError as error:
            yield Document(str(file), str(file), "", "", 0, error=str(error))
        else:
            yield _document(str(file), str(file), raw, len(raw))


def _document(name: str, source: str, raw: bytes, n_bytes: int) -> Document:
    text, error = "", None
    try:
        text = as_text(raw)
    except DocumentError as problem:
        error = str(problem)
    return Document(name, source, text, hashlib.sha256(raw).hexdigest(), n_bytes, error)


def read_document(path: Path) -> str:
    """Return the text of one file.

    Raises:
        DocumentError: missing, unreadable, binary, empty or not UTF-8; the message does not name the file.
    """
    return as_text(_read_bytes(path))


def as_text(raw: bytes) -> str:
    """Decode bytes to text with plain newlines.

    Raises:
        DocumentError: they are binary, empty or not UTF-8.
    """
    if b"\0" in raw:
        raise DocumentError(f"binary (a NUL byte at offset {raw.index(0)}), expected UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 (byte {raw[error.start]:#04x} at offset {error.start})") from None
    if not text.strip():
        raise DocumentError("empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path) -> bytes:
    try:
        with _open(path) as file:
            raw: bytes = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise DocumentError(f"larger than {MAX_BYTES >> 20} MiB")
    return raw


def _open(path: Path) -> Any:
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path.open("rb")


def _read_records(path: Path, field: str) -> Iterator[Document]:
    """Yield one document per line; blank lines are skipped."""
    empty = True
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    yield _record(f"{path}:{number}", line, field)
    except OSError as error:
        yield Document(str(path), str(path), "", "", 0, error=f"cannot be read: {error.strerror or error}")
        return
    if empty:
        yield Document(str(path), str(path), "", "", 0, error="empty")


def _record(source: str, line: bytes, field: str) -> Document:
    name = source
    try:
        record = _parse(line)
        own = record.get("id")
        if isinstance(own, (str, int)) and not isinstance(own, bool) and own != "":
            name = str(own)
        if field not in record:
            raise DocumentError(f"no field {field!r}, found {', '.join(map(repr, list(record)[:8])) or 'none'}")
        value = record[field]
        if not isinstance(value, str):
            raise DocumentError(f"field {field!r} is {type(value).__name__}, expected text")
        return _document(name, source, value.encode("utf-8", "surrogatepass"), len(line))
    except DocumentError as error:
        return Document(name, source, "", "", len(line), error=str(error))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 (byte {line[error.start]:#04x} at offset {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DocumentError(f"a JSON {type(record).__name__}, expected an object")
    return record


def _suffixes(records: bool) -> tuple[str, ...]:
    return (*SUFFIXES, *RECORD_SUFFIXES) if records else SUFFIXES


def _in_folder(folder: Path, records: bool) -> list[Path]:
    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}")

    found = []
    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(file for file in found if file.suffix.lower() in _suffixes(records))


def _matching(pattern: str, records: bool) -> list[Path]:
    # glob.glob and not Path.glob: it takes absolute patterns and skips hidden files
    found: list[Path] = []
    for path in sorted(map(Path, glob(str(Path(pattern).expanduser()), recursive=True))):  # noqa: PTH207
        found += _in_folder(path, records) if path.is_dir() else [path]
    return found


def _named(path: Path) -> Path:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file or folder")
    return path


def _is_same(path: Path, other: Path | None) -> bool:
    return other is not None and os.path.realpath(path) == os.path.realpath(other)
