"""Each closed form against an independent implementation: transformers' `ROPE_INIT_FUNCTIONS`."""

import math

import numpy as np
import pytest
from ropewalk.factors import (
    Band,
    RopeFacts,
    Schedule,
    ScheduleError,
    doubling_contexts,
    dynamic_ntk,
    extend,
    longrope_attention_factor,
    native_band,
    near,
    ntk,
    pi,
    plain_band,
    yarn,
    yarn_attention_factor,
)
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

MODELS = [(64, 1e4, 4096), (128, 5e5, 8192), (96, 1e6, 32768), (32, 1e4, 2048)]
SCALES = [1.5, 2.0, 4.0, 32.0]


def reference(kind, n_rot, base, original, scale, seq_len=None, **more):
    """(λ, attention factor) as transformers computes them."""
    config = PretrainedConfig(hidden_size=4 * n_rot, num_attention_heads=4, max_position_embeddings=original)
    config.rope_theta = base
    config.rope_parameters = config.rope_scaling = {
        "rope_type": kind,
        "rope_theta": base,
        "factor": scale,
        "original_max_position_embeddings": original,
        **more,
    }
    frequencies, attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)
    plain = base ** (-2 * np.arange(n_rot // 2) / n_rot)
    return plain / frequencies.double().numpy(), attention


@pytest.mark.parametrize("n_rot, base, original", MODELS)
@pytest.mark.parametrize("scale", SCALES)
def test_pi_and_yarn_and_ntk_agree_with_transformers(n_rot, base, original, scale):
    factors, _ = reference("linear", n_rot, base, original, scale)
    np.testing.assert_allclose(pi(n_rot, scale), factors, rtol=1e-5)

    factors, attention = reference("yarn", n_rot, base, original, scale, beta_fast=32.0, beta_slow=1.0)
    np.testing.assert_allclose(yarn(n_rot, scale, base, original), factors, rtol=1e-5)
    assert yarn_attention_factor(scale) == pytest.approx(attention)

    length = int(original * scale)
    factors, _ = reference("dynamic", n_rot, base, original, scale, seq_len=length)
    np.testing.assert_allclose(dynamic_ntk(n_rot, scale, length, original), factors, rtol=1e-4)
    # Dynamic NTK at scale 1 is NTK-aware at the ratio of the lengths.
    factors, _ = reference("dynamic", n_rot, base, original, 1.0, seq_len=length)
    np.testing.assert_allclose(ntk(n_rot, length / original), factors, rtol=1e-4)


@pytest.mark.parametrize("n_rot, base, original", MODELS)
def test_yarn_with_a_ramp_that_is_not_rounded_agrees_with_transformers(n_rot, base, original):
    factors, _ = reference("yarn", n_rot, base, original, 4.0, truncate=False)
    np.testing.assert_allclose(yarn(n_rot, 4.0, base, original, truncate=False), factors, rtol=1e-5)
    assert not np.allclose(yarn(n_rot, 4.0, base, original), factors, rtol=1e-3)


@pytest.mark.parametrize("scale, original", [(8.0, 4096), (32.0, 4096), (1.0, 4096)])
def test_longrope_attention_factor_agrees_with_transformers(scale, original):
    ones = [1.0] * 32
    _, attention = reference("longrope", 64, 1e4, original, scale, long_factor=ones, short_factor=ones)
    assert longrope_attention_factor(scale, original) == pytest.approx(attention)


def test_ends_of_ntk_and_yarn():
    factors = ntk(64, 4)
    assert factors[0] == 1 and factors[-1] == pytest.approx(4)
    factors = yarn(64, 4, 1e4, 4096)
    assert factors[0] == 1 and factors[-1] == pytest.approx(4)
    assert (np.diff(factors) >= 0).all()


def test_dynamic_ntk_leaves_short_text_alone():
    np.testing.assert_array_equal(dynamic_ntk(64, 4, 100, 4096), np.ones(32))


@pytest.mark.parametrize("scale", [0.5, 0, -1, math.nan, math.inf])
def test_an_invalid_scale_is_refused(scale):
    for method in (pi, ntk):
        with pytest.raises(ScheduleError, match="scale"):
            method(64, scale)


def facts(**more):
    return RopeFacts(n_rot=64, freq_base=1e4, original_context=4096, **more)


def test_extend_doubles_up_to_the_context():
    assert doubling_contexts(4096, 30000) == [8192, 16384, 30000]
    base = Schedule(facts=facts(), bands=(native_band(facts()),))
    schedule = extend(base, 16384, "yarn")
    assert [band.context for band in schedule.bands] == [4096, 8192, 16384]
    np.testing.assert_allclose(schedule.bands[2].rescale_factors, yarn(64, 4, 1e4, 4096))
    assert schedule.bands[2].attention_factor == yarn_attention_factor(4)
    assert schedule.bands[0] == base.bands[0]


def test_extend_multiplies_onto_the_models_own_factors():
    own = tuple(np.linspace(1, 8, 32).tolist())
    base = Schedule(facts=facts(native_factors=own), bands=(native_band(facts(native_factors=own)),))
    band = extend(base, 8192, "pi").bands[-1]
    np.testing.assert_allclose(band.rescale_factors, 2 * np.array(own))
    assert band.found.method == "pi" and band.found.onto == "native"


@pytest.mark.parametrize("context", [4096, 100, 0, -5])
def test_extend_refuses_a_context_the_model_already_has(context):
    base = Schedule(facts=facts(), bands=(native_band(facts()),))
    with pytest.raises(ScheduleError, match=f"context: {context}, expected more than the 4096"):
        extend(base, context)


def farthest(band, n_tokens):
    """How far the farthest of `n_tokens` seems to be in `band`, in tokens, to a model that was trained without λ."""
    return band.near_tokens + (n_tokens - band.near_tokens) / np.array(band.rescale_factors)


@pytest.mark.parametrize("window", [None, 1, 512, 2048, 4095])
@pytest.mark.parametrize("context", [5000, 8192, 30000])
def test_beyond_a_near_window_the_farthest_token_seems_to_be_where_the_model_was_trained_for(window, context):
    base = Schedule(facts=facts(), bands=(native_band(facts()),))
    schedule = extend(base, context, "near", near_tokens=window)
    assert schedule.context == context and schedule.bands[0] == base.bands[0]
    for band, yarns in zip(schedule.bands[1:], extend(base, context).bands[1:], strict=True):
        assert band.near_tokens == (window or 2048) and band.attention_factor == 1 and band.found.method == "near"
        np.testing.assert_allclose(farthest(band, band.context), 4096)
        assert band.plain == plain_band(facts(), band) == yarns


@pytest.mark.parametrize("window", [-1, 0, 4096, 5000])
def test_a_near_window_that_the_model_was_not_trained_for_is_refused(window):
    base = Schedule(facts=facts(), bands=(native_band(facts()),))
    with pytest.raises(ScheduleError, match=rf"near_tokens: {window}, expected 1 to 4095$"):
        extend(base, 8192, "near", near_tokens=window)
    with pytest.raises(ScheduleError, match=r"near_tokens: 8, expected it with the method near alone, found yarn"):
        extend(base, 8192, near_tokens=8)
    with pytest.raises(ScheduleError, match="near_tokens"):
        near(64, 2.0, 4096, 4096)


def test_a_near_window_on_top_of_the_models_own_factors():
    own = facts(native_factors=tuple(np.linspace(1, 8, 32).tolist()), native_attention_factor=1.2)
    base = Schedule(facts=own, bands=(native_band(own),))
    band = extend(base, 8192, "near", near_tokens=1024).bands[-1]
    np.testing.assert_allclose(band.rescale_factors, (8192 - 1024) / (4096 - 1024) * np.array(own.native_factors))
    assert band.attention_factor == 1.2 and band.found.onto == "native"
    assert band.plain == extend(base, 8192).bands[-1]
    long = Band(context=16384, rescale_factors=tuple(2 * np.array(own.native_factors)))
    with pytest.raises(ScheduleError, match=r"near: bands.2.near_tokens: 5000, expected at most the original context"):
        extend(Schedule(facts=own, bands=(*base.bands, long)), 32768, "near", near_tokens=5000)


def test_bands_on_top_of_those_with_a_near_window():
    base = Schedule(facts=facts(), bands=(native_band(facts()),))
    windowed = extend(base, 8192, "near")
    more = extend(windowed, 16384, "near").bands
    assert more[:2] == windowed.bands and more[2] == extend(base, 16384, "near").bands[-1]
    band = extend(windowed, 16384, "pi").bands[-1]
    assert band.near_tokens == 0 and band.plain is None and band.found.onto == "yarn"
    np.testing.assert_allclose(band.rescale_factors, 2 * np.array(windowed.bands[-1].plain.rescale_factors))


def test_the_plain_form_of_a_band_that_brings_none_is_yarns():
    base = Schedule(facts=facts(), bands=(native_band(facts()),))
    band = extend(base, 8192, "near").bands[-1].model_copy(update={"plain": None})
    assert plain_band(facts(), band) == extend(base, 8192).bands[-1]
    assert plain_band(facts(), native_band(facts())) == native_band(facts())
    short = band.model_copy(update={"context": 4096})
    assert plain_band(facts(), short).rescale_factors == (1.0,) * 32
