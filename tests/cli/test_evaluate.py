"""`ropewalk eval`: readings by method, saved and resumed, as a table, JSON and a plot."""

import json
import math
import os
import pydoc_data.topics
import re
import signal
import struct
import subprocess
import sys
import time
from functools import partial

import pytest
import ropewalk
from ropewalk.container import native_schedule, read_header

CONTEXT_KEY = b"llama.context_length"
TEXT = "\n\n".join(pydoc_data.topics.topics.values())


@pytest.fixture(scope="module")
def run(ropewalk_command):
    return partial(ropewalk_command, "eval")


@pytest.fixture(scope="module")
def tiny(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("eval") / "tiny.gguf", context_length=512)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(TEXT[:20_000])
    return path


def test_methods_read_in_their_bands_and_equal_readings_are_done_once(run, smollm2, tmp_path):
    """The model as if trained for 512 tokens: it reads 768 best unscaled, and worst with PI."""
    model, kept, picture = tmp_path / "short.gguf", tmp_path / "r.jsonl", tmp_path / "r.png"
    data = bytearray(smollm2.read_bytes())
    at = data.index(CONTEXT_KEY) + len(CONTEXT_KEY)
    assert struct.unpack_from("<II", data, at) == (4, 8192)  # a 32-bit number
    struct.pack_into("<I", data, at + 4, 512)
    model.write_bytes(data)
    arguments = [model, "--contexts", "256,768", "--methods", "none,pi,yarn", "--passages", 1, "-o", kept, "--json"]
    found = json.loads(run(*arguments, "--plot", picture).stdout)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert found["original_context"] == 512
    rows = {(row["context"], row["method"]): row for row in found["rows"]}
    for method in ("none", "pi", "yarn"):  # up to the original context nothing is changed
        row = rows[256, method]
        assert row["perplexity"] == rows[256, "none"]["perplexity"] and row["past_original"] is None
        assert len(row["by_quarter"]) == 4 and all(map(math.isfinite, row["by_quarter"]))
    none, pi, yarn = (rows[768, method]["past_original"] for method in ("none", "pi", "yarn"))
    assert 3 < none < yarn < pi < 100
    assert [key["found"] for key in rows[768, "none"]["keys"]] == [True]
    assert rows[768, "pi"]["against_yarn"]["low"] > 0 > rows[768, "none"]["against_yarn"]["difference"]
    assert len(kept.read_text().splitlines()) == 1 + 3  # equal readings are done once
    again = json.loads(run(*arguments).stdout)
    assert again == found


def test_a_killed_run_resumes_with_the_same_result(run, tiny, text, tmp_path):
    kept, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    arguments = [tiny, "--text", text, "--contexts", "512,1024", "--methods", "none,ntk", "--passages", 3, "--json"]
    expected = json.loads(run(*arguments, "-o", whole).stdout)
    job = subprocess.Popen([sys.executable, "-m", "ropewalk", "eval", *map(str, arguments), "-o", str(kept)])
    while job.poll() is None and (not kept.exists() or kept.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    with kept.open("ab") as file:
        file.write(b'{"key": "torn' + b"\0" * 9)
    found = json.loads(run(*arguments, "-o", kept).stdout)
    for ours, theirs in zip(found["rows"], expected["rows"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    keys = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 9


def test_the_table_names_contexts_methods_and_keys(run, tiny, text, tmp_path):
    schedule = tmp_path / "s.json"
    ropewalk.write_schedule(ropewalk.extend(native_schedule(read_header(tiny)), 1024, "ntk"), schedule)
    options = ["--contexts", "256,1024", "--methods", "none,yarn,schedule", "--passages", 2, "--schedule", schedule]
    kept = ["-o", tmp_path / "r.jsonl"]
    shown = run(tiny, "--text", text, *options, *kept)
    assert shown.returncode == 0 and shown.stderr == ""
    head, *rows, last = shown.stdout.splitlines()
    assert "past 512" in head and "keys found" in head
    assert [row.split()[:2] for row in rows[::3]] == [["256", "none"], ["1,024", "none"]]
    change, low, high = (float(x) for x in re.findall(r"([+-][\d.]+)%", last))
    assert last.startswith("1,024: the schedule's perplexity past 512 is ") and low <= change <= high and low < high
    facts = json.loads(run(tiny, "--text", text, *options, *kept, "--json").stdout)["rows"]
    past = {row["method"]: row["past_original"] for row in facts if row["context"] == 1024}
    assert change == pytest.approx(100 * (past["schedule"] / past["yarn"] - 1), abs=0.006)
    assert facts[2]["against_yarn"] == {"difference": 0, "low": 0, "high": 0} and facts[1]["against_yarn"] is None


def test_mistakes_are_one_line(mistake, tiny, text, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "x"}\n')
    foreign = tmp_path / "foreign.json"
    native = native_schedule(read_header(tiny))
    facts = native.facts.model_copy(update={"freq_base": 5e5})
    ropewalk.write_schedule(native.model_copy(update={"facts": facts}), foreign)
    fresh = tmp_path / "fresh.jsonl"
    cases = [
        (["--methods", "schedule", "--schedule", foreign], "the schedule is for freq_base 500000, the model has"),
        (["--contexts", "3000000000"], "--contexts: '3000000000', expected numbers"),
        (["--plot", tmp_path / "no" / "x.png"], "its folder does not exist"),
        (["--plot", "x.pdf"], "expected a name that ends in .png"),
        (["--contexts", "65536", "--methods", "yarn", "-o", fresh], "too few for"),
        (["--contexts", "x"], "--contexts: 'x', expected numbers"),
        (["--contexts", "0"], "--contexts: '0', expected numbers"),
        (["--methods", "magic"], "method: 'magic', expected none, schedule"),
        (["--methods", "schedule", "--contexts", "4096"], "4096 tokens are more than the 512"),
        (["--contexts", "65536", "--methods", "yarn"], "too few for"),
        (["--contexts", "512", "-o", str(other)], "line 1 is not a reading of ropewalk eval"),
        (["--contexts", "512", "-o", str(tmp_path)], "is a folder"),
        (["--contexts", "20"], "expected more than"),
    ]
    for options, message in cases:
        assert message in mistake("eval", tiny, "--text", text, "--passages", 1, *options), options
    assert "none.txt" in mistake("eval", tiny, "--text", tmp_path / "none.txt", "--contexts", 512)
    assert other.read_text() == '{"id": "x"}\n' and not fresh.exists()
    other.write_text('{"key": "x", "reading": "abc"}\n')
    assert "line 1 is not a reading" in mistake("eval", tiny, "--text", text, "--contexts", "512", "-o", other)
