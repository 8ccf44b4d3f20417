"""`ropewalk search`: whole searches on a small model, killed and resumed, and judged on held-out texts."""

import contextlib
import json
import os
import pydoc_data.topics
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from ropewalk import read_schedule
from ropewalk.cli.search import search_folder
from ropewalk.factors import RopeFacts, Schedule, native_band, write_schedule

TOPICS = "\n\n".join(pydoc_data.topics.topics.values())


def command(*arguments):
    return [sys.executable, "-m", "ropewalk", "search", *map(str, arguments)]


@pytest.fixture(scope="module")
def run(ropewalk_command):
    return partial(ropewalk_command, "search")


@pytest.fixture(scope="module")
def tiny(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("search") / "tiny.gguf", context_length=256, n_layer=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(3):
        (folder / f"{i}.txt").write_text(TOPICS[i * 50_000 : i * 50_000 + 5_000])
    return folder


@pytest.fixture(scope="module")
def options(tiny, texts):
    """A search for plain λ."""
    size = ["--budget", 14, "--passages", 2, "--window", 64, "--threads", 1]
    return [tiny, "--context", 512, "--text", texts, *size, "--near-tokens", 0]


def test_the_result_is_written_embedded_and_judged(ropewalk_command, run, options, tiny, tmp_path):
    schedule, picture = tmp_path / "s.json", tmp_path / "s.png"
    done = run(*options, "-o", schedule, "--plot", picture, "--objective", "tail+0.5*needle", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    facts = json.loads(done.stdout)
    (band,) = facts["bands"]
    found = read_schedule(schedule)
    assert [b.context for b in found.bands] == [256, 512] and set(found.bands[0].rescale_factors) == {1.0}
    assert list(found.bands[1].rescale_factors) == band["rescale_factors"] == sorted(band["rescale_factors"])
    assert found.bands[1].found.objective == "tail+0.5*needle" and found.bands[1].found.data_digest
    assert band["documents"] == 2 and band["evaluations"] <= 14 and band["searched_loss"] <= band["searched_loss_yarn"]
    held = band["held_out"]
    assert held["low"] <= held["difference"] <= held["high"] and held["is_better"] == (held["high"] < 0)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    long = tmp_path / "long.gguf"
    assert ropewalk_command("convert", tiny, long, "--schedule", schedule).returncode == 0


def saved_bytes(schedule):
    """Bytes of a search's saved results."""
    total = 0
    for path in schedule.with_name(f"{schedule.name}.search").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # it has just been renamed to its final name
            total += path.stat().st_size
    return total


def test_the_folder_beside_a_schedule_with_a_very_long_name(tmp_path):
    assert search_folder(tmp_path / "s.json") == tmp_path / "s.json.search"
    names = ["x" * 247 + ".json", "x" * 246 + "y.json", "é" * 123 + ".json", "x" * 248]
    folders = {search_folder(tmp_path / name) for name in names}
    assert len(folders) == len(names)
    for folder in folders:
        folder.mkdir()
        assert folder.name.endswith(".search")


@pytest.mark.parametrize("algorithm", ["cma", "gradient"])
def test_killed_at_any_moment_it_ends_with_the_same_schedule(run, options, tmp_path, algorithm):
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    more = ["--algorithm", algorithm, "--evaluator", "torch", "--seed", 4]
    assert run(*options, *more, "-o", whole).returncode == 0
    rng = random.Random(0)
    shares, kills = sorted(rng.uniform(0, 0.9) for _ in range(3)), 0
    for share in [*shares, 2]:  # of the saved bytes; times in seconds would depend on the machine
        job = subprocess.Popen(command(*options, *more, "-o", killed), stderr=subprocess.DEVNULL)
        while saved_bytes(killed) <= share * saved_bytes(whole) and job.poll() is None:
            time.sleep(0.001)
        if job.poll() is not None:
            break
        time.sleep(rng.uniform(0, 0.02))
        os.kill(job.pid, signal.SIGKILL)
        kills += job.wait() != 0
    assert kills
    assert job.wait() == 0
    assert killed.read_bytes() == whole.read_bytes()
    again = run(*options, *more, "-o", killed)  # all evaluations are in the journal
    assert again.returncode == 0 and killed.read_bytes() == whole.read_bytes()


@pytest.fixture(scope="module")
def plain(run, options, tmp_path_factory):
    """A search by llama.cpp without more options: its output, and its schedule."""
    schedule = tmp_path_factory.mktemp("plain") / "s.json"
    done = run(*options, "--evaluator", "llama", "-o", schedule)
    assert done.returncode == 0, done.stderr
    return done.stdout, schedule


def test_the_output_is_human_readable(plain):
    where, first, *rest = plain[0].splitlines()
    assert where.endswith("s.json")
    assert re.match(
        r"up to 512 tokens: λ [\d.]+ to [\d.]+, (n̂ \d+, )?attention × [\d.]+ \((cma|yarn)\); [\d.]+ eval", first
    )
    assert "held-out" in rest[-1] or "the band is YaRN's" in rest[-1]


def test_two_workers_find_the_same(run, options, plain, tmp_path):
    schedule = tmp_path / "s.json"
    assert run(*options, "--workers", 2, "--evaluator", "llama", "-o", schedule).returncode == 0
    assert schedule.read_bytes() == plain[1].read_bytes()


def test_a_second_search_continues_from_an_embedded_schedule(ropewalk_command, run, options, plain, tiny, tmp_path):
    long, schedule = tmp_path / "long.gguf", tmp_path / "s.json"
    assert ropewalk_command("convert", tiny, long, "--schedule", plain[1]).returncode == 0
    _, _, _, *rest = options
    done = run(long, "--context", 1024, "--evaluator", "llama", *rest, "-o", schedule)
    assert done.returncode == 0, done.stderr
    first, second = read_schedule(plain[1]), read_schedule(schedule)
    assert second.bands[:-1] == first.bands
    new, old = second.bands[-1], first.bands[-1]
    assert new.context == 1024 and new.found.onto == old.found.method
    assert all(n >= o for n, o in zip(new.rescale_factors, old.rescale_factors, strict=True))
    assert max(new.rescale_factors) > max(old.rescale_factors)


def test_near_windows_are_searched_and_plain_factors_stay(ropewalk_command, run, tiny, texts, plain, tmp_path):
    schedule, long = tmp_path / "s.json", tmp_path / "long.gguf"
    size = ["--budget", 24, "--passages", 2, "--window", 64, "--threads", 1]
    options = [tiny, "--context", 512, "--text", texts, *size, "--evaluator", "torch"]
    done = run(*options, "--near-tokens", "64,128", "--start", plain[1], "-o", schedule, "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (facts,) = json.loads(done.stdout)["bands"]
    band = read_schedule(schedule).bands[-1]
    assert band.near_tokens in (64, 128) and facts["near_tokens"] == band.near_tokens
    assert set(facts["baselines"]) == {"yarn", "ntk", "pi", "near"}
    assert facts["searched_loss"] < facts["searched_loss_plain"] <= facts["searched_loss_yarn"]
    assert band.plain.found.data_digest == band.found.data_digest
    assert band.plain.found.losses == (facts["searched_loss_plain"], facts["searched_loss_yarn"])
    assert ropewalk_command("convert", tiny, long, "--schedule", schedule).returncode == 0
    shown = ropewalk_command("inspect", long).stdout
    assert f"It has no near window ({band.near_tokens} tokens): it reads with plain λ" in shown
    again = run(*options, "--near-tokens", "64,128", "--start", plain[1], "-o", schedule)
    assert f"beyond {band.near_tokens} tokens" in again.stdout and "stock llama.cpp, without the near" in again.stdout
    beyond = run(long, "--context", 1024, *options[3:], "--near-tokens", "0,64", "-o", tmp_path / "t.json")
    assert beyond.returncode == 0, beyond.stderr
    assert read_schedule(tmp_path / "t.json").bands[:-1] == read_schedule(schedule).bands


def test_mistakes_are_one_line(mistake, options, tmp_path):
    out = ["-o", tmp_path / "s.json"]
    model, *rest = options
    other = tmp_path / "other.json"
    facts = RopeFacts(n_rot=8, freq_base=10000.0, original_context=256)
    write_schedule(Schedule(facts=facts, bands=(native_band(facts),)), other)
    evolution = ["--algorithm", "evolution"]
    cases = [
        ([model, *rest], "-o: missing"),
        ([model, *rest, *out, "--budget", "soon"], "--budget: 'soon', expected a time like 45m"),
        ([model, *rest, *out, "--budget", "2"], "budget: 2 evaluations, expected at least"),
        ([model, *rest, *out, "--algorithm", "magic"], "--algorithm: 'magic', expected one of cma"),
        ([model, *rest, *out, "--objective", "magic"], "objective: 'magic', expected tail"),
        ([model, *rest, *out, "--parents", "4"], "--parents: only valid with --algorithm evolution"),
        ([model, *rest, *out, *evolution, "--mutations", "-1"], "mutations: -1, expected at least 0"),
        ([model, *rest, *out, *evolution, "--probability", "2"], "probability: 2, expected more than 0"),
        ([model, *rest, *out, "--engine", "moon"], "--engine: 'moon', expected one of local, ray"),
        ([model, *rest, *out, "--ray-address", "x:1"], "--ray-address: only valid with --engine ray"),
        ([model, *rest, *out, "--algorithm", "gradient", "--evaluator", "llama"], "llama has no gradients"),
        ([model, *rest, *out, "--context", "200"], "expected more than the 256"),
        ([model, *rest, *out, "--bands", "100,512"], "expected rising numbers above the 256"),
        ([model, *rest, *out, "--bands", "8192", "--budget", "50"], "too few for"),
        ([model, *rest, *out, "--bands", "512,4096,8192", "--budget", "50"], "passages of 8,191"),
        ([model, *rest, *out, "--near-tokens", "0,256"], "near tokens: 256, expected 0 to 255"),
        ([model, *rest, *out, "--near-tokens", "-1"], "--near-tokens: '-1', expected numbers of tokens"),
        ([model, *rest, *out, "--near-tokens", "wide"], "--near-tokens: 'wide', expected numbers of tokens"),
        ([model, *rest, *out, "--start", tmp_path / "none.json"], "none.json: cannot read the schedule"),
        ([model, *rest, *out, "--start", other], "start: the schedule is for n_rot 8, the model has 32"),
        ([model, *rest, *out, "--kv", "magic"], "kv: 'magic', expected"),
        ([model, *rest, *out, "--kv", "auto"], "kv: 'auto', expected a type by name"),
        ([model, *rest, *out, "--plot", "s.svg"], "--plot: 's.svg', expected a name that ends in .png"),
        ([model, *rest, *out, "--plot", tmp_path / "no" / "s.png"], "its folder does not exist"),
        ([model, *rest, "-o", tmp_path], "is a folder"),
        ([model, *rest, "-o", tmp_path / "no" / "s.json"], "its folder does not exist"),
        ([model, *rest, "-o", model], "-o: would replace a file that is not a schedule"),
        ([tmp_path / "none.gguf", *rest, *out], "none.gguf"),
    ]
    for arguments, message in cases:
        assert message in mistake("search", *arguments), arguments
    assert not (tmp_path / "s.json").exists()


def test_evolution_with_options_without_screening_or_short_texts(run, tiny, texts, tmp_path):
    folder = shutil.copytree(texts, tmp_path / "texts")
    (folder / "short.txt").write_text(TOPICS[:300])
    schedule = tmp_path / "s.json"
    sizes = {"population": 6, "parents": 3, "mutations": 2, "crossovers": 1, "generations": 2, "probability": 0.5}
    more = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    plain = [tiny, "--context", 512, "--text", folder, "--budget", 40, "--evaluator", "torch", "--threads", 1]
    plain += ["--near-tokens", 0]
    done = run(*plain, "--algorithm", "evolution", "--no-screen", *more, "-o", schedule, "--json")
    assert done.returncode == 0, done.stderr
    (band,) = json.loads(done.stdout)["bands"]
    assert band["fidelity"] == "full" and band["rank_correlation"] is None
    # Baselines, YaRN as the start, and at most a first generation of 6 and two of 3; racing saves some.
    assert 6 < band["evaluations"] <= 3 + 1 + 6 + 2 * 3


def test_a_larger_budget_continues_in_every_band(run, tiny, texts, tmp_path):
    options = [tiny, "--bands", "512,768", "--text", texts, "--window", 64, "--threads", 1, "-o", tmp_path / "s.json"]
    lines = []
    for budget in (24, 40):
        done = run(*options, "--near-tokens", 0, "--evaluator", "torch", "--budget", budget, "--json")
        assert done.returncode == 0, done.stderr
        assert [band["context"] for band in json.loads(done.stdout)["bands"]] == [512, 768]
        lines.append([path.read_text().splitlines() for path in sorted((tmp_path / "s.json.search").glob("*.journal"))])
    for before, after in zip(*lines, strict=True):
        assert after[: len(before)] == before and len(after) > len(before)


def test_stopped_by_a_signal(options, tmp_path):
    job = subprocess.Popen(command(*options, "--budget", "1h", "-o", tmp_path / "s.json"), stderr=subprocess.PIPE)
    journal, deadline = tmp_path / "s.json.search" / "512.journal", time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    expected = f"ropewalk: stopped; the same command resumes from {tmp_path / 's.json.search'}\n"
    assert job.communicate()[1].decode() == expected and job.returncode == 130


def test_the_journal_of_another_search_is_refused(mistake, options, plain, tmp_path):
    schedule = tmp_path / "s.json"
    shutil.copytree(f"{plain[1]}.search", f"{schedule}.search")
    message = mistake("search", *options, "--evaluator", "llama", "-o", schedule, "--seed", 9)
    assert "the journal of another search" in message and not schedule.exists()
