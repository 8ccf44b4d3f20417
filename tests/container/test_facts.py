"""What a file says about its RoPE: checked against stock llama.cpp where possible, else against the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from ropewalk.container import (
    GGUFError,
    freq_scale,
    native_schedule,
    read_header,
    rope_facts,
    schedule_of,
    takes_native_factors,
    what_stock_does,
)
from ropewalk.convert import embed_schedule
from ropewalk.errors import UserError
from ropewalk.factors import Schedule, extend, yarn

TinyLlama = Callable[..., Path]
Writer = gguf.GGUFWriter
HALF = 16  # pairs of the tiny model's rotary dimensions
LLAMA_3 = [1.0] * 6 + [1.5, 2.0, 3.0, 5.0] + [8.0] * 6
RISING = np.linspace(1, 6, HALF).tolist()
WAVE = (1.5 + np.sin(np.arange(HALF))).tolist()


def logits(path: Path, n_ctx: int) -> np.ndarray[Any, Any]:
    llm = llama_cpp.Llama(
        str(path),
        n_ctx=n_ctx,
        n_batch=512,
        logits_all=True,
        verbose=False,
        n_threads=1,
        yarn_beta_fast=-1.0,  # the file's: by default llama-cpp-python passes 32 and 1 instead
        yarn_beta_slow=-1.0,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    llm.eval([1, *(3 + (i * 37) % 280 for i in range(200))])
    return np.array(llm.scores[: llm.n_tokens])


def yarn_of(factor: float, original: int, **more: float) -> dict[str, Any]:
    return {"type": "yarn", "factor": factor, "original_context_length": original, **more}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "another base": {"freq_base": 500_000.0},
    "no base": {"freq_base": None},
    "linear": {"scaling": {"type": "linear", "factor": 4.0}},
    "linear by default": {"scaling": {"factor": 2.5}},
    "old key": {"extend": lambda writer: writer.add_float32("llama.rope.scale_linear", 3.0)},
    "none": {"scaling": {"type": "none", "factor": 4.0}},
    "factor zero": {"scaling": {"type": "linear", "factor": 0.0}},
    "yarn": {"scaling": yarn_of(4.0, 128)},
    "yarn without its original context": {"scaling": {"type": "yarn", "factor": 4.0}},
    "yarn and an attention factor": {"scaling": yarn_of(8.0, 64, attn_factor=0.8)},
    "yarn whose betas llama does not read": {"scaling": yarn_of(4.0, 128, yarn_beta_fast=4.0)},
    "yarn with betas": {"arch": "mistral3", "scaling": yarn_of(4.0, 128, yarn_beta_fast=4.0, yarn_beta_slow=0.5)},
    "yarn with a log multiplier": {"arch": "mistral3", "scaling": yarn_of(8.0, 64, yarn_log_multiplier=0.7)},
    "attention factor alone": {"scaling": {"attn_factor": 1.3}},
    "llama 3": {"rope_freqs": LLAMA_3},
    "llama 3, linear too": {"rope_freqs": LLAMA_3, "scaling": {"type": "linear", "factor": 2.0}},
    "llama 3 and yarn": {"rope_freqs": LLAMA_3, "scaling": yarn_of(4.0, 128)},
}


@pytest.mark.parametrize("case", CASES)
def test_one_band_files_run_as_stock_llama_cpp_runs_them(case: str, tmp_path: Path, tiny_llama: TinyLlama) -> None:
    """The native schedule, embedded as explicit factors, gives the logits of the unmodified file."""
    path = tiny_llama(tmp_path / "own.gguf", context_length=512, **CASES[case])
    native = native_schedule(read_header(path))
    assert [band.context for band in native.bands] == [512]
    embed_schedule(path, tmp_path / "explicit.gguf", native)
    own = logits(path, 512)
    assert np.abs(logits(tmp_path / "explicit.gguf", 512) - own).max() < 2e-3
    if native.facts.native_factors or native.facts.native_attention_factor != 1:
        kept = {k: v for k, v in CASES[case].items() if k in ("arch", "freq_base")}
        plain = tiny_llama(tmp_path / "plain.gguf", context_length=512, **kept)
        assert np.abs(logits(plain, 512) - own).max() > 0.05  # otherwise the comparison above would prove nothing


@pytest.mark.parametrize("scaling", [{}, {"attn_factor": 1.2}, {"factor": 2.0}], ids=str)
def test_longrope_files_have_two_bands(scaling: dict[str, float], tmp_path: Path, tiny_llama: TinyLlama) -> None:
    path = tiny_llama(
        tmp_path / "own.gguf",
        context_length=1024,
        long_factors=RISING,
        short_factors=WAVE,
        scaling={"type": "longrope", "original_context_length": 512, **scaling},
    )
    native = native_schedule(read_header(path))
    assert [band.context for band in native.bands] == [512, 1024]
    assert native.facts.original_context == 512
    factor = scaling.get("factor", 1.0)  # llama.cpp divides by it on top of the factors
    np.testing.assert_allclose(native.bands[0].rescale_factors, np.float32(WAVE) * np.float64(factor))
    np.testing.assert_allclose(native.bands[1].rescale_factors, np.float32(RISING) * np.float64(factor))
    embed_schedule(path, tmp_path / "explicit.gguf", native)
    for n_ctx in (512, 1024):
        assert np.abs(logits(tmp_path / "explicit.gguf", n_ctx) - logits(path, n_ctx)).max() < 2e-3
    assert np.abs(logits(path, 512) - logits(path, 1024)).max() > 0.05


def test_old_phi3_files_have_factors_and_no_scaling_type(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    scaling = {"original_context_length": 128, "attn_factor": 1.19}
    path = tiny_llama(tmp_path / "m", arch="phi3", long_factors=RISING, short_factors=WAVE, scaling=scaling)
    native = native_schedule(read_header(path))
    assert [band.context for band in native.bands] == [128, 256]
    assert {band.attention_factor for band in native.bands} == {float(np.float32(1.19))}


def test_longrope_that_never_leaves_its_short_factors_is_one_band(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    path = tiny_llama(tmp_path / "m", long_factors=RISING, short_factors=WAVE, scaling={"type": "longrope"})
    native = native_schedule(read_header(path))
    assert [band.context for band in native.bands] == [256]
    np.testing.assert_allclose(native.facts.native_factors, np.float32(WAVE))


def test_a_model_as_trained_has_no_factors(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    facts = rope_facts(read_header(tiny_llama(tmp_path / "m", rope_freqs=[1.0] * HALF)))
    assert (facts.n_rot, facts.freq_base, facts.original_context) == (32, 10000.0, 256)
    assert (facts.native_factors, facts.native_attention_factor) == ((), 1.0)


def test_rotary_dimensions_are_found_without_their_key(tmp_path: Path) -> None:
    def write(name: str, **keys: Any) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "qwen2")
        writer.add_context_length(512)
        for key, value in keys.items():
            add = writer.add_array if isinstance(value, list) else writer.add_uint32
            add(f"qwen2.{key.replace('__', '.')}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / name

    by_heads = {"embedding_length": 96, "attention__head_count": 4}
    assert rope_facts(read_header(write("a", **by_heads))).n_rot == 24
    assert rope_facts(read_header(write("b", attention__key_length=48, **by_heads))).n_rot == 48
    assert rope_facts(read_header(write("c", rope__dimension_count=16, attention__key_length=48))).n_rot == 16
    assert rope_facts(read_header(write("d", embedding_length=96, attention__head_count=[0, 4, 2]))).n_rot == 24
    for name, keys, message in (
        ("e", {}, "head_count: missing"),
        ("f", {"rope__dimension_count": 33}, "33 rotary dimensions, expected an even number"),
        ("g", {"attention__head_count": 0, "embedding_length": 96}, "head_count: 0"),
        ("h", {"attention__head_count": 4}, "embedding_length: missing"),
    ):
        with pytest.raises(GGUFError, match=message):
            rope_facts(read_header(write(name, **keys)))


@pytest.mark.parametrize(("context_length", "arch"), [(128, "llama"), (160, "qwen2"), (512, "qwen2")])
def test_a_context_left_unscaled_is_the_original_one(
    context_length: int, arch: str, tmp_path: Path, tiny_llama: TinyLlama
) -> None:
    """Qwen's recipe for YaRN leaves `context_length` as it was."""
    path = tiny_llama(tmp_path / "m.gguf", arch=arch, context_length=context_length, scaling=yarn_of(4.0, 128))
    native = native_schedule(read_header(path))
    assert [band.context for band in native.bands] == [512]
    np.testing.assert_allclose(native.bands[0].rescale_factors, yarn(32, 4.0, 10000.0, 128))
    assert native.facts.native_attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_deepseek_has_yarns_scale_in_its_attention(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    scaling = yarn_of(40.0, 64, yarn_log_multiplier=0.0707)
    deepseek2, mistral4 = (
        rope_facts(read_header(tiny_llama(tmp_path / arch, arch=arch, scaling=scaling)))
        for arch in ("deepseek2", "mistral4")
    )
    assert deepseek2.native_attention_factor == 1
    expected = (0.1 * math.log(40) + 1) / (0.0707 * math.log(40) + 1)
    assert mistral4.native_attention_factor == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(deepseek2.native_factors, yarn(32, 40, 10000, 64))


def test_grok_reads_its_own_extrapolation(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    half_way = yarn_of(8.0, 64, yarn_ext_factor=0.5)
    facts = rope_facts(read_header(tiny_llama(tmp_path / "a", arch="grok", scaling=half_way)))
    whole = yarn(32, 8.0, 10000, 64, beta_fast=8.0)
    np.testing.assert_allclose(1 / np.array(facts.native_factors), 0.5 / 8 + 0.5 / whole)
    off = {"type": "yarn", "factor": 8.0, "yarn_ext_factor": 0.0, "yarn_attn_factor": 1.5}
    facts = rope_facts(read_header(tiny_llama(tmp_path / "b", arch="grok", scaling=off)))
    assert (set(facts.native_factors), facts.native_attention_factor) == ({8.0}, 1.5)


def test_hunyuan_derives_its_base(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    header = read_header(tiny_llama(tmp_path / "m", arch="hunyuan-dense", scaling={"alpha": 1000.0}))
    assert rope_facts(header).freq_base == pytest.approx(10000 * 1000 ** (32 / 30), rel=1e-5)


def test_step35_uses_the_first_of_the_stored_factors(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    header = read_header(tiny_llama(tmp_path / "m", arch="step35", rope_freqs=[2.0] * 24))
    assert rope_facts(header).native_factors == (2.0,) * HALF


@pytest.mark.parametrize("arch", ["mamba", "bert", "gpt2", "t5", "rwkv7", "starcoder"])
def test_an_architecture_without_rope_is_refused(arch: str, tmp_path: Path, tiny_llama: TinyLlama) -> None:
    path = tiny_llama(tmp_path / "m", arch=arch)
    with pytest.raises(UserError, match=f"architecture '{arch}' has no RoPE"):
        schedule_of(read_header(path))


def test_a_granite_with_its_rope_switched_off_is_refused(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    path = tiny_llama(tmp_path / "m", arch="granite", scaling={"finetuned": False})
    with pytest.raises(UserError, match="has no RoPE"):
        rope_facts(read_header(path))
    rope_facts(read_header(tiny_llama(tmp_path / "n", arch="granite", scaling={"finetuned": True})))
    rope_facts(read_header(tiny_llama(tmp_path / "o", arch="llama", scaling={"finetuned": False})))


NAN, HUGE = float("nan"), 3e38
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "base": ({"freq_base": -1.0}, "llama.rope.freq_base: -1, expected"),
    "base one": ({"freq_base": 1.0}, "llama.rope.freq_base: 1, expected"),
    "base not a number": ({"freq_base": NAN}, "llama.rope.freq_base: nan, expected"),
    "no context": ({"context_length": 0}, "llama.context_length: 0, expected"),
    "long context": ({"context_length": 2**32 - 1}, "llama.context_length: 4294967295, expected"),
    "scaling type": ({"scaling": {"type": "magic"}}, "rope.scaling.type: 'magic', expected one of none"),
    "scaling type number": ({"scaling": {"type": 3}}, "rope.scaling.type: 3, expected one of none"),
    "factor": ({"scaling": {"factor": -2.0}}, "rope.scaling.factor: -2, expected"),
    "factor text": ({"scaling": {"factor": "four"}}, "rope.scaling.factor: 'four', expected a number"),
    "factor not a number": ({"scaling": {"factor": NAN}}, "rope.scaling.factor: nan, expected"),
    "factor infinite": ({"scaling": {"factor": float("inf")}}, "rope.scaling.factor: inf, expected"),
    "factor tiny": ({"scaling": {"factor": 1e-40}}, "rope.scaling.factor: 9.99995e-41, expected"),
    "yarn that shrinks": ({"scaling": yarn_of(0.5, 64)}, "rope.scaling.factor: 0.5, expected at least 1"),
    "yarn that stretches too far": ({"scaling": yarn_of(1e8, 64)}, "rope.scaling.factor: 1e.08 times the original"),
    "attention factor": ({"scaling": {"attn_factor": 0.0}}, "rope.scaling.attn_factor: 0, expected"),
    "attention factor 1e30": ({"scaling": {"attn_factor": 1e30}}, "rope.scaling.attn_factor: 1e.30, expected"),
    "linear factor": ({"scaling": {"type": "linear", "factor": 1e-7}}, "rope.scaling.factor: 1e-07, expected"),
    "betas": ({"arch": "mistral3", "scaling": yarn_of(4.0, 64, yarn_beta_slow=0.0)}, "yarn_beta_slow: 0, expected"),
    "betas huge": (
        {"arch": "mistral3", "scaling": yarn_of(4.0, 64, yarn_beta_fast=1e30)},
        "yarn_beta_fast: 1e.30, exp",
    ),
    "original": ({"scaling": yarn_of(4.0, 2**32 - 1)}, "original_context_length: 4294967295, expected"),
    "freqs not a number": ({"rope_freqs": [1.0] * 15 + [NAN]}, "'rope_freqs.weight': element 15 is nan"),
    "freqs huge": ({"rope_freqs": [1.0] * 15 + [HUGE]}, "'rope_freqs.weight': element 15 is 3e"),
    "freqs zero": ({"rope_freqs": [0.0] * 16}, "'rope_freqs.weight': element 0 is 0"),
    "freqs negative": ({"rope_freqs": [-1.0] * 16}, "'rope_freqs.weight': element 0 is -1"),
    "freqs too many": ({"rope_freqs": [1.0] * 17}, r"F32 of shape \[17\], expected F32 of \[16\]"),
    "long too few": (
        {"long_factors": [1.0], "short_factors": RISING},
        r"'rope_factors_long.weight': F32 of shape \[1\]",
    ),
    "short zero": ({"long_factors": RISING, "short_factors": [0.0] * 16}, "'rope_factors_short.weight': element 0"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_values_are_refused_by_name(case: str, tmp_path: Path, tiny_llama: TinyLlama) -> None:
    options, message = HOSTILE[case]
    path = tiny_llama(tmp_path / "m.gguf", **options)
    with pytest.raises(GGUFError, match=message) as caught:
        schedule_of(read_header(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_factors_may_be_half_floats_but_not_quantised(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    def extend(writer: Writer) -> None:
        writer.add_tensor("rope_freqs.weight", np.array(LLAMA_3, dtype=np.float16))

    assert rope_facts(read_header(tiny_llama(tmp_path / "a", extend=extend))).native_factors == tuple(LLAMA_3)

    def extend_with_bytes(writer: Writer) -> None:
        raw = np.zeros(34, dtype=np.uint8)
        writer.add_tensor("rope_freqs.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    with pytest.raises(GGUFError, match=r"Q8_0 of shape \[32\]"):
        rope_facts(read_header(tiny_llama(tmp_path / "b", extend=extend_with_bytes)))


def test_the_file_must_name_its_architecture(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    with pytest.raises(GGUFError, match=r"general.architecture: None, expected"):
        rope_facts(read_header(tiny_llama(tmp_path / "m", arch="")))


def test_frequency_scale_is_llama_cpps(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    linear = tiny_llama(tmp_path / "a", scaling={"factor": 4.0})
    assert freq_scale(read_header(linear)) == 0.25
    assert freq_scale(read_header(tiny_llama(tmp_path / "b", scaling={"type": "none", "factor": 4.0}))) == 1


def test_temperature_by_original_context_rules_native_factors_out(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    def extend(writer: Writer) -> None:
        writer.add_float32("mistral3.attention.temperature_scale", 0.1)

    assert takes_native_factors(read_header(tiny_llama(tmp_path / "a", arch="mistral3")))
    assert not takes_native_factors(read_header(tiny_llama(tmp_path / "b", arch="mistral3", extend=extend)))
    assert not takes_native_factors(read_header(tiny_llama(tmp_path / "c", arch="qwen2")))


def test_what_stock_does_is_described(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    source = tiny_llama(tmp_path / "plain.gguf")
    assert what_stock_does(read_header(source)) == ["runs it as it is, up to 256 tokens."]
    schedule = extend(native_schedule(read_header(source)), 2048)

    def described(schedule: Schedule, source: Path = source) -> str:
        embed_schedule(source, tmp_path / "long.gguf", schedule, force=True)
        return " ".join(what_stock_does(read_header(tmp_path / "long.gguf")))

    three = described(schedule)
    for part in ("at most 256 tokens", "longer one the last (up to 2,048)", "The 2 between are not used", "attention"):
        assert part in three
    assert described(schedule.only(3)) == "runs it with its only band, up to 2,048 tokens."
    late = schedule.bands[3].model_copy(update={"start_tokens": 4})
    assert "Start tokens (4)" in described(schedule.model_copy(update={"bands": (schedule.bands[0], late)}))
    other = tiny_llama(tmp_path / "qwen2.gguf", arch="qwen2")
    assert "cannot take rescale factors for this 'qwen2' model" in described(schedule, other)
