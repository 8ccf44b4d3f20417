"""The documents that names refer to: encodings, folders, what is left out, and errors among good ones."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ropewalk.cli import terminal
from ropewalk.cli.documents import DocumentError, check_encoding, decode, find_files, read_documents
from ropewalk.errors import UserError

RAIN = "the rain in the there then the art"
FRENCH = "Le maître du port écrivait chaque matin: fûts, naïveté – 40 € ; et le garçon était là. " * 2
RUSSIAN = "Начальник порта каждое утро писал, какие лодки пришли. "


@pytest.mark.parametrize(
    ("raw", "encoding", "text", "note"),
    [
        (b"\xef\xbb\xbfcaf\xc3\xa9", None, "café", None),
        (FRENCH.encode("utf-16"), None, FRENCH, None),
        (b"\xfe\xff" + FRENCH.encode("utf-16-be"), None, FRENCH, None),
        (FRENCH.encode("utf-32"), None, FRENCH, None),
        (b"\x00\x00\xfe\xff" + FRENCH.encode("utf-32-be"), None, FRENCH, None),
        (FRENCH.encode("cp1252"), None, FRENCH, "not UTF-8 (byte 0xee at offset 5): read as cp1252"),
        (RUSSIAN.encode("cp1251"), "cp1251", RUSSIAN, None),
        (RUSSIAN.encode("utf-16"), "cp1251", RUSSIAN, None),  # the byte order mark decides
        (b"a\r\nb\rc", None, "a\nb\nc", None),
        (RAIN.encode() + b"\0", None, RAIN + "\ufffd", "1 NUL replaced"),
        (
            (FRENCH * 2).encode() + b"\xff",
            None,
            FRENCH * 2 + "\ufffd",
            f"not UTF-8 (byte 0xff at offset {len((FRENCH * 2).encode())}): 1 character replaced",
        ),
    ],
)
def test_encodings(raw: bytes, encoding: str | None, text: str, note: str | None) -> None:
    assert decode(raw, encoding) == (text, note)


@pytest.mark.parametrize(
    ("raw", "encoding", "error"),
    [
        (b"%PDF-1.4\nplain words", None, r"binary \(a PDF file\), expected text"),
        (b"PK\x03\x04words", None, r"binary \(a ZIP file"),
        (b"a\0b", None, r"binary \(a NUL byte at offset 1\)"),
        (FRENCH.encode("utf-16-le"), None, "binary"),
        (bytes(range(256)) * 4, None, "binary|not UTF-8"),
        (bytes(range(1, 32)) * 4, None, r"binary \(96 control characters\)"),
        (RUSSIAN.encode("cp1251"), None, "and hardly cp1252; --encoding names another"),
        (RUSSIAN.encode("koi8-r"), None, "cp1252; --encoding names another"),
        (b"\xff\xfea", None, "not UTF-16"),
        (FRENCH.encode("cp1252"), "utf-8", "not UTF-8"),
        (b"xn--a-\xe9-b..c", "idna", "not IDNA"),
        (b"+AAA-", "utf-7", "binary"),
        (b"", None, "empty"),
        (b"\xef\xbb\xbf \n", None, "empty"),
    ],
)
def test_what_is_not_text(raw: bytes, encoding: str | None, error: str) -> None:
    with pytest.raises(DocumentError, match=error):
        decode(raw, encoding)


def test_a_question_is_utf_8() -> None:
    with pytest.raises(DocumentError, match="not UTF-8"):
        decode(FRENCH.encode("cp1252"), fallback=False)


@pytest.mark.parametrize("name", ["nosuch", "hex", "rot13", "", "utf-8\0"])
def test_an_unknown_encoding(name: str) -> None:
    with pytest.raises(UserError, match="--encoding: "):
        check_encoding(name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "cp1251", None])
def test_records_in_other_encodings(tmp_path: Path, encoding: str | None) -> None:
    lines = [json.dumps({"id": str(i), "text": RUSSIAN * (i + 1)}, ensure_ascii=False) for i in range(3)]
    (tmp_path / "r.jsonl").write_bytes("\n".join(lines).encode(encoding or "utf-8-sig"))
    found = find_files([str(tmp_path / "r.jsonl")], records=True)
    documents = list(read_documents(found.sources, "text", "cp1251" if encoding == "cp1251" else None))
    assert [(d.id, d.text, d.error) for d in documents] == [(str(i), RUSSIAN * (i + 1), None) for i in range(3)]


@pytest.fixture
def nobody() -> Iterator[Callable[[], None]]:
    """Call it to give up root's right to read everything."""
    yield lambda: os.seteuid(65534) if os.geteuid() == 0 else None
    os.seteuid(os.getuid())


def test_what_is_wrong_among_good_documents(tmp_path: Path, nobody: Callable[[], None]) -> None:
    folder = tmp_path / "docs"
    for name in ("a.txt", "locked/b.txt", "shut/c.txt", "empty/x.png", "pipe/d.txt", "r.jsonl", ".hidden", "README"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(RAIN)
    (folder / "linked").symlink_to("locked")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to(Path(tempfile.gettempdir()).resolve()) and path != Path(tempfile.gettempdir()).resolve():
            path.chmod(0o755)
    (folder / "locked").chmod(0)
    (folder / "shut/c.txt").chmod(0)
    nobody()
    names = [
        str(folder),
        str(tmp_path / "nosuch.txt"),
        f"{tmp_path}/*.md",
        str(folder / "empty"),
        str(tmp_path / "fifo"),
    ]
    found = find_files([*names, "n" * 300, str(folder / "r.jsonl")], records=False)
    errors = {d.id: d.error for d in read_documents(found.sources) if d.error}
    assert [d.id for d in read_documents(found.sources) if not d.error] == ["docs/a.txt", "docs/pipe/d.txt"]
    assert errors == {
        "docs/locked": "cannot be read: Permission denied",
        "docs/shut/c.txt": "cannot be read: Permission denied",
        names[1]: "No such file or directory",
        names[2]: "no documents there (expected .txt, .md, .markdown, .rst files)",
        names[3]: "no documents there (expected .txt, .md, .markdown, .rst files)",
        names[4]: "not a regular file or folder",
        "n" * 300: "File name too long",
        str(folder / "r.jsonl"): "JSON Lines need --field, the name of the field that holds the text",
    }
    kinds = ("1 linked folder", "1 .png", "1 .jsonl", "1 hidden", "1 without a suffix")
    assert found.notes[0].startswith(f"{folder}: 5 left out (") and all(kind in found.notes[0] for kind in kinds)
    os.seteuid(os.getuid())
    (folder / "locked").chmod(0o755)


def test_ids_are_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "home" / "docs"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.md"):
        (folder / name).write_text(RAIN)
    for place, name in [
        (tmp_path, str(folder)),
        (tmp_path, "home/docs"),
        (folder.parent, "docs/"),
        (folder, "."),
        (folder / "deep", ".."),
        (folder / "deep", "../../docs"),
        (tmp_path, "home/docs/**/*.[tm]*"),
        (tmp_path, f"{folder}/**/*.[tm]*"),
    ]:
        monkeypatch.chdir(place)
        assert [source.id for source in find_files([name], records=False).sources] == ["docs/a.txt", "docs/deep/b.md"]
    monkeypatch.chdir(folder)
    assert [source.id for source in find_files(["*.txt", "./deep/b.md"], records=False).sources] == [
        "a.txt",
        "deep/b.md",
    ]
    other = tmp_path / "other" / "docs"
    other.mkdir(parents=True)
    (other / "a.txt").write_text(RAIN)
    ids = [source.id for source in find_files([str(folder), str(other)], records=False).sources]
    assert ids == ["docs/a.txt", "docs/deep/b.md", str(other / "a.txt")]


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(ropewalk_command: Run, tiny_llama: Callable[..., Path], tmp_path: Path) -> Run:
    """Summarise with a tiny model, in any folder, to one output."""
    model = tiny_llama(tmp_path / "m.gguf")
    fast = ["--max-tokens", "16", "--threads", "1"]

    def run(*arguments: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return ropewalk_command("summarize", "-m", model, "-o", tmp_path / "o.jsonl", *fast, *arguments, cwd=cwd)

    return run


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]


def test_a_run_from_elsewhere_resumes(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(RAIN)
    assert run("docs").returncode == 0
    before = (tmp_path / "o.jsonl").read_bytes()
    for cwd, name in [(folder, "."), (Path("/"), str(folder))]:
        done = run(name, cwd=cwd)
        assert done.stderr == f"ropewalk: 0 documents summarised, 2 were done before: {tmp_path / 'o.jsonl'}\n"
    assert (tmp_path / "o.jsonl").read_bytes() == before


def test_a_changed_document_replaces_its_record_and_no_other(run: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"{RAIN} {name}")
        assert run("a.txt", cwd=tmp_path / name).returncode == 0
    assert [record["id"] for record in records(tmp_path)] == ["a.txt", "a.txt"]  # of different folders
    assert run("a.txt", "--prompt", "the", cwd=tmp_path / "one").returncode == 0
    (tmp_path / "one" / "a.txt").write_text(RAIN)
    assert run("a.txt", cwd=tmp_path / "one").returncode == 0
    assert [Path(record["path"]).parent.name for record in records(tmp_path)] == ["two", "one", "one"]
    lines = [{"id": "x", "text": RAIN}, {"id": "x", "text": f"{RAIN} air"}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for _ in range(2):  # two documents of one id: neither replaces the other
        assert run("r.jsonl", "--field", "text").returncode == 0
        assert [record["id"] for record in records(tmp_path)][3:] == ["x", "x"]


def test_what_a_summary_depends_on_is_in_its_settings(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(RAIN)
    more: list[list[str]] = [
        [],
        ["--threads", "2"],
        ["--kv", "q8_0"],
        ["--kv", "f16"],
        ["--prompt-cache", "c"],
        ["--encoding", "ascii"],
    ]
    for options in more:
        assert run("a.txt", *options).returncode == 0
    assert (
        len({record["settings"] for record in records(tmp_path)}) == len(records(tmp_path)) == len(more) - 1
    )  # auto is f16


def test_an_output_that_is_moved_during_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ropewalk.runtime.chat import Summarizer

    whole = Summarizer.summarize

    def moving(self: Summarizer, text: str, on_progress: Any = None) -> Any:
        if "air" in text:
            (tmp_path / "o.jsonl").rename(tmp_path / "moved.jsonl")
        return whole(self, text, on_progress)

    monkeypatch.setattr(Summarizer, "summarize", moving)
    for name, text in {"a": RAIN, "b": f"{RAIN} air", "c": RAIN}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    done = run("a.txt", "b.txt", "c.txt")
    assert done.returncode == 2
    assert done.stderr.endswith("o.jsonl: was moved, removed or replaced during the run, which has stopped\n")
    assert (tmp_path / "moved.jsonl").read_text().count("\n") == 2 and not (tmp_path / "o.jsonl").exists()


def test_a_foreign_file_stays_whatever_happens(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(RAIN)
    for content in ('{"id": 7, "text": "my only copy"}', '{"id": "7", "text": "my only co', '{"id": "my only copy'):
        (tmp_path / "o.jsonl").write_text(content)
        done = run("a.txt", "-m", "nosuch.gguf")
        assert done.returncode == 2 and "line 1 is not a result of ropewalk summarize" in done.stderr
        assert run("a.txt", "--force", "-m", "nosuch.gguf").returncode == 2
        assert (tmp_path / "o.jsonl").read_text() == content


def test_bad_documents_beside_good_ones(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(RAIN)
    (tmp_path / "zero.txt").write_text("\u200b\u200b\ufeff\u2060")
    (tmp_path / "dot.txt").write_text(".")
    (tmp_path / "b.txt").write_bytes(b"%PDF-1.4\n" + RAIN.encode())
    done = run("a.txt", "nosuch.txt", "*.rst", "zero.txt", "dot.txt", "b.txt")
    assert done.returncode == 1
    found = {record["id"]: record.get("error") for record in records(tmp_path)}
    assert found == {
        "a.txt": None,
        "nosuch.txt": "No such file or directory",
        "*.rst": "no documents there (expected .txt, .md, .markdown, .rst files)",
        "zero.txt": "no text: neither a letter nor a digit",
        "dot.txt": "no text: neither a letter nor a digit",
        "b.txt": "binary (a PDF file), expected text",
    }
    assert records(tmp_path)[0]["finish_reason"] in ("stop", "length")


def test_a_line_per_minute_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 30.0, 61.0, 90.0, 7300.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress("Reading") as advance:
        for done in (1, 250, 300, 900):
            advance(done, 1000)
    assert capsys.readouterr().err == (
        "ropewalk: Reading: 25 % (250 of 1,000), 1 min, about 3 min left\n"
        "ropewalk: Reading: 90 % (900 of 1,000), 2 h 2 min, about 14 min left\n"
    )
