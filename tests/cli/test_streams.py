"""Standard streams that are closed, full, or read no further; names from outside that would steer a terminal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COMMAND = f"{sys.executable} -m ropewalk"


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    tiny_llama(folder / "m.gguf")
    (folder / "rain.txt").write_text("the rain in the the there then")
    return folder


def shell(folder: Path, line: str) -> tuple[int, str, str]:
    done = subprocess.run(["bash", "-c", line.replace("ropewalk", COMMAND)], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("ropewalk inspect m.gguf >&-", 2, "standard output: cannot write: Bad file descriptor"),
        ("ropewalk inspect m.gguf >/dev/full", 2, "standard output: cannot write: No space left on device"),
        ("ropewalk inspect m.gguf --json >/dev/full", 2, "standard output: cannot write: No space left on device"),
        ("ropewalk --help >/dev/full", 2, "standard output: cannot write: No space left on device"),
        ("ropewalk inspect nosuch.gguf 2>&-", 2, None),
        ("ropewalk inspect nosuch.gguf 2>/dev/full", 2, None),
        ("ropewalk inspect m.gguf <&- >/dev/null", 0, None),
        ("ropewalk inspect m.gguf | true; exit ${PIPESTATUS[0]}", 141, None),
        ("ropewalk inspect m.gguf --json | true; exit ${PIPESTATUS[0]}", 141, None),
        ("ropewalk summarize rain.txt -m m.gguf --max-tokens 16 -o - | true; exit ${PIPESTATUS[0]}", 141, None),
        ("ropewalk --help | true; exit ${PIPESTATUS[0]}", 141, None),
    ],
)
def test_a_stream_that_cannot_be_used(folder: Path, line: str, code: int, says: str | None) -> None:
    returned, stdout, stderr = shell(folder, line)
    assert returned == code and stdout == ""
    assert stderr == (f"ropewalk: {says}\n" if says else "")


def test_a_closed_output_is_not_the_next_file_that_is_opened(folder: Path) -> None:
    (folder / "a.txt").write_text("the rain in the the there then")
    line = "ropewalk summarize a.txt -m m.gguf --max-tokens 16 -o out.jsonl >&-"
    assert shell(folder, line) == (0, "", "ropewalk: 1 documents summarised: out.jsonl\n")
    assert (folder / "out.jsonl").read_text().count("\n") == 1


def test_escapes_in_names_and_messages_are_not_printed(
    ropewalk_command: Callable[..., subprocess.CompletedProcess[str]], folder: Path
) -> None:
    evil = "a\x1b]0;owned\x07\x1b[2J.txt"
    done = ropewalk_command("summarize", evil, "-m", folder / "m.gguf", "-o", "o.jsonl", cwd=folder)
    assert done.returncode == 2 and done.stderr[:-1].isprintable()
    (folder / evil).write_text("")
    (folder / "good.txt").write_text("the rain in the there then")
    options = ["--contexts", "64", "--methods", "none", "--passages", 1]
    done = ropewalk_command("eval", folder / "m.gguf", "--text", evil, "good.txt", *options, cwd=folder)
    assert all(line.isprintable() for line in (done.stderr + done.stdout).splitlines())
    assert "empty; left out" in done.stderr


def test_names_as_long_as_a_file_system_takes(
    ropewalk_command: Callable[..., subprocess.CompletedProcess[str]], folder: Path
) -> None:
    text, out = "t" * 248 + ".txt", "o" * 246 + ".jsonl"
    (folder / text).write_text("the rain in the there then")
    arguments = ["-m", folder / "m.gguf", "--max-tokens", 16]
    assert ropewalk_command("summarize", text, "-o", out, *arguments, cwd=folder).returncode == 0
    assert (folder / out).stat().st_size > 0
    long = ropewalk_command("summarize", "t" * 300, "-o", "o.jsonl", *arguments, cwd=folder)
    assert (long.returncode, long.stderr) == (2, f"ropewalk: {'t' * 300}: File name too long\n")
    output = "s" * 247 + ".json"
    search = ropewalk_command("search", folder / "m.gguf", "--text", text, "-o", output, cwd=folder)
    assert search.returncode == 2 and search.stderr.count("\n") == 1
