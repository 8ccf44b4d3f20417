"""Whole searches on synthetic losses: smooth around an optimum near YaRN, with noise."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ropewalk import UserError
from ropewalk.factors import STILL_FACTOR, Provenance, RopeFacts, Schedule, native_band, schedule_from_dict
from ropewalk.factors.search import (
    Budget,
    CmaSettings,
    Evolution,
    GradientSettings,
    InProcess,
    Note,
    Progress,
    Racing,
    Result,
    Screening,
    Settings,
    Space,
    Task,
    band_key,
    carried,
    search,
)
from ropewalk.factors.search.run import spearman

FACTS = RopeFacts(n_rot=64, freq_base=100000.0, original_context=8192)
SPACE = Space(FACTS, native_band(FACTS), 32768)


class Valley:
    """A smooth loss around an optimum near YaRN's curve, with a separate offset and noise for each passage."""

    key = "valley"

    def __init__(self, passages=3, noise=0.0, screen_noise=0.0):
        self.weights = [1.0] * passages
        self.noise, self.screen_noise = noise, screen_noise
        self.asked = []
        yarn = np.array(SPACE.seed("yarn").log_factors)
        n = SPACE.n_pairs - SPACE.n_fixed
        bend = np.interp(np.linspace(0, 1, n), [0, 0.4, 1], [0.1, -0.15, 0.08])
        self.best = yarn + np.r_[np.zeros(SPACE.n_fixed), bend]
        self.best_attention = SPACE.seed("yarn").attention_factor * 0.97

    def evaluate(self, task):
        self.asked.append((band_key(task.band), task.passage, task.fidelity, task.gradient))
        candidate = SPACE.candidate(task.band)
        away = np.array(candidate.log_factors) - self.best
        attention = np.log(candidate.attention_factor / self.best_attention)
        start = 0.01 * abs(np.log2(1 + candidate.start_tokens) - np.log2(1 + 16))
        loss = 3.2 + 0.3 * task.passage + 2 * (away**2).mean() + 4 * attention**2 + start
        digest = hashlib.sha256(f"{band_key(task.band)} {task.passage} {task.fidelity}".encode()).digest()
        scale = self.screen_noise if task.fidelity == "screen" else self.noise
        loss += scale * (digest[0] / 255 - 0.5)
        slope = tuple((4 * away / len(away)).tolist()) if task.gradient else ()
        return Result(loss, 0.001, slope, 8 * attention if task.gradient else 0.0)


WINDOWS = replace(SPACE, near_tokens=(0, 512, 1024, 2048, 4096))


class Bay(Valley):
    """As `Valley`; and with near windows a lower one, around one of 1,024 tokens and λ a little below near's.

    It is lowest with `still` pairs that stand still beyond the window; how little that matters is `still_loss`.
    """

    still, still_loss = 0, 0.001

    def evaluate(self, task):
        window = task.band.near_tokens
        if not window:
            return super().evaluate(task)
        self.asked.append((band_key(task.band), task.passage, task.fidelity, task.gradient))
        candidate = WINDOWS.candidate(task.band)
        n = WINDOWS.n_fixed
        away = np.array(candidate.log_factors) - np.log(WINDOWS.stretch(window))
        away[:n] = 0
        away[n:] += np.linspace(0.2, 0, len(away) - n)
        loss = 3.0 + 0.3 * task.passage + 2 * (away**2).mean() + 0.03 * abs(np.log2(window / 1024))
        loss += 4 * np.log(candidate.attention_factor) ** 2 + self.still_loss * abs(candidate.still_pairs - self.still)
        slope = tuple((4 * away / len(away)).tolist()) if task.gradient else ()
        return Result(loss, 0.001, slope, 8 * np.log(candidate.attention_factor) if task.gradient else 0.0)


class StillBay(Bay):
    """As `Bay`, lowest where the pairs stand still that turn within 1.5 windows of 1,024 tokens."""

    still, still_loss = 16, 0.004

    def __init__(self):
        super().__init__()
        self.tried = []

    def evaluate(self, task):
        self.tried.append(task.band.still_pairs)
        return super().evaluate(task)


class Slow(Valley):
    def evaluate(self, task):
        time.sleep(0.03)
        return super().evaluate(task)


def run(algorithm="cma", budget=150, evaluator=None, **settings):
    evaluator = evaluator or Valley()
    events = []
    settings = Settings(algorithm=algorithm, budget=Budget(evaluations=budget), **settings)
    return search(InProcess(evaluator), SPACE, settings, on_event=events.append), evaluator, events


@pytest.mark.parametrize(("algorithm", "budget"), [("cma", 150), ("gradient", 120), ("evolution", 400)])
def test_each_algorithm_beats_yarn_and_keeps_its_budget(algorithm, budget):
    outcome, evaluator, events = run(algorithm, budget)
    assert outcome.beats_yarn and outcome.loss < outcome.yarn - 0.01
    assert outcome.evaluations <= budget + 1e-6
    factors = outcome.band.rescale_factors
    assert list(factors) == sorted(factors) and outcome.band.context == 32768
    found = outcome.band.found
    assert found.method == algorithm and found.onto is None and found.losses == (outcome.loss, outcome.yarn)
    assert len(evaluator.asked) == len(set(evaluator.asked))  # nothing is evaluated twice
    assert set(outcome.baselines) == {"yarn", "ntk", "pi"}
    spent = [event.evaluations for event in events if isinstance(event, Progress)]
    assert spent == sorted(spent)
    losses = [loss for _, loss in outcome.history]
    assert losses == sorted(losses, reverse=True)


def test_a_descent_ends_when_hardly_anything_is_gained(monkeypatch):
    steps = GradientSettings(steps=200)
    ended, reader, _ = run("gradient", 5000, descent=steps)
    monkeypatch.setattr("ropewalk.factors.search.gradient.MIN_GAIN_SHARE", 0)
    full, full_reader, _ = run("gradient", 5000, descent=steps)
    assert len(reader.asked) < len(full_reader.asked)
    assert ended.loss - full.loss < 0.1 * (ended.yarn - full.loss)


def test_cma_needs_a_tenth_of_evolutions_evaluations():
    evolution, _, _ = run("evolution", 1400, racing=Racing(on=False))
    cma, _, _ = run("cma", 134)
    assert evolution.evaluations > 1300 and cma.evaluations <= evolution.evaluations / 10
    assert cma.loss <= evolution.loss


def test_the_same_seed_finds_the_same_band_and_another_seed_another():
    first, again, other = (run("cma", 60, seed=seed)[0] for seed in (1, 1, 2))
    assert replace(first, seconds=0) == replace(again, seconds=0)
    assert first.band.rescale_factors != other.band.rescale_factors


def test_racing_finds_as_good_a_band_with_fewer_readings():
    raced, reader, _ = run("evolution", 500, Valley(8, noise=0.002), evolution=Evolution(generations=10))
    plain, plain_reader, _ = run(
        "evolution", 500, Valley(8, noise=0.002), evolution=Evolution(generations=10), racing=Racing(on=False)
    )
    assert raced.dropped > 0 and plain.dropped == 0
    assert len(reader.asked) < len(plain_reader.asked)
    assert raced.loss <= plain.loss + 0.005


def test_screening_is_used_only_if_it_ranks_bands_like_full_readings():
    good, evaluator, events = run(budget=100, evaluator=Valley(screen_noise=0.0005), screening=Screening(allowed=True))
    assert good.fidelity == "screen" and good.correlation > 0.8 and good.beats_yarn
    assert any(isinstance(event, Note) and "it is used" in event.text for event in events)
    full = [asked for asked in evaluator.asked if asked[2] == "full"]
    assert len(full) < len(evaluator.asked) / 2
    bad, evaluator, _ = run(budget=100, evaluator=Valley(screen_noise=5), screening=Screening(allowed=True))
    assert bad.fidelity == "full" and bad.correlation < 0.8
    _, evaluator, events = run(budget=12, evaluator=Valley(passages=1), screening=Screening(allowed=True))
    assert {asked[2] for asked in evaluator.asked} == {"full"}
    assert any(isinstance(event, Note) and "too small a budget" in event.text for event in events)


def in_windows(algorithm="cma", budget=150, evaluator=None, space=WINDOWS, plain=None, **settings):
    evaluator = evaluator or Bay()
    settings = Settings(algorithm=algorithm, budget=Budget(evaluations=budget), **settings)
    return search(InProcess(evaluator), space, settings, plain=plain), evaluator


@pytest.mark.parametrize(("algorithm", "budget"), [("cma", 150), ("gradient", 120), ("evolution", 400)])
def test_each_algorithm_finds_the_near_window_and_factors_beyond_it(algorithm, budget):
    outcome, evaluator = in_windows(algorithm, budget)
    near = Bay().evaluate(Task(WINDOWS.band(WINDOWS.closed_form("near", 1024)), 1)).loss
    assert outcome.band.near_tokens == 1024 and outcome.band.found.method == algorithm
    assert outcome.loss < near - 0.005 and outcome.loss < outcome.yarn - 0.1
    assert outcome.evaluations <= budget + 1e-6 and len(evaluator.asked) == len(set(evaluator.asked))
    factors = np.array(outcome.band.rescale_factors)
    assert np.all(np.diff(factors) >= 0) and factors[0] == 1
    assert set(outcome.baselines) == {"yarn", "ntk", "pi", "near"}
    plain = outcome.band.plain
    assert plain.near_tokens == 0 and plain.found.losses == (outcome.plain, outcome.yarn)
    schedule = Schedule(facts=FACTS, bands=(SPACE.onto, outcome.band))
    assert schedule_from_dict(schedule.model_dump(), "it") == schedule


@pytest.mark.parametrize(("algorithm", "budget"), [("cma", 150), ("gradient", 120), ("evolution", 600)])
def test_each_algorithm_finds_the_pairs_that_stand_still(algorithm, budget):
    outcome, evaluator = in_windows(algorithm, budget, StillBay())
    band, n = outcome.band, outcome.band.still_pairs
    assert band.near_tokens == 1024 and n == StillBay.still and outcome.evaluations <= budget + 1e-6
    moving = np.array(band.rescale_factors[n:])
    assert set(band.rescale_factors[:n]) == {STILL_FACTOR} and np.all(np.diff(moving) >= 0)
    form = WINDOWS.with_still_pairs(WINDOWS.seed("near", 1024), n)
    assert outcome.loss < evaluator.evaluate(Task(WINDOWS.band(form), 1)).loss - 0.003  # λ are searched as well
    assert len(evaluator.asked) - 1 == len(set(evaluator.asked[:-1]))
    schedule = Schedule(facts=FACTS, bands=(SPACE.onto, band))
    assert schedule_from_dict(schedule.model_dump(), "it") == schedule


@pytest.mark.parametrize(("algorithm", "budget"), [("cma", 60), ("gradient", 60)])
def test_still_pairs_are_chosen_before_the_factors_with_a_tenth_of_the_budget(algorithm, budget):
    events = []
    settings = Settings(algorithm=algorithm, budget=Budget(evaluations=budget))
    outcome = search(InProcess(StillBay()), WINDOWS, settings, on_event=events.append)
    steps = [event for event in events if isinstance(event, Progress)]
    begun = next(i for i, event in enumerate(steps) if event.step == "start")
    descended = next(i for i, event in enumerate(steps) if event.step.startswith(("curve 1", "step 1")))
    chosen = [event for event in steps[begun:descended] if event.step == "still pairs"]
    assert 0 < chosen[-1].evaluations - steps[begun].evaluations <= budget / 10
    assert outcome.band.still_pairs > WINDOWS.n_fixed


@pytest.mark.parametrize(("algorithm", "budget"), [("cma", 60), ("gradient", 60), ("evolution", 120)])
def test_nothing_stands_still_without_a_window(algorithm, budget):
    evaluator = StillBay()
    in_windows(algorithm, budget, evaluator, replace(SPACE, near_tokens=(0,)))
    assert set(evaluator.tried) == {0}


def test_near_itself_is_found_if_nothing_is_better():
    class Steep(Bay):
        def evaluate(self, task):
            result = super().evaluate(task)
            near = WINDOWS.band(WINDOWS.closed_form("near", task.band.near_tokens)) if task.band.near_tokens else None
            return result if near and near.rescale_factors == task.band.rescale_factors else replace(result, loss=9)

    outcome, _ = in_windows(budget=40, evaluator=Steep())
    assert outcome.band.found.method == "near" and outcome.band.near_tokens == 1024
    assert outcome.band.plain.found.method == "yarn" and outcome.plain == outcome.yarn


def test_a_plain_band_that_is_known_stays_with_a_near_window():
    known = run(budget=100, evaluator=Bay())[0].band
    outcome, evaluator = in_windows(budget=60, plain=known)
    assert outcome.band.near_tokens == 1024 and outcome.plain < outcome.yarn
    np.testing.assert_allclose(outcome.band.plain.rescale_factors, known.rescale_factors, rtol=1e-6)
    assert outcome.band.plain.found.method == "cma" and band_key(known) in {asked[0] for asked in evaluator.asked}
    worse = SPACE.band(SPACE.closed_form("pi"), Provenance(method="pi"))
    assert in_windows(budget=60, plain=worse)[0].band.plain.found.method == "yarn"


class Watched(Bay):
    """`Bay` that keeps the near windows it was asked for."""

    def __init__(self):
        super().__init__()
        self.windows = set()

    def evaluate(self, task):
        self.windows.add(task.band.near_tokens)
        return super().evaluate(task)


@pytest.mark.parametrize("choices", [(0,), (512,), (0, 4096)])
@pytest.mark.parametrize(("algorithm", "budget"), [("cma", 60), ("gradient", 60), ("evolution", 120)])
def test_only_the_windows_that_are_given_are_read(choices, algorithm, budget):
    evaluator = Watched()
    outcome, _ = in_windows(algorithm, budget, evaluator, replace(SPACE, near_tokens=choices))
    assert evaluator.windows == {0, *choices}  # closed forms without a window are baselines in any case
    assert outcome.band.near_tokens in choices


def test_screening_is_compared_with_full_readings_in_near_windows_as_well():
    evaluator = Bay()
    outcome, _ = in_windows(budget=100, evaluator=evaluator, screening=Screening(allowed=True))
    assert outcome.fidelity == "screen" and outcome.band.near_tokens == 1024
    reference = band_key(WINDOWS.band(WINDOWS.reference))
    assert (reference, 2, "full", False) in evaluator.asked  # read in full, as screening keeps its state


def test_a_windowed_band_is_carried_to_a_longer_context():
    short = replace(WINDOWS, context=16384)
    bent = short.moved(short.seed("near", 2048), np.linspace(-0.1, 0, 32 - short.n_fixed))
    candidate = carried(short, short.band(bent), WINDOWS)
    assert candidate.near_tokens == 2048 and candidate.attention_factor == 1
    assert candidate.log_factors[-1] == pytest.approx(np.log(WINDOWS.stretch(2048)))
    assert candidate.log_factors[WINDOWS.n_fixed] < np.log(WINDOWS.stretch(2048)) - 0.1
    still = carried(short, short.band(short.with_still_pairs(bent, 18)), WINDOWS)
    assert still.still_pairs == 18 and still.log_factors[18:] == candidate.log_factors[18:]


@pytest.mark.parametrize(("correlation", "fidelity"), [(0.9, "screen"), (0.7, "full")])
def test_a_known_correlation_is_not_measured_again(correlation, fidelity):
    evaluator = Valley()
    settings = Settings(budget=Budget(evaluations=60), screening=Screening(allowed=True))
    outcome = search(InProcess(evaluator), SPACE, settings, correlation=correlation)
    assert outcome.fidelity == fidelity and outcome.correlation == correlation
    if fidelity == "screen":  # YaRN's band and the finalists
        full = {asked[0] for asked in evaluator.asked if asked[2] == "full"}
        assert len(full) <= 1 + settings.finalists


def test_the_result_is_yarn_if_nothing_beats_it():
    class Yarn(Valley):
        def evaluate(self, task):
            return Result(3.0 + (task.band != SPACE.band(SPACE.seed("yarn"))), 0.001)

    outcome, _, _ = run(budget=30, evaluator=Yarn())
    assert not outcome.beats_yarn and outcome.loss == outcome.yarn and outcome.band.found.method == "yarn"
    np.testing.assert_allclose(outcome.band.rescale_factors, SPACE.band(SPACE.seed("yarn")).rescale_factors)


def test_losses_that_are_not_numbers_never_win():
    class Holes(Valley):
        def evaluate(self, task):
            result = super().evaluate(task)
            return Result(float("nan"), 0.001) if len(self.asked) % 5 == 0 and task.passage == 1 else result

    outcome, _, _ = run(budget=60, evaluator=Holes())
    assert np.isfinite(outcome.loss)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="algorithm: 'magic', expected one of cma, evolution, gradient"):
        run("magic")
    with pytest.raises(UserError, match="budget: 60 evaluations, expected at least 68"):
        run("evolution", 60)
    with pytest.raises(UserError, match="budget: none"):
        Settings(budget=Budget())


def test_too_short_a_time_is_reported_as_soon_as_it_is_known(tmp_path):
    journal, evaluator = tmp_path / "journal", Slow()
    with pytest.raises(UserError, match=r"budget: 0.001 minutes for 32,768 tokens, expected at least 1 on"):
        search(InProcess(evaluator), SPACE, Settings(budget=Budget(seconds=0.06)), journal)
    read = set(evaluator.asked)
    evaluator = Valley()  # a longer time resumes from there
    assert search(InProcess(evaluator), SPACE, Settings(budget=Budget(evaluations=60)), journal).beats_yarn
    assert read and not read.intersection(evaluator.asked)


def in_time(seconds, evaluator, **settings):
    """Search with a time budget; return the outcome and the notes."""
    events = []
    settings = Settings(budget=Budget(seconds=seconds), screening=Screening(allowed=True), **settings)
    outcome = search(InProcess(evaluator), SPACE, settings, on_event=events.append)
    return outcome, [event.text for event in events if isinstance(event, Note)]


def test_fewer_passages_are_read_if_time_is_short():
    class Long(Valley):
        def evaluate(self, task):
            time.sleep(0.1 if task.fidelity == "full" else 0.01)
            return super().evaluate(task)

    reader = Long(passages=3)
    outcome, notes = in_time(2, reader, fewer_passages=True, held_passages=2, screen_cost=0.1)
    assert outcome.passages in (1, 2) and f"{outcome.passages} of 3 passages" in notes[0]
    assert {asked[1] for asked in reader.asked} == set(range(outcome.passages))
    assert outcome.seconds < 2 - 2 * outcome.passages * 0.1  # what is reserved for judging
    with pytest.raises(UserError, match="minutes"):
        in_time(0.5, Long(passages=3), held_passages=2)
    whole, notes = in_time(60, Valley(), fewer_passages=True, covariance=CmaSettings(smallest_step=0.03))
    assert whole.passages == 3 and not any("passages" in text for text in notes)


def test_screening_is_used_untested_if_the_budget_is_too_small_for_anything_else():
    evaluator, events = Valley(passages=1), []
    settings = Settings(budget=Budget(evaluations=7), screening=Screening(allowed=True), screen_cost=0.05)
    outcome = search(InProcess(evaluator), SPACE, settings, on_event=events.append)
    assert outcome.fidelity == "screen" and outcome.correlation is None and outcome.evaluations <= 7
    assert any(isinstance(event, Note) and "untested; the best are read in full" in event.text for event in events)
    assert sum(asked[2] == "screen" for asked in evaluator.asked) > 60
    assert outcome.beats_yarn and sum(asked[2] == "full" for asked in evaluator.asked) >= 2


def test_a_band_is_carried_to_a_longer_context():
    short = Space(FACTS, native_band(FACTS), 16384)
    candidate = carried(short, short.band(short.seed("yarn")), SPACE)
    yarn = SPACE.seed("yarn")
    assert candidate.log_factors[-1] == pytest.approx(np.log(4)) and candidate.attention_factor == pytest.approx(
        yarn.attention_factor, rel=0.01
    )
    outcome, _, _ = run(budget=60)
    with_seed = search(
        InProcess(Valley()), SPACE, Settings(budget=Budget(evaluations=60)), seeds=[SPACE.candidate(outcome.band)]
    )
    assert with_seed.loss <= outcome.loss


def test_a_second_search_extends_the_first():
    first, _, _ = run(budget=60)
    onto = Space(FACTS, first.band, 65536)
    assert onto.scale == 2 and onto.onto_method == "cma"
    band = onto.band(onto.seed("yarn"))
    assert band.rescale_factors[-1] == pytest.approx(2 * first.band.rescale_factors[-1])


def test_spearman():
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, a**3) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, np.ones(4)) == 0


RUN = """
    import time
    from test_search import *
    from pathlib import Path

    class Slow(Bay):
        def evaluate(self, task):
            result = super().evaluate(task)
            with open({log!r}, "a") as file:
                file.write(f"{{self.asked[-1]}}\\n")
            time.sleep(0.01)
            return result

    settings = Settings(algorithm={algorithm!r}, budget=Budget(evaluations=40), gradient_cost=2, seed=5)
    print(search(InProcess(Slow(noise=0.001)), {space}, settings, Path({journal!r})).band.model_dump_json())
"""


@pytest.mark.parametrize(("algorithm", "space"), [("cma", "WINDOWS"), ("gradient", "SPACE"), ("gradient", "WINDOWS")])
def test_killed_at_any_moment_a_search_resumes_to_the_same_result(tmp_path, algorithm, space):
    def start(name):
        paths = {"log": str(tmp_path / f"{name}.log"), "journal": str(tmp_path / f"{name}.journal")}
        code = textwrap.dedent(RUN).format(algorithm=algorithm, space=space, **paths)
        paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)

    expected = start("whole").communicate()[0]
    rng = np.random.default_rng(0)
    kills = 0
    while True:
        job = start("killed")
        journal = tmp_path / "killed.journal"
        before = journal.stat().st_size if journal.exists() else 0
        while job.poll() is None and (not journal.exists() or journal.stat().st_size < before + 300):
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.15)))
        if kills >= 4 or job.poll() is not None:
            break
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        kills += 1
    assert kills >= 2 and job.communicate()[0] == expected
    asked = (tmp_path / "killed.log").read_text().splitlines()
    whole = (tmp_path / "whole.log").read_text().splitlines()
    assert set(asked) == set(whole) and len(asked) - len(set(asked)) <= kills  # the one that each kill cut off
