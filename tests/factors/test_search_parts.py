"""The parts of a search alone: its space, evolution as a generator of candidates, its race and its journal."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from ropewalk import UserError
from ropewalk.factors import (
    START_TOKENS,
    STILL_FACTOR,
    Band,
    Provenance,
    RopeFacts,
    Schedule,
    native_band,
    near,
    ntk,
    pi,
    yarn,
    yarn_attention_factor,
)
from ropewalk.factors.search import (
    Budget,
    Candidate,
    Evolution,
    Journal,
    Racing,
    Result,
    Settings,
    Space,
    Task,
    band_key,
    usual_near_tokens,
)
from ropewalk.factors.search.algorithm import Response, Score, Start
from ropewalk.factors.search.evolution import search as evolve
from ropewalk.factors.search.journal import digest_of, key_of_task
from ropewalk.factors.search.race import race
from ropewalk.factors.search.space import FAST_ROTATIONS, non_decreasing

FACTS = RopeFacts(n_rot=64, freq_base=100000.0, original_context=8192)
SPACE = Space(FACTS, native_band(FACTS), 32768)
WINDOWS = replace(SPACE, near_tokens=(0, 512, 2048, 4096))
SMALL = Space(
    RopeFacts(n_rot=14, freq_base=10000.0, original_context=64), Band(context=64, rescale_factors=[1] * 7), 256
)


# --- space


def nearest_by_trying_all(values, low, high):
    """Least squares over all ways to cut the values into constant segments."""
    best = None
    for cuts in itertools.product([False, True], repeat=len(values) - 1):
        segments = np.split(values, np.flatnonzero(cuts) + 1)
        level = np.concatenate([np.full(len(part), np.clip(part.mean(), low, high)) for part in segments])
        if np.all(np.diff(level) >= 0) and (
            best is None or np.sum((level - values) ** 2) < np.sum((best - values) ** 2)
        ):
            best = level
    return best


@pytest.mark.parametrize("fixed", [0, 1, 3])
def test_projection_is_the_nearest_within_bounds(fixed):
    space = replace(SMALL, fixed_pairs=fixed)
    rng = np.random.default_rng(fixed)
    expected_fixed = np.log(yarn(14, 4.0, 10000.0, 64))[:fixed]
    floor = max(expected_fixed[-1], 0) if fixed else 0.0
    for _ in range(60):
        values = rng.normal(0.7, 0.8, 7)
        candidate = space.project(Candidate(tuple(values), 3, float(rng.uniform(0.5, 2))))
        found = np.array(candidate.log_factors)
        np.testing.assert_allclose(found[:fixed], expected_fixed)
        np.testing.assert_allclose(found[fixed:], nearest_by_trying_all(values[fixed:], floor, math.log(5)), atol=1e-12)
        assert np.all(np.diff(found) >= 0) and found[-1] <= math.log(1.25 * 4) and found[0] >= 0
        assert candidate.start_tokens in (2, 4) and 1 <= candidate.attention_factor <= 2 * yarn_attention_factor(4) - 1
        again = space.project(candidate)
        np.testing.assert_allclose(again.log_factors, candidate.log_factors, atol=1e-15)
        assert (again.start_tokens, again.attention_factor) == (candidate.start_tokens, candidate.attention_factor)


def test_non_decreasing_moves_both_sides_of_a_violation():
    np.testing.assert_allclose(non_decreasing(np.array([3.0, 1.0, 2.0, 7.0, 5.0])), [2, 2, 2, 6, 6])


def test_closed_forms_are_unmodified_and_seeds_are_within_the_space():
    forms = {"pi": (pi(64, 4), 1.0), "ntk": (ntk(64, 4), 1.0)}
    forms["yarn"] = (yarn(64, 4, 100000.0, 8192), yarn_attention_factor(4))
    for method, (factors, attention) in forms.items():
        candidate = SPACE.closed_form(method)
        np.testing.assert_allclose(np.exp(candidate.log_factors), factors)
        assert (candidate.start_tokens, candidate.attention_factor) == (0, attention)
        seed = SPACE.seed(method)
        assert seed == SPACE.project(seed)
        np.testing.assert_allclose(np.exp(seed.log_factors[SPACE.n_fixed :]), factors[SPACE.n_fixed :])
    assert SPACE.seed("yarn") == SPACE.closed_form("yarn")  # it is within the space already


def test_pairs_that_rotate_often_are_not_searched():
    rotations = 8192 / (2 * np.pi * 100000.0 ** (np.arange(32) / 32))
    assert SPACE.n_fixed == np.sum(rotations > FAST_ROTATIONS) > 0
    assert replace(SPACE, fixed_pairs=0).n_fixed == 0
    fast = RopeFacts(n_rot=4, freq_base=2.0, original_context=1 << 20)
    assert Space(fast, native_band(fast), 1 << 21).n_fixed == 1  # never all of them


def test_a_band_is_multiplied_onto_the_one_that_is_extended():
    factors = tuple(np.linspace(1, 6, 32))
    onto = Band(context=16384, rescale_factors=factors, start_tokens=7, force_start_tokens=True, attention_factor=1.1)
    space = Space(FACTS, onto, 32768)
    assert space.scale == 2 and 7 in space.start_token_choices
    band = space.band(space.seed("yarn"))
    assert (band.context, band.start_tokens) == (32768, 7)
    np.testing.assert_allclose(band.rescale_factors, yarn(64, 2, 100000.0, 16384) * factors, rtol=1e-8)
    assert band.attention_factor == pytest.approx(1.1 * yarn_attention_factor(2))
    assert space.onto_method == "unknown" and SPACE.onto_method is None


def test_band_and_candidate_round_trip():
    rng = np.random.default_rng(0)
    onto = SPACE.band(SPACE.seed("yarn"))
    for space in (SPACE, Space(FACTS, onto, 65536)):
        for _ in range(20):
            moved = space.moved(space.seed("ntk"), rng.normal(0, 0.1, 32 - space.n_fixed), 0.03)
            candidate = replace(moved, start_tokens=int(rng.choice(START_TOKENS)))
            back = space.candidate(space.band(candidate))
            np.testing.assert_allclose(back.log_factors, candidate.log_factors, atol=2e-9)
            assert back.start_tokens == candidate.start_tokens
            assert back.attention_factor == pytest.approx(candidate.attention_factor)
            assert band_key(space.band(back)) == band_key(space.band(candidate))


def test_a_bands_key_depends_on_all_that_a_loss_depends_on():
    band = SPACE.band(SPACE.seed("yarn"))
    factors = np.array(band.rescale_factors)
    others = [
        {"context": 40000},
        {"start_tokens": 4},
        {"near_tokens": 512},
        {"attention_factor": band.attention_factor + 2e-6},
        {"rescale_factors": tuple(factors + 2e-6 * (np.arange(32) == 31))},
    ]
    keys = {band_key(band), *(band_key(band.model_copy(update=other)) for other in others)}
    assert len(keys) == 6
    assert band_key(band.model_copy(update={"rescale_factors": tuple(factors + 1e-10)})) == band_key(band)


def test_the_usual_near_windows():
    def usual(original):
        return usual_near_tokens(FACTS.model_copy(update={"original_context": original}))

    assert usual(8192) == (0, 512, 1024, 2048, 4096)
    assert usual(2048) == usual(3000)[:3] == (0, 512, 1024)
    assert (usual(256), usual(1)) == ((0, 128), (0, 0))
    assert WINDOWS.windows == (512, 2048, 4096) and WINDOWS.usual_window == 4096 and SPACE.usual_window == 0
    assert WINDOWS.reference == WINDOWS.closed_form("near", 4096) and SPACE.reference == SPACE.seed("yarn")


@pytest.mark.parametrize("window", [512, 2048, 4096])
def test_near_is_the_closed_form_and_within_the_space_but_for_fixed_pairs(window):
    candidate = WINDOWS.closed_form("near", window)
    band = WINDOWS.band(candidate)
    assert (candidate.near_tokens, candidate.attention_factor) == (window, 1)
    np.testing.assert_allclose(band.rescale_factors, near(64, 4, 8192, window), rtol=1e-8)
    assert WINDOWS.candidate(band).near_tokens == band.near_tokens == window
    seed = WINDOWS.seed("near", window)
    assert seed == WINDOWS.project(seed) and set(seed.log_factors[: WINDOWS.n_fixed]) == {0.0}
    assert seed.log_factors[WINDOWS.n_fixed :] == candidate.log_factors[WINDOWS.n_fixed :]


def test_candidates_with_a_near_window_stay_within_the_bounds_of_schedules():
    rng = np.random.default_rng(1)
    for window in (512, 1000, 2048, 8000):
        for _ in range(20):
            values = tuple(rng.normal(1, 1.5, 32))
            candidate = WINDOWS.project(Candidate(values, int(rng.integers(0, 900)), 1.0, window))
            assert candidate.near_tokens in WINDOWS.windows and candidate.start_tokens <= candidate.near_tokens
            factors = np.array(WINDOWS.band(candidate).rescale_factors)
            assert np.all(np.diff(factors) >= 0) and factors[0] == 1
            stretch = (32768 - candidate.near_tokens) / (8192 - candidate.near_tokens)
            assert factors[-1] <= 1.25 * stretch * (1 + 1e-6)
            Schedule(facts=FACTS, bands=(WINDOWS.onto, WINDOWS.band(candidate)))
    only = replace(WINDOWS, near_tokens=(2048,))
    assert only.project(only.closed_form("yarn")).near_tokens == 0  # YaRN stays what it is
    assert only.project(Candidate((0.0,) * 32, near_tokens=7)).near_tokens == 2048
    narrow = replace(WINDOWS, near_tokens=(0, 64))
    assert narrow.project(Candidate((0.0,) * 32, 256, near_tokens=64)).start_tokens == 64


def test_another_near_window_stretches_the_factors():
    wide, narrow = (WINDOWS.seed("near", window) for window in (4096, 512))
    np.testing.assert_allclose(WINDOWS.with_window(wide, 512).log_factors, narrow.log_factors)
    bent = WINDOWS.moved(wide, np.linspace(-0.2, 0.1, 32 - WINDOWS.n_fixed))
    back = WINDOWS.with_window(WINDOWS.with_window(bent, 512), 4096)
    np.testing.assert_allclose(back.log_factors, bent.log_factors)


def test_the_numbers_of_still_pairs_to_choose_from():
    lengths = 2 * np.pi * 100000.0 ** (np.arange(32) / 32)
    below = [int(np.sum(lengths < 2048 * part)) for part in (1 / 8, 1 / 4, 1 / 2, 1, 1.5, 2)]
    assert WINDOWS.still_choices(2048) == (0, *below) and below[4] == 18
    assert WINDOWS.still_choices(0) == (0,) and len(WINDOWS.still_choices(16)) < 6  # none of them twice
    few = Space(FACTS.model_copy(update={"freq_base": 2.0}), SPACE.onto, 32768)
    assert few.still_choices(2048) == (0, 31)  # the slowest pair always moves
    scaled = FACTS.model_copy(update={"native_factors": (1.0,) * 10 + (8.0,) * 22})
    assert Space(scaled, native_band(scaled), 32768).still_choices(2048)[-1] < below[-1]  # by the model's own rotation


def test_pairs_that_stand_still_leave_the_others_free():
    bent = WINDOWS.moved(WINDOWS.seed("near", 2048), np.linspace(-0.3, 0.1, 32 - WINDOWS.n_fixed))
    still = WINDOWS.with_still_pairs(bent, 18)
    band = WINDOWS.band(still, Provenance(method="cma"))
    assert set(band.rescale_factors[:18]) == {STILL_FACTOR} and band.still_pairs == 18
    assert band.rescale_factors[18:] == WINDOWS.band(bent).rescale_factors[18:]
    assert WINDOWS.project(still) == still and set(still.log_factors[WINDOWS.n_fixed : 18]) == {bent.log_factors[18]}
    back = WINDOWS.project(WINDOWS.candidate(band))
    assert back.still_pairs == 18 and band_key(WINDOWS.band(back)) == band_key(band) != band_key(WINDOWS.band(bent))
    np.testing.assert_allclose(back.log_factors, still.log_factors, atol=2e-9)
    fewer = WINDOWS.band(WINDOWS.with_still_pairs(still, 14)).rescale_factors
    assert fewer[13] == STILL_FACTOR and set(fewer[14:18]) == {fewer[18]}
    nudge = np.zeros(32 - WINDOWS.n_fixed)
    nudge[18 - WINDOWS.n_fixed :] = -0.2  # no pair that stands still is in the way
    lower = WINDOWS.moved(still, nudge)
    np.testing.assert_allclose(np.array(lower.log_factors[18:]), np.array(still.log_factors[18:]) - 0.2)


def test_projection_keeps_still_pairs_within_reason():
    logs = WINDOWS.seed("near", 2048).log_factors
    assert WINDOWS.project(Candidate(logs, near_tokens=2048, still_pairs=40)).still_pairs == 31
    assert WINDOWS.project(Candidate(logs, near_tokens=0, still_pairs=5)).still_pairs == 0
    wide = WINDOWS.with_still_pairs(WINDOWS.seed("near", 4096), WINDOWS.still_choices(4096)[5])
    narrow = WINDOWS.with_window(wide, 512)
    assert narrow.still_pairs == WINDOWS.still_choices(512)[5]
    assert WINDOWS.with_window(narrow, 4096).still_pairs == wide.still_pairs
    assert WINDOWS.with_window(wide, 0).still_pairs == 0
    assert WINDOWS.with_window(WINDOWS.seed("near", 4096), 512).still_pairs == 0


def test_a_pair_that_hardly_turned_before_stands_still_with_its_own_factor():
    own = (1e30, *[1.0] * 31)
    onto = native_band(FACTS.model_copy(update={"native_factors": own}))
    space = Space(FACTS.model_copy(update={"native_factors": own}), onto, 32768, near_tokens=(2048,))
    band = space.band(space.with_still_pairs(space.seed("near", 2048), 3))
    assert band.rescale_factors[:3] == (1e30, STILL_FACTOR, STILL_FACTOR)
    Schedule(facts=space.facts, bands=(onto, band))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"near_tokens": ()}, "near tokens: none, expected"),
        ({"near_tokens": (0, -1)}, "near tokens: -1, expected 0 to 8191"),
        ({"near_tokens": (8192,)}, "near tokens: 8192, expected 0 to 8191"),
        ({"onto": Band(context=8192, rescale_factors=[1] * 32, near_tokens=9)}, "near_tokens: 9 in the band to extend"),
        (
            {
                "onto": Band(context=8192, rescale_factors=[1] * 32, start_tokens=64),
                "start_tokens": (64,),
                "near_tokens": (8,),
            },
            "near tokens: 8, expected at least the 64 start tokens, or 0",
        ),
        ({"onto": Band(context=8192, rescale_factors=[1, 1])}, r"rescale_factors: 2 numbers, expected n_rot/2 = 32"),
        ({"context": 4096}, "context: 4096, expected at least 8192"),
        ({"fixed_pairs": 32}, "fixed pairs: 32, expected 0 to 31"),
        ({"fixed_pairs": -1}, "fixed pairs: -1"),
        ({"headroom": 0.9}, r"headroom: 0\.9, expected"),
        ({"headroom": math.nan}, "headroom: nan"),
        ({"attention_range": (0.0, 1.0)}, "attention range: 0 to 1"),
        ({"attention_range": (1.2, 1.1)}, r"attention range: 1\.2 to 1\.1"),
        ({"start_tokens": (0, 5)}, "start tokens: 5, expected some of 0, 1, 2"),
    ],
)
def test_bad_spaces_are_named(values, message):
    with pytest.raises(UserError, match=message):
        replace(SPACE, **values)


# --- evolution


TARGET = np.array(replace(SPACE, fixed_pairs=1).seed("yarn").log_factors) * 1.15


def hill(candidate):
    """A smooth loss: least at a curve a little above YaRN's, with 16 start tokens."""
    return 3 + np.mean((np.array(candidate.log_factors) - TARGET) ** 2) + 0.01 * abs(candidate.start_tokens - 16) / 256


def drive(loss=hill, seed=0, space=None, extra=(), **settings):
    """Run the generator by hand; return its requests and the lowest loss after each."""
    space = space or replace(SPACE, fixed_pairs=1)
    settings = Settings("evolution", seed=seed, budget=Budget(evaluations=1), evolution=Evolution(**settings))
    seeds = tuple(Score(candidate, loss(candidate), 1, True) for candidate in (space.seed("yarn"), *extra))
    generator, answer, requests, best = evolve(Start(space, settings, seeds, math.inf)), None, [], math.inf
    lowest = []
    while True:
        try:
            requests.append(next(generator) if answer is None else generator.send(answer))
        except StopIteration:
            return requests, lowest
        answer = Response(
            tuple(Score(candidate, loss(candidate), 1, True) for candidate in requests[-1].candidates), math.inf
        )
        best = min([best, *(score.loss for score in answer.scores)])
        lowest.append(best)


def test_evolution_asks_as_published_and_improves():
    space = replace(SPACE, fixed_pairs=1)
    requests, lowest = drive(generations=12)
    assert [len(request.candidates) for request in requests] == [64] + [32] * 12  # 16 mutations and 16 crossovers each
    assert [len(request.rivals) for request in requests] == [0] + [32] * 12 and {
        request.places for request in requests
    } == {32}
    for method, candidate in zip(("pi", "ntk", "yarn"), requests[0].candidates, strict=False):
        np.testing.assert_allclose(np.exp(candidate.log_factors), np.exp(space.seed(method).log_factors), atol=0.005001)
    candidates = [candidate for request in requests for candidate in request.candidates]
    assert len(set(candidates)) == len(candidates)  # none twice
    for candidate in candidates:
        factors = np.array(space.band(candidate).rescale_factors)
        assert np.all(np.diff(factors) >= 0) and factors[-1] <= 1.25 * 4
        assert all(factor == round(factor, 2) for factor in factors[1:])
        assert factors[0] == space.band(space.seed("yarn")).rescale_factors[0]
        assert candidate.start_tokens in START_TOKENS
    attention = [candidate.attention_factor for candidate in candidates]
    assert set(attention) == {space.seed(method).attention_factor for method in ("pi", "yarn")}
    assert lowest[-1] < lowest[0] < hill(space.seed("yarn")) + 1e-3 and lowest == sorted(lowest, reverse=True)
    assert hill(space.seed("yarn")) - lowest[-1] > 0.2 * (hill(space.seed("yarn")) - 3)


def test_evolutions_parents_are_the_best_so_far():
    requests, _ = drive(generations=4)
    seen = []
    for before, after in itertools.pairwise(requests):
        seen += before.candidates
        assert sorted(map(hill, after.rivals)) == sorted(map(hill, seen))[:32]


def test_evolution_is_deterministic_by_seed():
    assert drive(generations=3) == drive(generations=3) != drive(generations=3, seed=1)


def test_evolution_takes_seeds_searches_attention_and_respects_small_settings():
    space = replace(SPACE, fixed_pairs=1)
    brought = space.moved(space.seed("yarn"), np.full(31, 0.03))
    requests, _ = drive(extra=[brought], generations=2, search_attention=True)
    np.testing.assert_allclose(
        np.exp(requests[0].candidates[3].log_factors), np.exp(brought.log_factors), atol=0.005001
    )
    factors = {candidate.attention_factor for request in requests for candidate in request.candidates}
    assert len(factors) > 10 and min(factors) >= 1 and max(factors) <= space.attention_bounds[1]
    requests, _ = drive(generations=3, population=3, parents=1, mutations=2, crossovers=2)
    assert [len(request.candidates) for request in requests] == [3, 4, 4, 4]


def test_evolution_chooses_near_windows():
    def window_hill(candidate):
        return hill(replace(candidate, start_tokens=16)) + abs(math.log2((candidate.near_tokens + 1) / 2049)) / 10

    space = replace(WINDOWS, fixed_pairs=1)
    near_forms = tuple(space.closed_form("near", window) for window in space.windows)
    requests, lowest = drive(window_hill, space=space, extra=near_forms, generations=6)
    first = requests[0].candidates
    assert [candidate.near_tokens for candidate in first[:6]] == [0, 0, 0, 512, 2048, 4096]
    assert {candidate.near_tokens for candidate in first[6:]} == {0, 512, 2048, 4096}
    for request in requests:
        for candidate in request.candidates:
            np.testing.assert_allclose(space.project(candidate).log_factors, candidate.log_factors, atol=1e-9)
            free = np.array(space.band(candidate).rescale_factors[1:])
            np.testing.assert_allclose(free, free.round(2), atol=1e-8)
    assert lowest[-1] < window_hill(near_forms[1])
    assert min(requests[-1].rivals, key=window_hill).near_tokens == 2048
    only, _ = drive(window_hill, space=replace(space, near_tokens=(512,)), extra=near_forms[:1], generations=1)
    assert {candidate.near_tokens for request in only for candidate in request.candidates} == {512}


def test_evolution_chooses_pairs_that_stand_still():
    def still_hill(candidate):
        return hill(replace(candidate, start_tokens=16)) + abs(candidate.still_pairs - 18) / 100

    space = replace(WINDOWS, fixed_pairs=1, near_tokens=(2048,))
    requests, _ = drive(still_hill, space=space, extra=(space.closed_form("near", 2048),), generations=8)
    asked = [candidate for request in requests for candidate in request.candidates]
    assert {candidate.still_pairs for candidate in asked} == set(space.still_choices(2048))
    assert len({band_key(space.band(candidate)) for candidate in asked}) == len(asked)  # none twice
    for candidate in asked:
        np.testing.assert_allclose(space.project(candidate).log_factors, candidate.log_factors, atol=1e-9)
    assert min(requests[-1].rivals, key=still_hill).still_pairs == 18
    first = [candidate.log_factors[18] for candidate in asked if candidate.still_pairs == 18]
    assert min(first) < space.closed_form("near", 2048).log_factors[18] - 0.1  # nothing still holds it up


def test_evolution_ends_if_there_is_no_new_candidate():
    facts = RopeFacts(n_rot=2, freq_base=10000.0, original_context=64)
    space = Space(facts, native_band(facts), 65, fixed_pairs=0, headroom=1, start_tokens=(0,))
    requests, _ = drive(lambda candidate: candidate.log_factors[0], space=space, generations=2, tries=5)
    assert {
        round(math.exp(candidate.log_factors[0]), 2) for request in requests for candidate in request.candidates
    } <= {1.0, 1.01}


# --- race


def run_race(losses, places=1, rivals=None, weights=None, order=None, racing=None):
    """Race the rows of a table; return the result and what was read: (candidates, passages) each time."""
    losses, read = np.array(losses, dtype=float), []
    n = losses.shape[1]

    def measure(candidates, passages):
        read.append((candidates.tolist(), passages.tolist()))
        return losses[np.ix_(candidates, passages)]

    rivals = np.empty((0, n)) if rivals is None else np.array(rivals, dtype=float)
    weights = np.ones(n) if weights is None else np.array(weights, dtype=float)
    order = np.arange(n) if order is None else np.array(order)
    return race(measure, len(losses), rivals, weights, order, places, racing or Racing()), read


def table(candidates, passages, noise=0.002, seed=0):
    """Losses that differ much between passages, and by 0.02 between candidates; the first is the best."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(3, 0.5, passages)
        + 0.02 * np.arange(candidates)[:, None]
        + rng.normal(0, noise, (candidates, passages))
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_race_drops_the_bad_and_keeps_the_winner(seed):
    losses = table(12, 16, seed=seed)
    result, read = run_race(losses)
    whole = ~np.isnan(result).any(axis=1)
    assert whole[0] and np.array_equal(result[0], losses[0])
    assert np.isnan(result[-1]).sum() >= 14 and whole.sum() <= 3
    assert sum(len(candidates) * len(passages) for candidates, passages in read) < losses.size / 3
    seen = ~np.isnan(result)
    assert np.array_equal(result[seen], losses[seen])


def test_rungs_double_and_follow_the_order():
    order = np.random.default_rng(0).permutation(13)
    _, read = run_race(table(3, 13, noise=0.1), places=3, order=order)
    assert [passages for _, passages in read] == [
        order[a:b].tolist() for a, b in [(0, 1), (1, 2), (2, 4), (4, 8), (8, 13)]
    ]
    assert all(candidates == [0, 1, 2] for candidates, _ in read)


def test_no_candidate_is_dropped_while_places_are_free_or_when_racing_is_off():
    losses = table(6, 8) + 10.0 * np.arange(6)[:, None]
    assert not np.isnan(run_race(losses, places=6)[0]).any()
    result, read = run_race(losses, racing=Racing(on=False))
    assert np.array_equal(result, losses) and len(read) == 1
    assert np.isnan(run_race(losses, places=2)[0]).any()


def test_rivals_hold_places():
    losses = table(4, 8)
    result, _ = run_race(losses, rivals=losses[:1] - 1.0)
    assert np.isnan(result).any(axis=1).all()  # all are behind an earlier candidate
    result, _ = run_race(losses, rivals=losses[:1] + 1.0)
    assert not np.isnan(result[0]).any()


def test_without_places_candidates_compete_with_the_rivals_only():
    losses, incumbent = table(4, 8), table(1, 8, seed=0) + 0.03  # two are better, one is not, one is far behind
    result, _ = run_race(losses, places=0, rivals=incumbent)
    assert not np.isnan(result[:2]).any() and np.isnan(result[3]).any()
    for alone in range(4):
        result_alone, _ = run_race(losses[alone : alone + 1], rivals=incumbent)
        assert np.isnan(result_alone).any() == np.isnan(result[alone]).any()
    assert not np.isnan(run_race(losses, places=0)[0]).any()  # no rival to be behind


def test_passages_without_weight_do_not_decide():
    losses = table(4, 8)
    misleading = losses.copy()
    misleading[0, 0] += 100
    weights = [0, *[1] * 7]
    order = [1, 0, *range(2, 8)]
    result, _ = run_race(misleading, weights=weights, order=order)
    assert not np.isnan(result[0]).any()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("passage", [0, 1, 5])
def test_losses_that_are_not_numbers_drop_only_their_candidate(bad, passage):
    losses = table(6, 8, noise=0.0001)
    losses[2, passage] = bad
    result, _ = run_race(losses, places=5)
    assert not np.isnan(result[[0, 1, 3, 4]]).any()  # those that hold a place
    assert np.isnan(result[2, 6:]).all() or passage == 5
    result, read = run_race(np.full((3, 4), bad))
    assert result.shape == (3, 4) and not np.isfinite(result).any() and read


# --- journal


def tasks(n):
    return [Task(SPACE.band(SPACE.seed("yarn")), passage, gradient=passage % 2 == 1) for passage in range(n)]


RESULTS = [
    Result(0.1 + 0.2, 1e-9),
    Result(math.pi, 5e-324, (1 / 3, -0.0, 1e308), -2 / 3),
    Result(math.inf, 0.0),
    Result(-math.inf, 1.7976931348623157e308, (math.nan,), 0.0),
]


def write(path, n=4, digest="a"):
    with Journal(path, digest) as journal:
        for task, result in zip(tasks(n), RESULTS, strict=False):
            journal.add(task, result)


def results(path, digest="a"):
    with Journal(path, digest) as journal:
        return {key.passage: line.result for key, line in journal.lines.items()}


def test_a_journal_keeps_numbers_exactly(tmp_path):
    path = tmp_path / "journal"
    write(path)
    kept = results(path)
    assert list(kept) == [0, 1, 2, 3] and repr(list(kept.values())) == repr(RESULTS)
    with Journal(path, "a") as journal:
        assert journal.found == 4
        size = path.stat().st_size
        journal.add(tasks(1)[0], Result(99, 99))  # already known
        assert path.stat().st_size == size and journal.lines[key_of_task(tasks(1)[0])].result == RESULTS[0]
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())


def test_a_journal_and_its_clock_resume_where_they_were(tmp_path):
    path = tmp_path / "journal"
    write(path, 2)
    data = path.read_bytes()
    with Journal(path, "a") as journal:
        first = [line.at for line in journal.lines.values()]
        for task, result in zip(tasks(4)[2:], RESULTS[2:], strict=True):
            journal.add(task, result)
        times = [line.at for line in journal.lines.values()]
    assert path.read_bytes().startswith(data)
    assert first == times[:2] and times == sorted(times) and times[3] < times[1] + 60
    with Journal(None, "a") as journal:
        journal.add(tasks(1)[0], RESULTS[0])
        assert len(journal.lines) == 1 and journal.found == 0


def test_a_journal_torn_at_any_byte_is_repaired(tmp_path):
    path = tmp_path / "journal"
    write(path)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data)):
        for tail in (b"", b"\0" * 5):
            path.write_bytes(data[:cut] + tail)
            whole = sum(end <= cut for end in ends[1:])
            with Journal(path, "a") as journal:
                assert whole <= journal.found <= whole + (cut + 1 in ends), (cut, tail)
                if cut % 16 == 0 or cut + 1 in ends:  # resuming is slow: it writes to disk
                    for task, result in zip(tasks(4), RESULTS, strict=True):
                        journal.add(task, result)
            if cut % 16 == 0 or cut + 1 in ends:
                assert repr(list(results(path).values())) == repr(RESULTS)
                assert len(path.read_bytes().splitlines()) == 5


def test_another_searchs_journal_is_refused(tmp_path):
    path = tmp_path / "journal"
    write(path)
    data = path.read_bytes()
    with pytest.raises(UserError, match="the journal of another search"):
        Journal(path, "b")
    assert path.read_bytes() == data
    path.write_bytes(data.replace(b'"ropewalk_search": 2', b'"ropewalk_search": 1', 1))
    with pytest.raises(UserError, match="journal version 1, expected 2"):
        Journal(path, "a")


def test_a_journal_without_evaluations_can_be_taken_over(tmp_path):
    path = tmp_path / "journal"
    write(path, 0, "of a search that was refused")
    write(path, 2, "b")
    assert len(results(path, "b")) == 2
    with pytest.raises(UserError, match="the journal of another search"):
        Journal(path, "of a search that was refused")


@pytest.mark.parametrize(
    "content",
    [
        *(b"dear diary\n", b"dear diary", b"{}\n", b"[1, 2]\n", b'{"a": 1}\n', b"\x89PNG\r\n\x1a\n\0\0", b"\n", b"3\n"),
        *(b"[" * 5_000, b"[" * 5_000 + b"\n", b"9" * 5_000, b"NaN\n", b"\0" * 100_000),
    ],
)
def test_a_foreign_file_is_refused_and_left_unchanged(tmp_path, content):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: is not a journal of ropewalk search"):
        Journal(path, "a")
    assert path.read_bytes() == content


def evaluation(**changed):
    values = {"band": "b", "document": 1, "fidelity": "full", "gradient": False, "loss": 1.0, "seconds": 1.0, "at": 1.0}
    return json.dumps(values | changed).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        *(b"what\n", b"{}\n", b'{"band": "x"}\n', b"\n", b"what", b"[" * 5_000 + b"\n", b"9" * 5_000 + b"\n"),
        *(evaluation(document=value) for value in (math.nan, math.inf, None, [])),
        *(evaluation(fidelity=value) for value in ([], {}, "half", None)),
        *(evaluation(loss=value) for value in (10**400, "x", [], None)),
        *(evaluation(at=value) for value in (math.nan, math.inf, 10**400)),
        *(evaluation(seconds=value) for value in (math.nan, math.inf, 10**400)),
        *(evaluation(by_log_factors=value) for value in (3, [[]], [10**400])),
    ],
)
def test_a_line_that_is_not_an_evaluation_is_named_and_left(tmp_path, line):
    path = tmp_path / "journal"
    write(path, 2)
    data = path.read_bytes() + line
    path.write_bytes(data)
    with pytest.raises(UserError, match="line 4 is not an evaluation"):
        Journal(path, "a")
    assert path.read_bytes() == data
    with pytest.raises(UserError, match="line 4"):  # and the lock is released
        Journal(path, "a")


def test_a_torn_evaluation_stays_until_there_is_another(tmp_path):
    path = tmp_path / "journal"
    write(path, 2)
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    assert len(results(path)) == 1 and path.read_bytes() == data[:-9]


def test_a_journal_that_is_removed_during_a_search(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, "a") as journal:
        path.unlink()
        with pytest.raises(UserError, match="was moved, removed or replaced during the run"):
            journal.add(tasks(1)[0], RESULTS[0])


HOLD = """
    import sys
    from pathlib import Path
    from ropewalk.factors.search import Journal

    with Journal(Path(sys.argv[1]), "a"):
        print("held", flush=True)
        sys.stdin.read()
"""


def test_a_journal_has_one_writer_at_a_time(tmp_path):
    path = tmp_path / "journal"
    code = "\n".join(line[4:] for line in HOLD.splitlines())
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is writing it"):
        Journal(path, "a")
    holder.kill()
    holder.communicate()
    write(path)
    assert len(results(path)) == 4


def test_digests_differ_with_any_value():
    values = {"a": 1, "b": {"c": 0.1, "d": None}}
    assert digest_of(values) == digest_of({"b": {"d": None, "c": 0.1}, "a": 1})
    assert len({digest_of(v) for v in (values, {**values, "a": 2}, {"a": 1}, {**values, "b": {"c": 0.1, "d": 0}})}) == 4
