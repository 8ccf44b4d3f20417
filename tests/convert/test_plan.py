"""What happens to the factors that a model already has: they are never lost without a note."""

from __future__ import annotations

import pytest
from ropewalk.container import native_schedule, read_header
from ropewalk.convert import embed_schedule, plan_extension, plan_given
from ropewalk.errors import UserError
from ropewalk.factors import METHODS, Band, RopeFacts, Schedule, extend

LLAMA_3 = [1.0] * 8 + [2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 8.0, 8.0]
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}


@pytest.fixture
def llama_3(tiny_llama, tmp_path):
    return read_header(tiny_llama(tmp_path / "llama-3.gguf", rope_freqs=LLAMA_3))


@pytest.fixture
def extended(tiny_llama, tmp_path):
    """A tiny model of 256 tokens that was extended to 1,024 by YaRN."""
    source = tiny_llama(tmp_path / "tiny.gguf")
    embed_schedule(source, tmp_path / "extended.gguf", plan_extension(read_header(source), 1024, "yarn").schedule)
    return read_header(tmp_path / "extended.gguf")


def test_a_model_without_factors(tiny_llama, tmp_path):
    plan = plan_extension(read_header(tiny_llama(tmp_path / "tiny.gguf")), 1024, "pi")
    assert [(band.context, set(band.rescale_factors)) for band in plan.schedule.bands] == [
        (256, {1.0}),
        (512, {2.0}),
        (1024, {4.0}),
    ]
    assert plan.note == "the model carried no factors"


@pytest.mark.parametrize("existing", [None, "compose"])
def test_a_models_own_factors_are_composed_with(llama_3, existing):
    plan = plan_extension(llama_3, 1024, "pi", existing)
    assert plan.schedule.facts.native_factors == tuple(LLAMA_3)
    assert plan.schedule.bands[0].rescale_factors == tuple(LLAMA_3)
    assert plan.schedule.bands[-1].rescale_factors == tuple(4 * factor for factor in LLAMA_3)
    assert plan.schedule.bands[-1].found.onto == "native"
    assert "λ 1 to 8" in plan.note and "is kept" in plan.note


def test_factors_of_unknown_origin_cannot_be_replaced(llama_3):
    with pytest.raises(UserError, match=r"original_context_length.*expected compose"):
        plan_extension(llama_3, 1024, "yarn", "replace")


def test_factors_of_known_origin_are_replaced_from_there(tiny_llama, tmp_path):
    header = read_header(tiny_llama(tmp_path / "yarn.gguf", scaling=YARN))
    plan = plan_extension(header, 1024, "pi", "replace")
    assert [band.context for band in plan.schedule.bands] == [64, 128, 256, 512, 1024]
    assert plan.schedule.facts.native_factors == ()
    assert set(plan.schedule.bands[-1].rescale_factors) == {16.0}
    assert "is dropped" in plan.note


def test_an_embedded_schedule_is_replaced_by_default(extended):
    plan = plan_extension(extended, 2048, "pi")
    assert [band.context for band in plan.schedule.bands] == [256, 512, 1024, 2048]
    assert set(plan.schedule.bands[-1].rescale_factors) == {8.0}
    assert plan.schedule == plan_extension(extended, 2048, "pi", "replace").schedule
    assert "yarn, 1,024 tokens" in plan.note and "is dropped" in plan.note


def test_an_embedded_schedule_may_get_shorter(extended):
    assert plan_extension(extended, 512, "yarn").schedule.context == 512


def test_an_embedded_schedule_is_composed_with(extended):
    plan = plan_extension(extended, 2048, "pi", "compose")
    bands = plan.schedule.bands
    assert [band.found.method for band in bands] == ["native", "yarn", "yarn", "pi"]
    assert bands[-1].rescale_factors == pytest.approx([2 * factor for factor in bands[-2].rescale_factors])
    with pytest.raises(UserError, match="1024 tokens that the model already holds"):
        plan_extension(extended, 1024, "pi", "compose")


def test_trained_factors_outlive_an_embedded_schedule(llama_3, tmp_path):
    embed_schedule(llama_3.path, tmp_path / "1.gguf", plan_extension(llama_3, 1024, "yarn").schedule)
    header = read_header(tmp_path / "1.gguf")
    assert plan_extension(header, 1024, "pi").schedule == plan_extension(llama_3, 1024, "pi").schedule
    with pytest.raises(UserError, match="cannot be replaced"):
        plan_extension(header, 1024, "pi", "replace")


def test_a_long_band_that_was_trained_stays(tiny_llama, tmp_path):
    scaling = {"type": "longrope", "original_context_length": 256, "attn_factor": 1.1}
    source = tiny_llama(
        tmp_path / "phi.gguf", context_length=512, short_factors=[1.0] * 16, long_factors=LLAMA_3, scaling=scaling
    )
    first = plan_extension(read_header(source), 1024, "pi").schedule
    embed_schedule(source, tmp_path / "out.gguf", first)
    assert [band.context for band in first.bands] == [256, 512, 1024]
    assert plan_extension(read_header(tmp_path / "out.gguf"), 1024, "pi").schedule == first


@pytest.mark.parametrize("context", [256, 255, 1, 0, -5])
@pytest.mark.parametrize("method", METHODS)
def test_a_context_that_is_no_longer_is_refused(tiny_llama, tmp_path, context, method):
    header = read_header(tiny_llama(tmp_path / "tiny.gguf"))
    with pytest.raises(UserError, match=f"context: {context}, expected more than the 256"):
        plan_extension(header, context, method)


@pytest.mark.parametrize("context", [2**31 - 1, 2**31, 10**30])
def test_a_huge_context(tiny_llama, tmp_path, context):
    header = read_header(tiny_llama(tmp_path / "tiny.gguf"))
    if context < 2**31:
        assert plan_extension(header, context, "yarn").schedule.context == context
    else:
        with pytest.raises(UserError, match="expected at most 2147483647"):
            plan_extension(header, context, "yarn")


@pytest.mark.parametrize(("method", "existing"), [("magic", None), ("yarn", "maybe")])
def test_an_unknown_option_is_refused(tiny_llama, tmp_path, method, existing):
    with pytest.raises(UserError, match="expected"):
        plan_extension(read_header(tiny_llama(tmp_path / "tiny.gguf")), 512, method, existing)


def test_a_given_schedule_is_taken_whole_or_cut(tiny_llama, tmp_path):
    header = read_header(tiny_llama(tmp_path / "tiny.gguf"))
    given = extend(native_schedule(header), 2048, "yarn")
    assert plan_given(header, given, "s.json").schedule == given
    cut = plan_given(header, given, "s.json", 700).schedule
    assert [band.context for band in cut.bands] == [256, 512, 700]
    assert cut.bands[-1].rescale_factors == given.bands[2].rescale_factors
    for context, message in ((255, "at least the 256"), (2049, "s.json reaches 2048")):
        with pytest.raises(UserError, match=message):
            plan_given(header, given, "s.json", context)
    with pytest.raises(UserError, match="whose factors are complete"):
        plan_given(header, given, "s.json", None, "compose")


def test_a_near_window_is_planned_and_cut(tiny_llama, tmp_path):
    header = read_header(tiny_llama(tmp_path / "tiny.gguf"))
    given = plan_extension(header, 2048, "near", near_tokens=100).schedule
    assert [(band.near_tokens, band.rescale_factors[0]) for band in given.bands[1:3]] == [
        (100, 412 / 156),
        (100, 924 / 156),
    ]
    last = plan_given(header, given, "s.json", 700).schedule.bands[-1]
    assert last.context == last.plain.context == 700
    assert (last.rescale_factors, last.plain.rescale_factors) == (
        given.bands[2].rescale_factors,
        given.bands[2].plain.rescale_factors,
    )


def test_a_given_schedule_must_include_trained_factors(llama_3, tmp_path):
    facts = RopeFacts(n_rot=32, freq_base=10000.0, original_context=256)
    plain = Schedule(facts=facts, bands=(Band(context=512, rescale_factors=(2.0,) * 16),))
    with pytest.raises(UserError, match=r"s\.json: facts\.native_factors.*λ 1 to 8.*replace"):
        plan_given(llama_3, plain, "s.json")
    plan = plan_given(llama_3, plain, "s.json", existing="replace")
    assert plan.schedule == plain and "is replaced by s.json" in plan.note
    own = extend(native_schedule(llama_3), 512, "yarn")
    assert plan_given(llama_3, own, "s.json").note == "the model's own scaling (λ 1 to 8) is part of s.json"
