"""Every example in README.md is run, and does what is printed there."""

import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
NOT_HERE = ("make ", "pip ", "ropewalk demo")  # set-up, and what takes minutes


def examples():
    """(command, printed output) of each `$ …` line in the console blocks."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            if not command.startswith(NOT_HERE):
                found.append((command, output.strip()))
    return found


def run(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    place = tmp_path_factory.mktemp("readme")
    (place / "model.gguf").symlink_to(smollm2)
    (place / "notes.md").write_text(pydoc_data.topics.topics["assert"], encoding="utf-8")
    return place


def shape(text):
    """The text without what differs from machine to machine: numbers, and the spaces around them."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.,]+", "#", text))


def test_the_commands(folder):
    commands = examples()
    assert [command.split("ropewalk ")[1].split()[0] for command, _ in commands] == [
        "convert",
        "inspect",
        "chat",
        "summarize",
    ]
    for command, printed in commands:
        result = run(command, folder)
        assert result.returncode == 0, result.stderr
        name = command.split("ropewalk ")[1].split()[0]
        if name in ("convert", "inspect"):
            assert shape(result.stdout.strip()) == shape(printed)
        elif name == "chat":
            assert len(result.stdout.strip()) > 10 and not result.stderr
        else:
            written = json.loads((folder / "summaries.jsonl").read_text(encoding="utf-8"))
            assert len(written["summary"]) > 20


def test_the_python(folder):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    if not (folder / "model-32k.gguf").exists():
        run("ropewalk convert model.gguf model-32k.gguf --context 32768", folder)
    (folder / "example.py").write_text(code, encoding="utf-8")
    result = run(f"{sys.executable} example.py", folder)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


def test_what_it_points_at_is_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
