"""The header of a GGUF file: all of it is read as the gguf package reads it, and nothing hostile gets through."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from ropewalk.container import GGUFError, read_header

U32, STRING, ARRAY = 4, 8, 9
TinyLlama = Callable[..., Path]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "t", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(
    path: Path,
    entries: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    data: bytes = bytes(64),
    magic: bytes = b"GGUF",
    version: int = 3,
    n_entries: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> Path:
    """A GGUF file of these parts, with counts that may be wrong."""
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(entries) if n_entries is None else n_entries,
    )
    head += b"".join(entries) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path


@pytest.fixture
def rich(tmp_path: Path, tiny_llama: TinyLlama) -> Path:
    """A tiny model with a value of every type."""

    def extend(writer: gguf.GGUFWriter) -> None:
        writer.add_uint8("x.u8", 200)
        writer.add_int8("x.i8", -5)
        writer.add_uint16("x.u16", 60000)
        writer.add_int16("x.i16", -300)
        writer.add_int32("x.i32", -70000)
        writer.add_uint64("x.u64", 2**63 + 1)
        writer.add_int64("x.i64", -(2**62))
        writer.add_float64("x.f64", 0.1)
        writer.add_bool("x.yes", True)
        writer.add_bool("x.no", False)
        writer.add_string("x.empty", "")
        writer.add_string("x.long", "λ" * 70_000)
        writer.add_array("x.flags", [True, False, True])
        writer.add_array("x.floats", [0.5, 1.5])
        writer.add_array("x.tokens", [b"\xff\xfe", b"ok"])
        writer.add_tensor("half.weight", np.arange(64, dtype=np.float16).reshape(2, 32))

    return tiny_llama(tmp_path / "rich.gguf", extend=extend)


def check_against_gguf(path: Path) -> None:
    header, oracle = read_header(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert list(header.entries) == list(fields)
    raw = path.read_bytes()
    for name, field in fields.items():
        ours = header.entries[name]
        assert ours.type == field.types[0]
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            assert ours.item_type == field.types[1]
            if ours.count < 5000 and name != "x.tokens":
                assert header.array(name) == field.contents()
        else:
            assert header.get(name) == field.contents()
        before = len(text(name)) + 4
        assert ours.end - ours.start == sum(part.nbytes for part in field.parts) - before
        if ours.count < 5000:
            assert raw[ours.start : ours.end] == b"".join(part.tobytes() for part in field.parts)[before:]
    assert header.data_start == oracle.data_offset
    assert [t.name for t in header.tensors] == [t.name for t in oracle.tensors]
    for mine, theirs in zip(header.tensors, oracle.tensors, strict=True):
        assert mine.shape == tuple(theirs.shape.tolist())
        assert (mine.type, mine.n_bytes) == (theirs.tensor_type, theirs.n_bytes)
        assert header.data_start + mine.offset == theirs.data_offset


def test_reads_all_that_the_gguf_package_reads(rich: Path) -> None:
    check_against_gguf(rich)
    assert read_header(rich).array("x.tokens") == ["\ufffd\ufffd", "ok"]


def test_reads_a_real_model(smollm2: Path) -> None:
    check_against_gguf(smollm2)


def test_version_2_is_read(tmp_path: Path) -> None:
    header = read_header(file_of(tmp_path / "m", (entry("a", U32, b"\1\0\0\0"),), (tensor(),), version=2))
    assert (header.version, header.get("a"), header.tensors[0].n_bytes) == (2, 1, 32)


def test_data_may_end_with_the_last_tensor(tmp_path: Path) -> None:
    assert read_header(file_of(tmp_path / "m", (), (tensor(shape=(3,)),), data=bytes(12))).tensors[0].n_bytes == 12


def test_empty_arrays_and_scalar_tensors_are_read(tmp_path: Path) -> None:
    empty = entry("none", ARRAY, struct.pack("<IQ", STRING, 0))
    header = read_header(file_of(tmp_path / "m", (empty,), (tensor(shape=()),)))
    assert header.array("none") == []
    assert header.tensors[0].n_bytes == 4


HOSTILE: dict[str, tuple[dict[str, object], str]] = {
    "empty magic": ({"magic": b"\0\0\0\0"}, "expected a GGUF"),
    "version 1": ({"version": 1}, "version 1, expected"),
    "version 4": ({"version": 4}, "version 4, expected"),
    "big-endian": ({"version": 3 << 24}, "big-endian"),
    "many entries": ({"n_entries": 2**63}, "number of metadata entries"),
    "more entries than fit": ({"n_entries": 9}, "number of metadata entries"),
    "many tensors": ({"n_tensors": 2**40}, "number of tensors"),
    "more tensors than fit": ({"n_tensors": 5}, "number of tensors"),
    "huge key": ({"entries": (struct.pack("<Q", 2**60) + b"k",)}, "length of key"),
    "empty key": ({"entries": (entry("", U32, bytes(4)),)}, "printable"),
    "key with an escape": ({"entries": (entry("a\x1b[2J", U32, bytes(4)),)}, "printable"),
    "key that is not text": ({"entries": (entry(b"\xff\xff", U32, bytes(4)),)}, "printable"),
    "value type": ({"entries": (entry("k", 77, bytes(8)),)}, "k: value type 77"),
    "huge string": ({"entries": (entry("k", STRING, struct.pack("<Q", 2**50)),)}, "length of k"),
    "huge array": ({"entries": (entry("k", ARRAY, struct.pack("<IQ", U32, 2**61)),)}, "length of k"),
    "huge array of strings": ({"entries": (entry("k", ARRAY, struct.pack("<IQ", STRING, 2**61)),)}, "length of k"),
    "string in an array": ({"entries": (entry("k", ARRAY, struct.pack("<IQQ", STRING, 1, 2**62)),)}, "k at byte"),
    "array of arrays": ({"entries": (entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(12)),)}, "array of value"),
    "key twice": ({"entries": (entry("k", U32, bytes(4)), entry("k", U32, bytes(4)))}, "k: appears twice"),
    "alignment 0": ({"entries": (entry("general.alignment", U32, bytes(4)),)}, "power of two"),
    "alignment 24": ({"entries": (entry("general.alignment", U32, b"\x18\0\0\0"),)}, "power of two"),
    "alignment 2 MiB": ({"entries": (entry("general.alignment", U32, b"\0\0\x20\0"),)}, "power of two"),
    "alignment text": ({"entries": (entry("general.alignment", STRING, text("32")),)}, "power of two"),
    "tensor twice": ({"tensors": (tensor(), tensor(offset=32))}, "'t': appears twice"),
    "five dimensions": ({"tensors": (tensor(shape=(1,) * 5),)}, "5 dimensions"),
    "many dimensions": ({"tensors": (text("t") + struct.pack("<I", 2**31) + bytes(64),)}, "dimensions"),
    "no elements": ({"tensors": (tensor(shape=(8, 0)),)}, "shape [8, 0]"),
    "overflowing shape": ({"tensors": (tensor(shape=(2**32, 2**32)),)}, "shape"),
    "tensor type": ({"tensors": (tensor(kind=4),)}, "type 4"),
    "huge tensor type": ({"tensors": (tensor(kind=2**32 - 1),)}, "type 4294967295"),
    "incomplete rows": ({"tensors": (tensor(shape=(33,), kind=8),)}, "rows of 33, expected a multiple of 32"),
    "unaligned offset": ({"tensors": (tensor(offset=4),)}, "offset 4, expected a multiple of 32"),
    "huge offset": ({"tensors": (tensor(offset=2**62),)}, "cut short in tensor 't'"),
    "overlap": ({"tensors": (tensor("a", (16,)), tensor("b", offset=32))}, "overlap"),
    "long name": ({"tensors": (tensor("n" * 64),)}, "length of name of tensor 1"),
    "short data": ({"tensors": (tensor(shape=(17,)),)}, "cut short in tensor 't'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    parts, message = HOSTILE[case]
    path = file_of(tmp_path / "hostile.gguf", **parts)  # type: ignore[arg-type]
    with pytest.raises(GGUFError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("", "a folder"), ("none", "No such file"), ("empty", "an empty file"), ("pipe", "regular")):
        with pytest.raises(GGUFError, match=message):
            read_header(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path / "m")
    path.chmod(0)
    with pytest.raises(GGUFError, match="Permission denied"):
        read_header(path)


def test_cut_short_anywhere_is_refused(rich: Path, tmp_path: Path) -> None:
    whole, header = rich.read_bytes(), read_header(rich)
    last = max(header.tensors, key=lambda t: t.offset)
    end = header.data_start + last.offset + last.n_bytes
    edges = {e.start for e in header.entries.values()} | {e.end for e in header.entries.values()}
    edges |= {header.data_start + t.offset for t in header.tensors} | {header.data_start, end, *range(64)}
    rng = random.Random(1)
    cuts = {cut + step for cut in edges for step in (-1, 0)} | {rng.randrange(end) for _ in range(200)}
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    for cut in sorted((cut for cut in cuts if 0 <= cut < end), reverse=True):
        os.truncate(path, cut)
        with pytest.raises(GGUFError):
            read_header(path)


def test_corrupted_headers_are_at_worst_refused(rich: Path, tmp_path: Path) -> None:
    whole, head = rich.read_bytes(), read_header(rich).data_start
    path, rng, started = tmp_path / "corrupted.gguf", random.Random(2), time.monotonic()
    refused = 0
    tracemalloc.start()
    for _ in range(400):
        corrupted = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4, 32))):
            at = rng.randrange(head) if rng.random() < 0.7 else rng.randrange(400)
            corrupted[at] = rng.choice((0, 0xFF, 0x7F, rng.randrange(256)))
        path.write_bytes(corrupted)
        try:
            header = read_header(path)
            for key in header.entries:
                header.get(key)
        except GGUFError:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 100 < refused < 400  # some corruption is invisible: text, numbers
    assert peak < 50 << 20
    assert time.monotonic() - started < 30


def test_counts_that_fit_cost_no_memory_either(tmp_path: Path) -> None:
    """A file of many tiny values, or of much text, is as hostile as one with wrong counts."""
    many = b"".join(entry(f"{i:05}", 0, b"\0") for i in range(100_000))
    wide = b"".join(entry(f"{i:05}", STRING, text("x" * 60_000)) for i in range(400))
    for raw, count in ((many, 100_000), (wide, 400)):
        path = file_of(tmp_path / "m.gguf", (raw,), n_entries=count)
        tracemalloc.start()
        with pytest.raises(GGUFError, match=r"number of metadata entries|MiB of text"):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50 << 20


def test_a_large_vocabulary_is_skipped(tmp_path: Path) -> None:
    tokens = b"".join(text(f"token {i}") for i in range(250_000))
    path = file_of(tmp_path / "m.gguf", (entry("t", ARRAY, struct.pack("<IQ", STRING, 250_000) + tokens),))
    read = "import sys, time; from ropewalk.container import read_header; import resource\n"
    read += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; started = time.monotonic()\n"
    read += "header = read_header(sys.argv[1]); took = time.monotonic() - started\n"
    read += "print(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, header.entries['t'].count)"
    done = subprocess.run([sys.executable, "-c", read, path], capture_output=True, text=True, check=True)
    took, grown, count = done.stdout.split()
    assert float(took) < 2  # a quarter of a second on the machine it was written on
    assert int(grown) * (1 if sys.platform == "darwin" else 1024) < 50 << 20
    assert int(count) == 250_000


def test_numbers_are_numbers(rich: Path) -> None:
    header = read_header(rich)
    assert header.number("x.f64") == 0.1
    assert header.number("none", 3) == 3
    for key in ("x.empty", "x.yes", "x.floats", "none"):
        with pytest.raises(GGUFError, match=rf"{key}: .*expected a number"):
            header.number(key)
    with pytest.raises(GGUFError, match=r"x.u8: one value, expected an array"):
        header.array("x.u8")


def test_a_long_array_is_not_decoded(tmp_path: Path) -> None:
    n = 20 << 20
    path = tmp_path / "m.gguf"
    file_of(path, (entry("k", ARRAY, struct.pack("<IQ", U32, n)) + bytes(4 * n),))
    with pytest.raises(GGUFError, match=r"k: .* bytes, expected at most"):
        read_header(path).array("k")
