"""`ropewalk summarize` as a user runs it, with a real model, real files and real kills."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-c", "from ropewalk.cli.main import main; main()", "summarize"]
FAST = ["--max-tokens", "16", "--context", "512", "--threads", "1"]

BRIDGE = (
    "The town council met on Tuesday to discuss the new bridge over the river Wend. Engineers warned that the old"
    " bridge, built in 1911, would not survive another winter flood.\n\nThe council voted 7 to 2 to spend 4 million"
    " pounds on a steel replacement, which will open in 2027."
)
FARM = "Ann sold the farm to Bob in May. Bob planted apple trees on the hill, and lost half of them to the frost."

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> list[str]:
    return ["-m", str(smollm2)]


@pytest.fixture
def run(ropewalk_command: Run, tmp_path: Path, model: list[str]) -> Run:
    """Run the command in `tmp_path` on the bundled model."""

    def run(*arguments: str, fast: bool = True) -> subprocess.CompletedProcess[str]:
        return ropewalk_command("summarize", *arguments, *model, *(FAST if fast else []), cwd=tmp_path)

    return run


def start(tmp_path: Path, model: list[str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *arguments, *model, *FAST], cwd=tmp_path, stderr=subprocess.PIPE, text=True)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_lines(path: Path, n: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.01)


def test_documents_of_every_kind(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, content in {
        "a.txt": BRIDGE.encode(),
        "deep/b.md": b"\xef\xbb\xbf" + FARM.replace(" ", "\r\n", 1).encode(),
        "binary.txt": b"abc\0def",
        "empty.txt": b" \n",
        "latin.txt": f"{FARM} Café.".encode("latin-1"),
        "neither.txt": b"caf\x81",
        ".hidden/c.txt": b"no",
        "picture.png": b"no",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "dangling.txt").symlink_to("nowhere")
    lines = [{"text": FARM}, {"id": "x7", "text": FARM}, {"id": 5, "body": FARM}, {"text": ["a"]}, {"text": ""}]
    jsonl = [json.dumps(line) for line in lines]
    (folder / "r.jsonl").write_text("\n".join([*jsonl[:2], "{torn", *jsonl[2:], '{"text": "\\ud800"}']) + "\n")

    done = run("docs", "-o", "out.jsonl", "--field", "text")

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "ropewalk: docs: 2 left out (1 hidden folder, 1 .png), expected .txt, .md, .markdown, .rst, .jsonl, .ndjson\n"
        'ropewalk: 1 of 14 documents were not plain UTF-8: see "note" in out.jsonl\n'
        "ropewalk: 9 of 14 documents could not be summarised; out.jsonl says why\n"
    )
    found = {record["id"]: record for record in records(tmp_path / "out.jsonl")}
    assert len(found) == 14
    assert found["docs/latin.txt"]["note"] == "not UTF-8 (byte 0xe9 at offset 109): read as cp1252"
    errors = {name: record["error"] for name, record in found.items() if "error" in record}
    for name, word in {
        "docs/binary.txt": "binary",
        "docs/empty.txt": "empty",
        "docs/neither.txt": "not UTF-8 (byte 0x81 at offset 3), nor cp1252",
        "docs/dangling.txt": "cannot be read",
        "docs/r.jsonl:3": "not JSON",
        "5": "no field 'text'",
        "docs/r.jsonl:5": "expected text",
        "docs/r.jsonl:6": "empty",
        "docs/r.jsonl:7": "not UTF-8",
    }.items():
        assert word in errors[name]
    good = found["docs/a.txt"]
    assert good["digest"] == hashlib.sha256(BRIDGE.encode()).hexdigest()
    assert good["source"] == "docs/a.txt"
    assert good["split"] is False and good["parts"] == 1 and good["kv_type"] == "f16"
    assert good["band"] == {"index": 0, "context": 8192}
    assert good["timings"]["read_s"] > 0 and good["timings"]["write_s"] > 0
    assert 40 < good["tokens"] < 100 and good["summary"].strip()
    assert found["x7"]["source"] == "docs/r.jsonl:2"
    assert found["x7"]["summary"] == found["docs/r.jsonl:1"]["summary"]  # independent of earlier documents
    assert found["docs/deep/b.md"]["digest"] == hashlib.sha256((folder / "deep/b.md").read_bytes()).hexdigest()


def test_a_second_run_does_only_what_is_new(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.txt").write_text(BRIDGE)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    out = tmp_path / "out.jsonl"
    assert run("[ab].txt", "-o", "out.jsonl").returncode == 1
    before = out.read_bytes().splitlines()[0]

    (tmp_path / "b.txt").write_text(FARM)
    assert run("a.txt", "b.txt", "a*.txt", "-o", "out.jsonl").returncode == 0
    assert out.read_bytes().splitlines()[0] == before
    assert [record["id"] for record in records(out)] == ["a.txt", "b.txt"]
    assert "error" not in records(out)[1]

    whole = out.read_bytes()
    again = run("a.txt", "b.txt", "-o", "out.jsonl")
    assert (again.returncode, out.read_bytes()) == (0, whole)
    assert again.stderr == "ropewalk: 0 documents summarised, 2 were done before: out.jsonl\n"

    (tmp_path / "b.txt").write_text(FARM + " In June it rained.")
    assert run("a.txt", "b.txt", "-o", "out.jsonl").returncode == 0
    assert [record["id"] for record in records(out)] == ["a.txt", "b.txt"]  # it replaces its former record
    assert records(out)[1]["digest"] == hashlib.sha256((tmp_path / "b.txt").read_bytes()).hexdigest()
    assert run("a.txt", "-o", "out.jsonl", "--prompt", "Who is named in the text above?").returncode == 0
    assert [record["id"] for record in records(out)] == ["a.txt", "b.txt", "a.txt"]
    assert len({record["settings"] for record in records(out)}) == 2

    assert run("a.txt", "-o", "out.jsonl", "--force").returncode == 0
    assert [record["id"] for record in records(out)] == ["a.txt"]
    assert records(out)[0]["summary"] == json.loads(before)["summary"]


def test_killed_at_any_moment_and_run_again(tmp_path: Path, model: list[str], run: Run) -> None:
    lines = [json.dumps({"id": f"d{i}", "text": f"{FARM} That was in {1990 + i}."}) for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    assert run("in.jsonl", "--field", "text", "-o", "whole.jsonl").returncode == 0
    out = tmp_path / "out.jsonl"
    for n in (1, 2):
        process = start(tmp_path, model, "in.jsonl", "--field", "text", "-o", "out.jsonl")
        wait_for_lines(out, n)
        process.kill()
        process.communicate()
    with out.open("ab") as file:  # killed in the middle of a write
        file.write(b'{"id": "d2", "source": "in.js')
    assert run("in.jsonl", "--field", "text", "-o", "out.jsonl").returncode == 0
    expected = [(record["id"], record["summary"]) for record in records(tmp_path / "whole.jsonl")]
    assert [(record["id"], record["summary"]) for record in records(out)] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_another_question_about_a_document_does_not_read_it_again(tmp_path: Path, run: Run) -> None:
    (tmp_path / "with.txt").write_text(pydoc_data.topics.topics["with"])  # about 800 tokens

    def ask(output: str, question: str) -> dict[str, Any]:
        options = ["--max-tokens", "16", "--context", "1024", "--threads", "1", "--prompt-cache", "prompts"]
        done = run("with.txt", "-o", output, "--prompt", question, *options, fast=False)
        assert (done.returncode, done.stderr) == (0, f"ropewalk: 1 documents summarised: {output}\n")
        return records(tmp_path / output)[-1]

    first = ask("out.jsonl", "What is a suite?")
    second = ask("out.jsonl", "What is a context manager?")
    assert second["timings"]["read_s"] < first["timings"]["read_s"] / 3
    (kept,) = (tmp_path / "prompts").iterdir()
    again = ask("again.jsonl", "What is a suite?")
    assert again["summary"] == first["summary"] != second["summary"]
    kept.write_bytes(kept.read_bytes()[:-1])  # torn
    assert ask("torn.jsonl", "What is a suite?")["summary"] == first["summary"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(tmp_path: Path, model: list[str], number: signal.Signals, code: int) -> None:
    lines = [json.dumps({"text": f"{BRIDGE} That was in {1990 + i}."}) for i in range(200)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    process = start(tmp_path, model, "in.jsonl", "--field", "text", "-o", "out.jsonl")
    wait_for_lines(tmp_path / "out.jsonl", 1)
    second = subprocess.run(
        [*COMMAND, "in.jsonl", "--field", "text", "-o", "out.jsonl", *model], cwd=tmp_path, capture_output=True
    )
    assert (second.returncode, second.stderr) == (2, b"ropewalk: out.jsonl: another run is writing it\n")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    n_done = len(records(tmp_path / "out.jsonl"))
    assert process.returncode == code
    assert stderr == f"ropewalk: stopped: {n_done} of 200 documents are done; the same command resumes from here\n"


def test_a_document_that_is_too_long_is_split(tmp_path: Path, run: Run) -> None:
    paragraphs = [f"{BRIDGE} In the year {1900 + i} {FARM}" for i in range(5)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs))
    done = run("long.txt", "-o", "-")
    assert done.returncode == 0
    record = json.loads(done.stdout)
    assert record["split"] is True and record["parts"] >= 2
    assert record["tokens"] > 480 and record["summary"]


def test_the_extended_bundled_model_is_the_default(
    ropewalk_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(FARM)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def go() -> dict[str, Any]:
        done = ropewalk_command("summarize", "a.txt", "-o", "-", *FAST, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "ropewalk: 1 documents summarised: standard output\n")
        return dict(json.loads(done.stdout))

    first = go()
    (extended,) = (tmp_path / "cache").rglob("*.gguf")
    before = extended.read_bytes()
    with extended.open("r+b") as file:  # damaged, and then cut short
        file.seek(len(before) // 2)
        file.write(b"\0" * 64)
    assert go()["summary"] == first["summary"]
    assert extended.read_bytes() == before
    os.truncate(extended, 50_000_000)
    assert go()["settings"] == first["settings"]
    assert extended.read_bytes() == before
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [extended.name]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("missing.txt -o o", "missing.txt: No such file"),
        ("*.rst -o o", "*.rst: no documents"),
        ("empty -o o", "empty: no documents"),
        ("pipe -o o", "pipe: not a regular file"),
        ("r.jsonl -o o", "r.jsonl: JSON Lines need --field"),
        ("a.txt --field x -o o", "--field: none of the inputs"),
        ("a.txt -o empty", "empty: is a folder"),
        ("a.txt -o nowhere/o", "nowhere/o: its folder does not exist"),
        ("a.txt -o notes", "notes: line 1 is not a result"),
        ("a.txt -o other.jsonl", "other.jsonl: line 1 is not a result"),
        ("a.txt -o /dev/full", "/dev/full: is not a regular file"),
        ("a.txt -o o -m missing.gguf", "missing.gguf: cannot read the model: No such file"),
        ("a.txt -o o -m notes", "notes: "),
        ("a.txt -o o --schedule schedule.json", "schedule.json: "),
        ("a.txt -o o --prompt=", "--prompt: empty"),
        ("a.txt -o o --prompt-cache notes", "notes: not a folder"),
        ("a.txt -o o --prompt-cache p --prompt-cache-size 4XB", "--prompt-cache-size: '4XB'"),
        ("a.txt -o o --kv q9_9", "kv: 'q9_9'"),
        ("a.txt -o o --context 64", "a context of 64 tokens is too small"),
        ("a.txt -o o --context 40000", "n_ctx: 40,000 tokens"),
        ("a.txt -o o --context x", "Invalid value for '--context'"),
        ("a.txt -o o --max-tokens 0", "Invalid value for '--max-tokens'"),
        ("a.txt", "Missing option"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_files(
    mistake: Callable[..., str], tmp_path: Path, model: list[str], arguments: str, expected: str
) -> None:
    (tmp_path / "a.txt").write_text(FARM)
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").write_text("buy milk")
    (tmp_path / "other.jsonl").write_text('{"id": 1, "text": "a"}\n')
    (tmp_path / "schedule.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    given = arguments.split()
    message = mistake("summarize", *given, *(model if "-m" not in given else []), cwd=tmp_path)
    assert message.startswith(f"ropewalk: {expected}")
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    import resource

    from ropewalk.errors import UserError
    from ropewalk.runtime.chat.results import Results

    def record(name: str) -> dict[str, str]:
        return {"id": name, "digest": "d", "settings": "s", "summary": "x" * 3000}

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Results(tmp_path / "out.jsonl") as results:
            results.append(record("a"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            with pytest.raises(UserError, match=r"out\.jsonl: cannot write: "):
                results.append(record("b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [found["id"] for found in records(tmp_path / "out.jsonl")] == ["a"]


def test_a_killed_runs_lock_is_gone(tmp_path: Path) -> None:
    from ropewalk.errors import UserError
    from ropewalk.runtime.chat.results import Results

    path = tmp_path / "out.jsonl"
    with path.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            Results(path)
    with Results(path) as results:
        results.append({"id": "a", "digest": "d", "settings": "s", "summary": "x"})
    assert path.read_bytes().count(b"\n") == 1


def test_the_number_of_threads_is_part_of_a_summarys_settings(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    from ropewalk.cli.model import LoadOptions
    from ropewalk.cli.summarize import _digest
    from ropewalk.runtime.chat import SummarySettings
    from ropewalk.runtime.threads import default_threads

    path, settings = tiny_llama(tmp_path / "m.gguf"), SummarySettings()
    one, two, usual, same = (
        _digest(path, LoadOptions(kv="f16", threads=threads), settings, cached=False, encoding=None)[1]
        for threads in (1, 2, None, default_threads())
    )
    assert one != two
    assert usual == same
