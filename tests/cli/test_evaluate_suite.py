"""`ropewalk eval --suite ruler` as a user runs it."""

import json
import os
import pydoc_data.topics
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import ropewalk
from ropewalk.container import certificate_of, native_schedule, read_header
from ropewalk.convert import embed_schedule

TEXT = "\n\n".join(pydoc_data.topics.topics.values())
FAST = ["--caches", "none", "--samples", 2, "--share", 2]


@pytest.fixture(scope="module")
def run(ropewalk_command):
    return partial(ropewalk_command, "eval", "--suite", "ruler")


@pytest.fixture(scope="module")
def tiny(tiny_llama, tmp_path_factory):
    """A model trained for 512 tokens and extended to 1,024."""
    folder = tmp_path_factory.mktemp("suite")
    source = tiny_llama(folder / "tiny.gguf", context_length=512)
    embed_schedule(source, folder / "long.gguf", ropewalk.extend(native_schedule(read_header(source)), 1024, "ntk"))
    return folder / "long.gguf"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(TEXT[:60_000])
    return path


@pytest.fixture
def copied(tiny, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny.read_bytes())
    return path


def test_the_bundled_model_finds_needles(run, smollm2, tmp_path):
    kept, picture = tmp_path / "r.jsonl", tmp_path / "r.png"
    options = ["--contexts", "500,1000", "--tasks", "niah_single_1,niah_multikey_1,fwe", "--methods", "none,yarn"]
    options += ["--samples", 2, "--share", 2, "--caches", "q4_0", "-o", kept]
    done = run(smollm2, *options, "--json", "--plot", picture)
    assert done.returncode == 0 and picture.read_bytes()[:4] == b"\x89PNG", done.stderr
    found = json.loads(done.stdout)
    assert found["original_context"] == 8192 and found["chat"] and found["suite"] == "ruler"
    cells = {(cell["task"], cell["length"], cell["method"]): cell for cell in found["cells"]}
    assert len(cells) == 3 * 2 * 2
    for length in (500, 1000):
        single = cells["niah_single_1", length, "none"]
        assert single["accuracy"]["mean"] == 1 and single["loss"]["mean"] < 1 and single["questions"] == 2
        assert single["accuracy"]["low"] == pytest.approx(0.342, abs=1e-3)  # of two
        assert single["haystacks"] == 1 and cells["fwe", length, "none"]["haystacks"] == 2
        assert cells["niah_multikey_1", length, "yarn"] == {
            **cells["niah_multikey_1", length, "none"],
            "method": "yarn",
        }
    (cache,) = found["caches"]
    assert 0.01 < cache["mean"] < cache["p99"] < 5 and 0.5 < cache["same"] < 1
    n_lines = 3 * 2 * 2 + 1  # equal bands are read once
    assert len(kept.read_text().splitlines()) == n_lines
    shown = run(smollm2, *options)
    assert shown.returncode == 0 and not shown.stderr and "\x1b" not in shown.stdout
    for words in ("chat template", "none, yarn", "1,000 tokens by task", "niah_multikey_1", "40%–60%", "q4_0"):
        assert words in shown.stdout, words
    accuracy, low = re.search(r" 1,000  none, yarn +(\d+%) +(\d+%) to", shown.stdout).groups()
    row = next(row for row in found["lengths"] if row["length"] == 1000)["accuracy"]
    assert (accuracy, low) == (f"{row['mean']:.0%}", f"{row['low']:.0%}")


def test_a_killed_run_resumes_with_the_same_result(run, tiny, text, tmp_path):
    kept, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    options = [tiny, "--text", text, "--contexts", "512,1024", "--tasks", "niah_single_2,niah_multikey_2,vt", *FAST]
    options = [*map(str, options), "--methods", "none,ntk,schedule", "--json"]
    expected = json.loads(run(*options, "-o", whole).stdout)
    job = subprocess.Popen([sys.executable, "-m", "ropewalk", "eval", "--suite", "ruler", *options, "-o", str(kept)])
    while job.poll() is None and (not kept.exists() or kept.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    lines = kept.read_bytes().splitlines(keepends=True)
    assert 3 <= len(lines) < len(whole.read_bytes().splitlines())
    with kept.open("ab") as file:
        file.write(b'{"key": "torn' + b"\0" * 9)
    found = json.loads(run(*options, "-o", kept).stdout)
    for ours, theirs in zip(found["answers"], expected["answers"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    for name in ("lengths", "cells", "depths", "effective_length", "short_texts"):
        assert found[name] == expected[name]
    assert kept.read_bytes().startswith(b"".join(lines))
    keys = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == len(whole.read_text().splitlines())
    assert [short["method"] for short in found["short_texts"]] == ["ntk", "schedule"]
    before = kept.stat()
    assert json.loads(run(*options, "-o", kept).stdout) == found
    assert (kept.stat().st_mtime_ns, kept.stat().st_size) == (before.st_mtime_ns, before.st_size)


def test_the_result_is_written_into_the_file_and_inspect_shows_it(run, ropewalk_command, copied, text, tmp_path):
    kept = tmp_path / "r.jsonl"
    options = ["--text", text, "--contexts", "512,1024", "--tasks", "vt,hints", *FAST, "-o", kept, "--certify"]
    done = run(copied, *options, "--methods", "none,schedule")
    assert done.returncode == 0 and f"written into {copied}" in done.stdout, done.stderr
    certificate = certificate_of(read_header(copied))
    assert certificate.tasks == ("vt", "hints") and certificate.lengths == (512, 1024) and not certificate.chat
    lines = kept.read_text()
    found = json.loads(run(copied, *options, "--methods", "none,schedule", "--json").stdout)
    assert kept.read_text() == lines  # the file has changed, the model has not
    losses = [row["loss"]["mean"] for row in found["lengths"] if row["method"] == "schedule"]
    assert certificate.loss == pytest.approx(losses)
    shown = ropewalk_command("inspect", copied)
    assert "Evaluation (ruler 1, by ropewalk" in shown.stdout and "another schedule" not in shown.stdout
    assert "effective length:" in shown.stdout
    facts = json.loads(ropewalk_command("inspect", copied, "--json").stdout)["evaluation"]
    assert facts["holds"] and facts["lengths"] == [512, 1024] and facts["loss"] == pytest.approx(losses)


def test_inspect_says_when_the_schedule_is_another(ropewalk_command, copied, run, text):
    options = ["--text", text, "--contexts", "512", "--tasks", "hints", *FAST, "--methods", "none,schedule"]
    assert run(copied, *options, "--certify").returncode == 0
    data = bytearray(copied.read_bytes())
    at = data.index(key := b"ropewalk.evaluation.schedule_digest") + len(key) + 12
    data[at : at + 4] = b"0000"
    copied.write_bytes(data)
    shown = ropewalk_command("inspect", copied)
    assert "of another schedule than the one in the file now" in shown.stdout
    assert not json.loads(ropewalk_command("inspect", copied, "--json").stdout)["evaluation"]["holds"]


def test_near_windows_are_compared_where_there_are_some(run, tiny, text):
    options = ["--text", text, "--contexts", "512", "--tasks", "hints", *FAST]
    done = run(tiny, *options, "--methods", "none,plain,schedule", "--json")
    assert "method plain: no band of the schedule has a near window; left out" in done.stderr
    assert {row["method"] for row in json.loads(done.stdout)["lengths"]} == {"none", "schedule"}
    quiet = run(tiny, *options, "--json")
    assert not quiet.stderr
    methods = {row["method"] for row in json.loads(quiet.stdout)["lengths"]}
    assert methods == {"none", "pi", "ntk", "yarn", "schedule"}


def test_a_band_with_and_without_its_near_window(run, tiny_llama, text, tmp_path):
    source = tiny_llama(tmp_path / "tiny.gguf", context_length=512)
    near = tmp_path / "near.gguf"
    embed_schedule(source, near, ropewalk.extend(native_schedule(read_header(source)), 1024, "near"))
    options = ["--text", text, "--contexts", "512,1024", "--tasks", "hints", *FAST, "--methods", "plain,yarn,schedule"]
    found = json.loads(run(near, *options, "--json").stdout)
    losses = {(row["length"], row["method"]): row["loss"]["mean"] for row in found["lengths"]}
    assert losses[512, "plain"] == losses[512, "schedule"]
    assert losses[1024, "plain"] == losses[1024, "yarn"]  # what stands for a band that brings no plain one
    assert losses[1024, "plain"] != losses[1024, "schedule"]


def test_mistakes_are_one_line(mistake, tiny, copied, text, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "x"}\n')
    schedule = tmp_path / "s.json"
    ropewalk.write_schedule(ropewalk.extend(native_schedule(read_header(tiny)), 2048, "pi"), schedule)
    link = tmp_path / "link.gguf"
    link.symlink_to(copied)
    cases = [
        (tiny, ["--suite", "rule"], "--suite: 'rule', expected ruler"),
        (tiny, ["--suite", "ruler", "--tasks", "vt,qa_1"], "--tasks: 'qa_1', expected some of niah_single_1"),
        (tiny, ["--suite", "ruler", "--contexts", "4096"], "4096 tokens are more than the 1024"),
        (tiny, ["--suite", "ruler", "--contexts", "100"], "100 tokens are too few, expected at least"),
        (tiny, ["--suite", "ruler", "--contexts", "1024", "--tasks", "cwe"], "cwe: 1,024 tokens are too few"),
        (tiny, ["--suite", "ruler", "--methods", "magic"], "method: 'magic', expected none, schedule"),
        (tiny, ["--suite", "ruler", "--methods", "plain"], "--methods: plain alone, and no band"),
        (tiny, ["--suite", "ruler", "--chat"], "has no chat template, expected --no-chat"),
        (tiny, ["--suite", "ruler", "--caches", "q9"], "kv: 'q9', expected auto"),
        (tiny, ["--suite", "ruler", "--plot", "x.pdf"], "expected a name that ends in .png"),
        (tiny, ["--suite", "ruler", "-o", other], "line 1 is not a result of ropewalk eval --suite"),
        (tiny, ["--suite", "ruler", "--passages", "3"], "--passages: is not for --suite, expected --samples"),
        (tiny, ["--tasks", "vt"], "--tasks: expected --suite ruler with it"),
        (tiny, ["--quick"], "--quick: expected --suite ruler with it"),
        (copied, ["--suite", "ruler", "--certify", "--schedule", schedule], "embed it first"),
        (copied, ["--suite", "ruler", "--certify", "--methods", "none"], "--certify: expected schedule among"),
        (link, ["--suite", "ruler", "--certify"], "is a link, expected the model's own"),
    ]
    for path, options, message in cases:
        assert message in mistake("eval", path, "--text", text, *options), options
    assert other.read_text() == '{"id": "x"}\n'
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:150])
    arguments = [
        "eval",
        tiny,
        "--suite",
        "ruler",
        "--text",
        short,
        "--tasks",
        "niah_single_2",
        "-o",
        tmp_path / "new.jsonl",
    ]
    assert "too few for a haystack" in mistake(*arguments, "--caches", "none", "--contexts", "500")
    assert "too few for 4 passages of 511" in mistake(*arguments, "--contexts", "1024")
    assert not (tmp_path / "new.jsonl").exists()
