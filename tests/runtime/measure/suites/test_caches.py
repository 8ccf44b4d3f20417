"""Cache types against f16: the divergence of known distributions, and what the journal knows."""

import pydoc_data.topics

import numpy as np
import pytest
from ropewalk.container import read_header, trained_schedule
from ropewalk.runtime.measure import reader
from ropewalk.runtime.measure.suites.caches import cache_losses, divergence
from ropewalk.runtime.measure.suites.journal import Journal


def test_divergence_of_known_distributions():
    expected = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], dtype=np.float32)) + 3
    found = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], dtype=np.float32)) - 1
    by_hand = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert divergence(expected, found) == pytest.approx([by_hand, 0], abs=1e-6)
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 200, 50)).astype(np.float32)
    assert (divergence(ours, theirs) > 0).all() and divergence(ours, ours) == pytest.approx(np.zeros(200), abs=1e-9)


def test_coarser_caches_are_further_away_and_f16_is_the_same(smollm2, tmp_path):
    loaded = []

    def load(kv):
        loaded.append(kv)
        return reader(smollm2, 400, kv)

    band = trained_schedule(read_header(smollm2)).bands[0]
    llm = load("f16")
    tokens = llm.tokenize(pydoc_data.topics.topics["assert"].encode())[:400]
    logits = llm.token_logits(tokens, 200)
    losses = llm.token_losses(tokens, 200)
    llm.close()
    rows = np.arange(len(losses))
    peak = logits.max(axis=1, keepdims=True)
    by_hand = np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0] - logits[rows, tokens[200:]]
    assert losses == pytest.approx(by_hand, abs=1e-4)
    loaded.clear()
    with Journal(tmp_path / "j.jsonl") as journal:
        kinds = ("f16", "q8_0", "q4_0")
        found = cache_losses(load, tokens, band, kinds, journal, "m", lambda done, total: None)
        assert loaded == ["f16", *kinds]
        same, fine, coarse = found
        assert same.mean == pytest.approx(0, abs=1e-9) and same.same == 1
        assert 0 < fine.mean < fine.p99 < coarse.p99 and 4 * fine.mean < coarse.mean < 1 and coarse.same < 1
        assert cache_losses(load, tokens, band, kinds, journal, "m", lambda done, total: None) == found
        assert len(loaded) == 4
