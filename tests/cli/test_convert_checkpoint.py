"""`ropewalk convert` on Hugging Face checkpoints: folders, names on the Hub, and one-line error messages."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import tiny_checkpoints as checkpoints
from ropewalk.container import read_header, schedule_of

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    case = next(case for case in checkpoints.CASES if case.name == "qwen3")
    if not case.can_be_made():
        pytest.skip(f"{case.needs}, which the tokeniser comes from, is not installed")
    return checkpoints.write_checkpoint(case, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def run(ropewalk_command):
    return partial(ropewalk_command, "convert")


def offline(*arguments, **environment):
    """In another process, since the Hub's library reads its environment only once."""
    return subprocess.run(
        [sys.executable, "-m", "ropewalk", "convert", *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(*arguments, **environment):
    done = offline(*arguments, **environment)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("ropewalk: ") and done.stderr.count("\n") == 1 and not done.stdout
    return done.stderr


def test_a_folder(run, folder, tmp_path):
    done = run(folder, tmp_path / "out.gguf")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "out.gguf: " in done.stdout and "qwen3" in done.stdout and "not extended; use --context" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_extended_and_as_json(run, folder, tmp_path):
    trained = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    done = run(folder, tmp_path / "out.gguf", "--context", 4 * trained, "--type", "q8_0", "--json")
    facts = json.loads(done.stdout)
    assert facts["context"] == 4 * trained and facts["original_context"] == trained
    assert schedule_of(read_header(tmp_path / "out.gguf")).context == 4 * trained
    assert facts["bytes"] == (tmp_path / "out.gguf").stat().st_size


def test_several_files(run, folder, tmp_path):
    done = run(folder, tmp_path / "out.gguf", "--split-max-size", "100K", "--json")
    names = json.loads(done.stdout)["files"]
    assert len(names) > 1 and sorted(names) == sorted(str(path) for path in tmp_path.iterdir())
    output = run(folder, tmp_path / "more.gguf", "--split-max-size", "100K").stdout
    assert f"and {len(names) - 1} more" in output


def test_a_name_on_the_hub_that_was_downloaded_before(folder, tmp_path):
    cache = tmp_path / "hub" / "models--small--Qwen3-Tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "snapshots" / REVISION).symlink_to(folder)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(REVISION)
    done = offline("small/Qwen3-Tiny", tmp_path / "out.gguf", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert read_header(tmp_path / "out.gguf").get("general.name") == "Qwen3-Tiny"
    assert offline(f"small/Qwen3-Tiny@{REVISION}", tmp_path / "2.gguf", HF_HOME=str(tmp_path)).returncode == 0
    assert "small/Qwen3-Tiny@other: not a local folder, and cannot be downloaded" in refused(
        "small/Qwen3-Tiny@other", tmp_path / "3.gguf", HF_HOME=str(tmp_path)
    )


def test_mistakes(mistake, run, folder, tmp_path):
    out = tmp_path / "out.gguf"
    (tmp_path / "empty").mkdir()
    cases = [
        ([tmp_path / "empty", out], "empty: no config.json, expected a Hugging Face checkpoint"),
        ([folder, out, "--type", "q99"], "type: 'q99', expected one of"),
        ([folder, out, "--context", 2], "context: 2, expected more than"),
        ([folder, out, "--schedule", "none.json"], "none.json: cannot read the schedule"),
        ([folder, out, "--split-max-size", "2T"], "split size: '2T', expected a number like 500M or 2G"),
        ([folder, out, "--split-max-size", "10"], "split size: 10 bytes, expected at least the"),
        ([folder, folder], "the output is the input itself"),
        ([folder, tmp_path / "no" / "out.gguf"], "no such folder"),
    ]
    for arguments, message in cases:
        assert message in mistake("convert", *arguments), arguments
    assert "No such file" in mistake("convert", "none/such/place", out)
    assert "none/such: not a local folder, and cannot be downloaded from the hub: " in refused("none/such", out)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    out.write_bytes(b"precious")
    assert "already exists (--force replaces it)" in mistake("convert", folder, out)
    assert run(folder, out, "--force").returncode == 0


def test_names_from_a_checkpoint_reach_the_terminal_without_control_characters(run, tmp_path):
    case = checkpoints.Case("tiny", {**checkpoints.LLAMA, "_name_or_path": 3}, added=("\x1b]0;gone\x07",))
    if not case.can_be_made():
        pytest.skip(f"{case.needs}, which the tokeniser comes from, is not installed")
    folder = checkpoints.write_checkpoint(case, tmp_path)
    (folder / "README.md").write_text('---\n"tags": {"\x85[red]": "\u202etxt"}\n"language": [}\n---\n')
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "\x1b[2J"}}))
    named = folder.rename(tmp_path / "\x1b[31m[bold]red")
    done = run(named, tmp_path / "out.gguf")
    assert done.returncode == 0, done.stderr
    assert "[31m[bold]red" in done.stdout and "tokenizer.model is used" in done.stdout
    (named / "tokenizer.model").write_bytes(b"\x1b[2J")
    failed = run(named, tmp_path / "no.gguf")
    assert failed.returncode == 2 and "[31m[bold]red" in failed.stderr and failed.stderr.count("\n") == 1
    for text in (done.stdout, done.stderr, failed.stderr):
        assert all(char.isprintable() or char == "\n" for char in text)
