"""With little memory (`ulimit -v`) a command ends in one line, and is refused by what the limit leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")

LIMITED = """
import resource, sys
import psutil, ropewalk.runtime.measure
from ropewalk.cli.main import main
room, *sys.argv[1:] = sys.argv[1:]
limit = psutil.Process().memory_info().vms + int(room)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
"""


def with_room(room: int, *args: object) -> tuple[int, list[str]]:
    """Run a command whose modules are loaded, and which may take `room` bytes more."""
    command = [sys.executable, "-c", LIMITED, str(room), *map(str, args)]
    environment = {**os.environ, "ROPEWALK_FAST_PREFILL": "0"}  # torch alone would take more
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("kib", [200_000, 250_000, 300_000, 400_000])
@pytest.mark.parametrize("command", ["inspect m.gguf", "convert m.gguf o.gguf --context 1024"])
def test_libraries_that_cannot_be_loaded(
    tiny_llama: Callable[..., Path], tmp_path: Path, kib: int, command: str
) -> None:
    tiny_llama(tmp_path / "m.gguf")
    line = f"ulimit -v {kib} && exec {sys.executable} -m ropewalk {command}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2) or "OpenBLAS" in done.stderr
    assert done.returncode != 2 or done.stderr.splitlines()[-1].startswith("ropewalk: not enough memory")


def test_what_cannot_be_read_for_lack_of_memory(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m.gguf", context_length=1024)
    (tmp_path / "rain.txt").write_text("the rain in the the there then " * 400)
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(500 << 20)
    code, lines = with_room(200 << 20, "eval", tmp_path / "m.gguf", "--contexts", 512, "--text", tmp_path / "big.txt")
    expected = "ropewalk: not enough memory for this; a shorter context or a smaller cache type takes less"
    assert (code, lines[-1]) == (2, expected)
    # A file takes no more memory than it has, and one that is too large does not stop the others.
    given = (tmp_path / "big.txt", tmp_path / "rain.txt", "-m", tmp_path / "m.gguf", "-o", tmp_path / "o.jsonl")
    code, lines = with_room(300 << 20, "summarize", *given, "--max-tokens", 16)
    errors = [json.loads(line).get("error") for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert code == 1 and errors == ["not enough memory to read it", None], lines


def test_the_plan_knows_the_limit(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m.gguf", context_length=1 << 20)
    (tmp_path / "rain.txt").write_text("the rain in the the there then")
    command = ("summarize", tmp_path / "rain.txt", "-m", tmp_path / "m.gguf", "-o", tmp_path / "o.jsonl")
    code, lines = with_room(64 << 20, *command, "--context", "1000000")
    assert code == 2 and "not enough memory for" in lines[-1] and "and 6" in lines[-1], lines
