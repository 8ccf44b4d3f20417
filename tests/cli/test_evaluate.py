"""`ropewalk eval`: real readings by method, kept and gone on with, as table, JSON and picture."""

import json
import math
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time

import pytest

TEXT = "\n\n".join(pydoc_data.topics.topics.values())


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "ropewalk", "eval", *map(str, arguments)], capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def tiny(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("eval") / "tiny.gguf", context_length=512)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(TEXT[:20_000])
    return path


def test_beyond_its_context_the_model_needs_factors_and_finds_keys(smollm2, tmp_path):
    kept, picture = tmp_path / "r.jsonl", tmp_path / "r.png"
    arguments = [smollm2, "--contexts", "768", "--methods", "none,pi,yarn", "--pages", 2, "-o", kept, "--json"]
    found = json.loads(run(*arguments, "--plot", picture).stdout)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    rows = {row["method"]: row for row in found["rows"]}
    assert found["original_context"] == 8192 and set(rows) == {"none", "pi", "yarn"}
    for row in rows.values():  # below the original context nothing is changed
        assert row["perplexity"] == rows["none"]["perplexity"] and 3 < row["perplexity"] < 40
        assert [key["found"] for key in row["keys"]] == [True, True] and row["past_original"] is None
        assert len(row["by_quarter"]) == 4 and all(map(math.isfinite, row["by_quarter"]))
    assert len(kept.read_text().splitlines()) == 2  # what is alike is read once
    again = json.loads(run(*arguments).stdout)
    assert again == found


def test_killed_it_goes_on_with_the_same_result(tiny, text, tmp_path):
    kept, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    arguments = [tiny, "--text", text, "--contexts", "512,1024", "--methods", "none,ntk", "--pages", 3, "--json"]
    expected = json.loads(run(*arguments, "-o", whole).stdout)
    job = subprocess.Popen([sys.executable, "-m", "ropewalk", "eval", *map(str, arguments), "-o", str(kept)])
    while not kept.exists() or kept.read_bytes().count(b"\n") < 2:
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    with kept.open("ab") as file:
        file.write(b'{"key": "torn')
    found = json.loads(run(*arguments, "-o", kept).stdout)
    for ours, theirs in zip(found["rows"], expected["rows"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    keys = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 9


def test_the_table_names_contexts_methods_and_keys(tiny, text):
    shown = run(tiny, "--text", text, "--contexts", "256,1024", "--methods", "none,yarn", "--pages", 1)
    assert shown.returncode == 0 and shown.stderr == ""
    head, *rows = shown.stdout.splitlines()
    assert "past 512" in head and "keys found" in head
    assert [row.split()[:2] for row in rows[::2]] == [["256", "none"], ["1,024", "none"]]


def test_mistakes_are_one_line(tiny, text, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "x"}\n')
    cases = [
        (["--contexts", "x"], "--contexts: 'x', expected numbers"),
        (["--contexts", "0"], "--contexts: '0', expected numbers"),
        (["--methods", "magic"], "method: 'magic', expected none, schedule"),
        (["--methods", "schedule", "--contexts", "4096"], "4096 tokens are more than the 512"),
        (["--contexts", "65536", "--methods", "yarn"], "too few for"),
        (["--contexts", "512", "-o", str(other)], "line 1 is no reading of ropewalk eval"),
        (["--contexts", "512", "-o", str(tmp_path)], "is a folder"),
        (["--contexts", "20"], "expected more than"),
    ]
    for options, message in cases:
        failed = run(tiny, "--text", text, "--pages", 1, *options)
        assert failed.returncode == 2 and message in failed.stderr, failed.stderr
        assert failed.stderr.count("\n") == 1 and failed.stderr.startswith("ropewalk: ")
    assert run(tiny, "--text", tmp_path / "none.txt").returncode == 2
    assert other.read_text() == '{"id": "x"}\n'
