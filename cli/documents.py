"""The documents that the user named: files, folders, patterns and JSON Lines records, each with an id and its text.

Where nothing can be read, that is a `UserError` before any work. A document among others that is missing, unreadable,
binary, empty or in an unknown encoding has its `error` set instead, and the others are still processed. What a folder
holds besides is counted.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import itertools
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from ..errors import UserError

SUFFIXES = (".txt", ".md", ".markdown", ".rst")
RECORD_SUFFIXES = (".jsonl", ".ndjson")
MAX_BYTES = 1 << 30
PART_BYTES = 1 << 24
FALLBACK = "cp1252"

BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, the longer one first where it starts with another."""

FORMATS = {
    b"%PDF-": "a PDF file",
    b"%!PS": "a PostScript file",
    b"{\\rtf": "an RTF file",
    b"PK\x03\x04": "a ZIP file (docx, odt, epub?)",
    b"\xd0\xcf\x11\xe0": "an old Office file",
    b"\x1f\x8b": "a gzip file",
    b"7z\xbc\xaf": "a 7z file",
    b"GGUF": "a GGUF file",
    b"\x7fELF": "a program",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
}
"""How files begin that are not text, whatever they are called."""

MOST_CONTROLS = 0.05
"""Share of NULs and other control characters beyond which a file is binary."""

MOST_HIGH = 0.25
"""Share of characters above ASCII beyond which bytes are not taken for `FALLBACK`, an encoding of western languages."""

CONTROLS = re.compile(r"[\x00-\x07\x0e-\x1a\x1c-\x1f]")


class DocumentError(UserError):
    """A document that exists but cannot be used."""


@dataclass(frozen=True)
class Document:
    """One text to process, or the `error` that took its place.

    `source` is the file, with the line number for a record, and `path` the file's absolute path; `digest` is the
    SHA-256 of the input's bytes; `n_bytes` is how many bytes of the file it accounts for; `note` says what was not as
    expected.
    """

    id: str
    source: str
    text: str
    digest: str
    n_bytes: int
    error: str | None = None
    note: str | None = None
    path: str = ""


@dataclass(frozen=True)
class Source:
    """A file of documents and what they are called after; or why a name leads to none."""

    path: Path
    id: str
    error: str | None = None


@dataclass(frozen=True)
class Found:
    """What names refer to, and one note for each folder that holds something else besides."""

    sources: list[Source]
    notes: list[str]


def find_files(names: Sequence[str], *, records: bool, leave_out: Path | None = None) -> Found:
    """Find the files that `names` refer to, each once, in the order given; folders and patterns in sorted order.

    A folder stands for its text files at any depth, hidden ones excepted, and with `records` for its JSON Lines files
    as well. Their ids start with the folder's name, so that they are the same wherever the command is run. `leave_out`
    is a file that is not an input even if a folder or pattern contains it: the output.

    Raises:
        UserError: there is nothing to read; with the first reason.
    """
    found: dict[str, Source] = {}
    notes: list[str] = []
    for name in names:
        left_out: Counter[str] = Counter()
        group = [source for source in _sources(name, records, left_out) if not _is_same(source.path, leave_out)]
        if not group:
            error = f"no documents there (expected {', '.join(_suffixes(records))} files)"
            group = [Source(Path(name), name, error)]
        taken = {source.id for source in found.values()}
        for source in group:
            if is_records(source.path) and not records and source.error is None:
                error = "JSON Lines need --field, the name of the field that holds the text"
                source = Source(source.path, source.id, error)
            if source.id in taken:  # of another folder of the same name
                source = Source(source.path, str(source.path), source.error)
            found.setdefault(os.path.realpath(source.path), source)
        if left_out.total():
            kinds = ", ".join(f"{n} {kind}" for kind, n in left_out.most_common(6) if n)
            notes.append(f"{name}: {left_out.total()} left out ({kinds}), expected {', '.join(_suffixes(records))}")
    sources = list(found.values())
    if all(source.error for source in sources):
        raise UserError(f"{sources[0].path}: {sources[0].error}")
    if records and not any(is_records(source.path) for source in sources):
        raise UserError("--field: none of the inputs is a .jsonl file")
    return Found(sources, notes)


def is_records(path: Path) -> bool:
    """Whether the file holds one document per line."""
    return path.suffix.lower() in RECORD_SUFFIXES


def check_encoding(name: str | None) -> None:
    """Check that `name` is an encoding of text.

    Raises:
        UserError: it is not.
    """
    try:
        if name is not None:
            "".encode(name)
    except (LookupError, ValueError, UnicodeError):
        raise UserError(f"--encoding: {name!r}, expected a name like utf-16, cp1251 or shift_jis") from None


def read_documents(
    sources: Sequence[Source], field: str | None = None, encoding: str | None = None
) -> Iterator[Document]:
    """Yield every document in `sources`; each is read only when it is next."""
    for source in sources:
        path = os.path.abspath(source.path)  # noqa: PTH100
        for document in _documents(source, field, encoding):
            yield replace(document, path=path)


def _documents(source: Source, field: str | None, encoding: str | None) -> Iterator[Document]:
    if source.error is not None:
        yield _failed(source, source.error)
    elif field is not None and is_records(source.path):
        yield from _read_records(source, field, encoding)
    else:
        yield _read_whole(source, encoding)


def _failed(source: Source, error: str) -> Document:
    return Document(source.id, str(source.path), "", "", 0, error=error)


def _read_whole(source: Source, encoding: str | None) -> Document:
    raw = b""
    try:
        raw = _read_bytes(source.path)
        text, note = decode(raw, encoding)
    except DocumentError as error:
        digest = hashlib.sha256(raw).hexdigest() if raw else ""
        return Document(source.id, str(source.path), "", digest, len(raw), error=str(error))
    except MemoryError:
        return _failed(source, "not enough memory to read it")
    return Document(source.id, str(source.path), text, hashlib.sha256(raw).hexdigest(), len(raw), note=note)


def read_document(path: Path, encoding: str | None = None) -> str:
    """Return the text of one file.

    Raises:
        DocumentError: missing, unreadable, binary, empty or in an unknown encoding; the message does not name the file.
    """
    return read_noted(path, encoding)[0]


def read_noted(path: Path, encoding: str | None = None) -> tuple[str, str | None]:
    """Return the text of one file, and what was not as expected in it.

    Raises:
        DocumentError: as `read_document`.
    """
    return decode(_read_bytes(path), encoding)


def as_text(raw: bytes) -> str:
    """Decode bytes to text with plain newlines.

    Raises:
        DocumentError: they are binary, empty or not UTF-8.
    """
    return decode(raw, fallback=False)[0]


def decode(raw: bytes, encoding: str | None = None, *, fallback: bool = True) -> tuple[str, str | None]:
    """Decode bytes to text with plain newlines, and say what was not as expected in them.

    A byte order mark decides; then `encoding`; then UTF-8, and with `fallback` cp1252 where that is plausible. Single
    NULs, and single bytes that are not UTF-8 in a text that otherwise is, become U+FFFD.

    Raises:
        DocumentError: they are binary, empty or in another encoding.
    """
    for start, name in FORMATS.items():
        if raw.startswith(start):
            raise DocumentError(f"binary ({name}), expected text")
    text, notes = _decoded(raw, encoding, fallback)
    nuls, controls = text.count("\0"), len(CONTROLS.findall(text))
    if controls > MOST_CONTROLS * len(text):
        if nuls:
            raise DocumentError(f"binary (a NUL byte at offset {max(raw.find(0), 0)}), expected UTF-8 text")
        raise DocumentError(f"binary ({controls} control characters), expected UTF-8 text")
    if nuls:
        notes.append(f"{nuls} NUL{'s' * (nuls > 1)} replaced")
        text = text.replace("\0", "\ufffd")
    if not text.strip():
        raise DocumentError("empty")
    return text.replace("\r\n", "\n").replace("\r", "\n"), "; ".join(notes) or None


def _decoded(raw: bytes, encoding: str | None, fallback: bool) -> tuple[str, list[str]]:
    marked = [name for bom, name in BOMS.items() if raw.startswith(bom)]
    for name in marked or ([encoding] if encoding else []):
        try:
            return raw.decode(name), []
        except UnicodeDecodeError as error:
            problem = f"not {name.removesuffix('-sig').upper()} ({error.reason} at offset {error.start})"
        except UnicodeError as error:  # some codecs say no more
            problem = f"not {name.upper()} ({error})"
    if marked or encoding:
        raise DocumentError(problem)
    try:
        return raw.decode("utf-8"), []
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {raw[error.start]:#04x} at offset {error.start})"
    if not fallback:
        raise DocumentError(problem)
    text = raw.decode("utf-8", "replace")
    n_bad = text.count("\ufffd")
    if n_bad < sum(char > "\x7f" for char in text) - n_bad:  # some of it can only be UTF-8
        return text, [f"{problem}: {n_bad} character{'s' * (n_bad > 1)} replaced"]
    try:
        text = raw.decode(FALLBACK)
    except UnicodeDecodeError:
        raise DocumentError(f"{problem}, nor {FALLBACK}; --encoding names another") from None
    if sum(char > "\x7f" for char in text) > MOST_HIGH * len(text):
        raise DocumentError(f"{problem}, and hardly {FALLBACK}; --encoding names another")
    return text, [f"{problem}: read as {FALLBACK}"]


def _read_bytes(path: Path) -> bytes:
    try:
        with _open(path) as file:
            # In parts: one read of so many bytes reserves them all, whatever the file has.
            raw = b"".join(itertools.islice(iter(partial(file.read, PART_BYTES), b""), MAX_BYTES // PART_BYTES + 1))
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise DocumentError(f"larger than {MAX_BYTES >> 20} MiB")
    return raw


def _open(path: Path) -> Any:
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path.open("rb")


def _read_records(source: Source, field: str, encoding: str | None) -> Iterator[Document]:
    """Yield one document per line; blank lines are skipped."""
    empty = True
    try:
        with _open(source.path) as file:
            for number, (line, note) in enumerate(_lines(file, encoding), 1):
                if line.strip():
                    empty = False
                    yield _record(Source(source.path, f"{source.id}:{number}"), number, line, note, field)
    except OSError as error:
        yield _failed(source, f"cannot be read: {error.strerror or error}")
        return
    except DocumentError as error:
        yield _failed(source, str(error))
        return
    if empty:
        yield _failed(source, "empty")


def _lines(file: Any, encoding: str | None) -> Iterator[tuple[str | bytes, str | None]]:
    """The lines of a file of records: bytes, each for itself, unless its encoding is known and has other newlines."""
    start = file.read(4)
    file.seek(0)
    known = next((name for bom, name in BOMS.items() if start.startswith(bom)), encoding)
    if known in (None, "utf-8-sig"):
        yield from ((line, None) for line in file)
        return
    try:
        yield from ((line, None) for line in io.TextIOWrapper(file, encoding=known, newline="\n"))
    except UnicodeError as error:
        raise DocumentError(f"not {known.upper()} ({getattr(error, 'reason', error)})") from None


def _record(source: Source, number: int, line: str | bytes, note: str | None, field: str) -> Document:
    name, place = source.id, f"{source.path}:{number}"
    n_bytes = len(line)
    try:
        if isinstance(line, bytes):
            text, notes = _decoded(line, None, fallback=True)
            line, note = text, "; ".join(notes) or None
        record = _parse(line)
        own = record.get("id")
        if isinstance(own, (str, int)) and not isinstance(own, bool) and own != "":
            name = str(own)
        if field not in record:
            raise DocumentError(f"no field {field!r}, found {', '.join(map(repr, list(record)[:8])) or 'none'}")
        value = record[field]
        if not isinstance(value, str):
            raise DocumentError(f"field {field!r} is {type(value).__name__}, expected text")
        raw = value.encode("utf-8", "surrogatepass")
        text, more = decode(SURROGATE.sub("\ufffd", value).encode())
        if n_lone := len(SURROGATE.findall(value)):
            more = f"{n_lone} lone surrogate{'s' * (n_lone > 1)} replaced" + (f"; {more}" if more else "")
            if not any(map(str.isalnum, text)):
                raise DocumentError("not UTF-8 (lone surrogates), and no text besides")
        digest = hashlib.sha256(raw).hexdigest()
        return Document(name, place, text, digest, n_bytes, note="; ".join(filter(None, (note, more))) or None)
    except DocumentError as error:
        return Document(name, place, "", "", n_bytes, error=str(error))


SURROGATE = re.compile(r"[\ud800-\udfff]")


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DocumentError(f"a JSON {type(record).__name__}, expected an object")
    return record


def _suffixes(records: bool) -> tuple[str, ...]:
    return (*SUFFIXES, *RECORD_SUFFIXES) if records else SUFFIXES


def _sources(name: str, records: bool, left_out: Counter[str]) -> list[Source]:
    """What one name refers to; a `Source` with an error where that cannot be read."""
    path = Path(name)
    mode = _mode(path)
    if isinstance(mode, int) and stat.S_ISDIR(mode):
        return _in_folder(path, _label(path), records, left_out)
    if isinstance(mode, int):
        error = None if stat.S_ISREG(mode) else "not a regular file or folder"
        return [Source(path, str(path), error)]
    if has_magic(name):
        return _matching(name, records, left_out)
    return [Source(path, str(path), mode)]


def _mode(path: Path) -> int | str:
    """The type of what is at `path`, or why it cannot be told."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)


def _label(folder: Path) -> str:
    """The name of a folder, however it is given; its path if it has none."""
    return Path(os.path.abspath(folder)).name or str(folder)  # noqa: PTH100  (links keep their own names)


def _in_folder(folder: Path, label: str, records: bool, left_out: Counter[str]) -> list[Source]:
    errors: list[Source] = []

    def name_of(path: Path) -> str:
        return str(Path(label, path.relative_to(folder)))

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        errors.append(Source(path, name_of(path), f"cannot be read: {error.strerror or error}"))

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=unreadable):
        left_out["hidden folder"] += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        left_out["linked folder"] += sum(Path(place, name).is_symlink() for name in folders)
        for name in files:
            path = Path(place, name)
            if name.startswith("."):
                left_out["hidden"] += 1
            elif path.suffix.lower() not in _suffixes(records):
                left_out[path.suffix.lower() or "without a suffix"] += 1
            else:
                found.append(path)
    return [*errors, *(Source(path, name_of(path)) for path in sorted(found))]


def _matching(pattern: str, records: bool, left_out: Counter[str]) -> list[Source]:
    # glob.glob and not Path.glob: it takes absolute patterns and skips hidden files
    expanded = Path(pattern).expanduser()
    fixed = list(itertools.takewhile(lambda part: not has_magic(part), expanded.parts))
    found: list[Source] = []
    for path in sorted(map(Path, glob(str(expanded), recursive=True))):  # noqa: PTH207
        name = str(Path(_label(Path(*fixed)), path.relative_to(Path(*fixed)))) if fixed else str(path)
        if path.is_dir():
            found += _in_folder(path, name, records, left_out)
        else:
            found.append(Source(path, name))
    return found


def _is_same(path: Path, other: Path | None) -> bool:
    return other is not None and os.path.realpath(path) == os.path.realpath(other)
