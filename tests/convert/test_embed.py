"""A schedule embedded in a file: everything else is unchanged, and stock llama.cpp runs the result as planned."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from ropewalk.container import embedded_schedule, native_schedule, read_header, schedule_of
from ropewalk.convert import embed_schedule, plan_extension
from ropewalk.errors import UserError
from ropewalk.factors import Band, RopeFacts, Schedule

GENTLE = [1 + i / 10 for i in range(16)]
STEEP = [1 + i for i in range(16)]

MODELS = {
    "plain": {},
    "another base": {"freq_base": 500_000.0},
    "no base": {"freq_base": None},
    "rope_freqs": {"rope_freqs": STEEP},
    "linear": {"scaling": {"type": "linear", "factor": 2.0}},
    "linear, no type": {"scaling": {"factor": 2.0}},
    "yarn": {"scaling": {"type": "yarn", "factor": 4.0, "original_context_length": 64}},
    "yarn, attention": {
        "scaling": {"type": "yarn", "factor": 4.0, "original_context_length": 64, "attn_factor": 0.8},
    },
    "longrope": {
        "context_length": 512,
        "short_factors": GENTLE,
        "long_factors": STEEP,
        "scaling": {"type": "longrope", "original_context_length": 256, "attn_factor": 1.1},
    },
    "rope_freqs and linear": {"rope_freqs": STEEP, "scaling": {"type": "linear", "factor": 2.0}},
    "heads of 64": {"n_embd": 128},
}
FOLDED = ("factor", "scale_linear", "yarn")


def plan(path, context=2048, method="ntk", existing=None):
    return plan_extension(read_header(path), context, method, existing).schedule


def logits(model, n_ctx, n_tokens=100, kind=None, **options):
    import llama_cpp

    llm = (kind or llama_cpp.Llama)(
        str(model), n_ctx=n_ctx, n_batch=512, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1, **options
    )
    try:
        llm.eval([3 + (7 * i + i * i) % 250 for i in range(n_tokens)])
        return llm.scores[:n_tokens].copy()
    finally:
        llm.close()


def add_every_kind_of_value(writer):
    kinds = gguf.GGUFValueType
    numbers = {
        kinds.UINT8: 200, kinds.INT8: -3, kinds.UINT16: 60_000, kinds.INT16: -300, kinds.UINT32: 4_000_000_000,
        kinds.INT32: -70_000, kinds.UINT64: 2**63 + 1, kinds.INT64: -(2**40), kinds.FLOAT32: 0.1, kinds.FLOAT64: 0.1,
        kinds.BOOL: True,
    }  # fmt: skip
    for kind, value in numbers.items():
        writer.add_key_value(f"test.{kind.name}", value, kind)
        writer.add_key_value(f"test.array.{kind.name}", [value] * 3, kinds.ARRAY, kind)
    writer.add_string("test.text", "a λ, a\nnew line")
    writer.add_array("test.texts", ["", "λ", "long " * 1000])
    writer.add_tensor("test.odd", np.arange(7, dtype=np.int8))
    writer.add_tensor("test.half", np.arange(6, dtype=np.float16).reshape(2, 3))


@pytest.mark.parametrize("name", MODELS)
def test_all_else_is_copied_byte_for_byte(name, tiny_llama, gguf_contents, tmp_path):
    options = MODELS[name]
    source = tiny_llama(tmp_path / "in.gguf", **options, extend=add_every_kind_of_value)
    schedule = plan(source)
    embed_schedule(source, tmp_path / "out.gguf", schedule)
    (before, tensors_before), (after, tensors_after) = map(gguf_contents, (source, tmp_path / "out.gguf"))

    prefix = "llama.rope.scaling."
    changed = {"llama.context_length", *(prefix + key for key in ("type", "original_context_length", "attn_factor"))}
    dropped = {key for key in before if key.startswith("llama.rope") and any(word in key for word in FOLDED)} - changed
    assert {key: value for key, value in after.items() if key not in changed and not key.startswith("ropewalk.")} == {
        key: value for key, value in before.items() if key not in changed | dropped
    }
    kept = [key for key in before if key not in dropped]
    assert list(after)[: len(kept)] == kept, "the order of what stays is the same"

    ours = {"rope_factors_long.weight", "rope_factors_short.weight"}
    native = ours | {"rope_freqs.weight"}
    assert {name: data for name, data in tensors_after.items() if name not in ours} == {
        name: data for name, data in tensors_before.items() if name not in native
    }
    for name, band in (("long", schedule.bands[-1]), ("short", schedule.bands[0])):
        kind, shape, data = tensors_after[f"rope_factors_{name}.weight"]
        assert (kind, shape) == (gguf.GGMLQuantizationType.F32, (len(band.rescale_factors),))
        assert np.frombuffer(data, "<f4") == pytest.approx(band.rescale_factors, rel=1e-6)
    header = read_header(tmp_path / "out.gguf")
    assert header.get("llama.context_length") == 2048
    assert header.get(prefix + "type") == "longrope"
    assert header.get(prefix + "original_context_length") == schedule.bands[0].context
    assert header.get(prefix + "attn_factor") == pytest.approx(schedule.bands[-1].attention_factor)
    assert embedded_schedule(header) == schedule == schedule_of(header)


@pytest.mark.parametrize("name", MODELS)
def test_stock_llama_cpp_runs_it(name, tiny_llama, tmp_path):
    """Short: like the original, up to rounding. Long: like our runtime with the last band on the original."""
    import ropewalk

    source = tiny_llama(tmp_path / "in.gguf", **MODELS[name])
    schedule = plan(source)
    embed_schedule(source, tmp_path / "out.gguf", schedule)
    exact = {"type_k": 0, "type_v": 0}  # a cache of F32, as in F16 a difference in the last bit would grow
    short = logits(source, 128, **exact)
    assert np.abs(logits(tmp_path / "out.gguf", 128, **exact) - short).max() < 1e-3
    far = logits(tmp_path / "out.gguf", 2048, 400)
    assert np.isfinite(far).all()
    last = schedule.only(-1)
    assert np.abs(far - logits(source, 2048, 400, ropewalk.Llama, schedule=last, fast_prefill=False)).max() < 1e-3
    assert np.abs(far[:100] - short).max() > 1e-2, "a test that does not see the factors proves nothing"


@pytest.mark.parametrize(
    "options",
    [{}, {"scaling": {"type": "yarn", "factor": 4.0}}, {"scaling": {"type": "linear", "factor": 2.0}}],
    ids=["plain", "yarn", "linear"],
)
def test_an_architecture_that_takes_no_native_factors(options, tiny_llama, gguf_contents, tmp_path):
    source = tiny_llama(tmp_path / "in.gguf", arch="qwen2", **options)
    schedule = plan(source)
    embed_schedule(source, tmp_path / "out.gguf", schedule)
    (before, tensors_before), (after, tensors_after) = map(gguf_contents, (source, tmp_path / "out.gguf"))
    assert tensors_after == tensors_before
    ours = {key for key in after if key.startswith("ropewalk.")}
    added = {"qwen2.rope.scaling.original_context_length"} if "yarn" in str(options) else set()
    assert set(after) - ours == set(before) | added
    assert read_header(tmp_path / "out.gguf").get("qwen2.context_length") == 2048
    assert schedule_of(read_header(tmp_path / "out.gguf")) == schedule
    assert (logits(tmp_path / "out.gguf", 128) == logits(source, 128)).all(), "stock llama.cpp runs it as before"


def test_stock_llama_cpp_gets_the_plain_form_of_a_near_window(tiny_llama, gguf_contents, tmp_path):
    source = tiny_llama(tmp_path / "in.gguf")
    near, yarn = plan(source, 1024, "near"), plan(source, 1024, "yarn")
    for name, schedule in (("near", near), ("yarn", yarn)):
        embed_schedule(source, tmp_path / f"{name}.gguf", schedule)
    (keys, tensors), (yarns, yarns_tensors) = (gguf_contents(tmp_path / f"{name}.gguf") for name in ("near", "yarn"))
    assert tensors == yarns_tensors
    assert {key: value for key, value in keys.items() if not key.startswith("ropewalk.")} == {
        key: value for key, value in yarns.items() if not key.startswith("ropewalk.")
    }
    assert schedule_of(read_header(tmp_path / "near.gguf")) == near


def test_the_alignment_of_the_file_is_kept(tiny_llama, gguf_contents, tmp_path):
    source = tiny_llama(tmp_path / "in.gguf", extend=lambda writer: writer.add_custom_alignment(128))
    embed_schedule(source, tmp_path / "out.gguf", plan(source))
    header = read_header(tmp_path / "out.gguf")
    assert header.alignment == 128
    assert all((header.data_start + tensor.offset) % 128 == 0 for tensor in header.tensors)
    before, after = gguf_contents(source)[1], gguf_contents(tmp_path / "out.gguf")[1]
    assert {name: after[name] for name in before} == before


def test_embedding_again_replaces_what_was_embedded(tiny_llama, gguf_contents, tmp_path):
    source = tiny_llama(tmp_path / "in.gguf", rope_freqs=STEEP)
    first, second = plan(source, 4096, "yarn"), plan(source, 1024, "pi")
    embed_schedule(source, tmp_path / "first.gguf", first)
    embed_schedule(tmp_path / "first.gguf", tmp_path / "again.gguf", second)
    embed_schedule(source, tmp_path / "at once.gguf", second)
    again, once = gguf_contents(tmp_path / "again.gguf"), gguf_contents(tmp_path / "at once.gguf")
    assert again == once


def test_embedding_the_same_schedule_again_changes_nothing(tiny_llama, tmp_path):
    source = tiny_llama(tmp_path / "0.gguf")
    schedule = plan(source)
    for i in range(3):
        embed_schedule(tmp_path / f"{i}.gguf", tmp_path / f"{i + 1}.gguf", schedule)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_every_fact_of_a_schedule_survives(tiny_llama, tmp_path):
    source = tiny_llama(tmp_path / "in.gguf")
    facts = RopeFacts(n_rot=32, freq_base=10000.0, original_context=256, native_attention_factor=1.0)
    found = {
        "method": "search",
        "objective": "perplexity",
        "data_digest": "ab" * 32,
        "seed": -(2**60),
        "losses": (3.1, 0.1),
    }
    ramp = np.arange(16.0)
    bands = (
        Band(context=256, rescale_factors=(1.0,) * 16),
        Band(context=700, rescale_factors=tuple(0.1 + ramp / 3), start_tokens=16, attention_factor=1 / 3, found=found),
        Band(context=1400, rescale_factors=tuple(1e-5 + ramp**3), start_tokens=7, force_start_tokens=True),
    )
    schedule = Schedule(facts=facts, bands=bands)
    embed_schedule(source, tmp_path / "out.gguf", schedule)
    assert schedule_of(read_header(tmp_path / "out.gguf")) == schedule


def test_factors_that_do_not_fit_into_float32_are_refused(tiny_llama, tmp_path):
    source = tiny_llama(tmp_path / "in.gguf")
    band = Band(context=512, rescale_factors=(1.0,) * 15 + (1e300,))
    schedule = Schedule(facts=native_schedule(read_header(source)).facts, bands=(band,))
    with pytest.raises(UserError, match="float32"):
        embed_schedule(source, tmp_path / "out.gguf", schedule)
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_a_schedule_for_another_model_is_refused(tiny_llama, tmp_path):
    source, other = tiny_llama(tmp_path / "in.gguf"), tiny_llama(tmp_path / "other.gguf", n_embd=128)
    with pytest.raises(UserError, match="n_rot 64, the model has 32"):
        embed_schedule(source, tmp_path / "out.gguf", plan(other))
    other = tiny_llama(tmp_path / "base.gguf", freq_base=5e5)
    with pytest.raises(UserError, match="freq_base 500000, the model has 10000"):
        embed_schedule(source, tmp_path / "out.gguf", plan(other))


def test_a_part_of_a_model_is_refused(tiny_llama, tmp_path):
    whole = tiny_llama(tmp_path / "whole.gguf")
    part = tiny_llama(tmp_path / "part.gguf", extend=lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(UserError, match="one of 3 parts"):
        embed_schedule(part, tmp_path / "out.gguf", plan(whole))


def test_stock_llama_cpp_gives_the_bundled_model_more_context(smollm2, tmp_path):
    import llama_cpp

    embed_schedule(smollm2, tmp_path / "long.gguf", plan(smollm2, 32_768, "yarn"))
    llm = llama_cpp.Llama(str(tmp_path / "long.gguf"), n_ctx=9000, verbose=False, n_threads=2)
    assert llm.metadata["llama.context_length"] == "32768"
    answer = llm("The capital of France is", max_tokens=3, temperature=0)["choices"][0]["text"]
    llm.close()
    assert "Paris" in answer


def test_a_broken_source_leaves_no_output(tiny_llama, tmp_path):
    source = tiny_llama(tmp_path / "in.gguf")
    schedule, whole = plan(source), source.read_bytes()
    rng = np.random.default_rng(0)
    start = read_header(source).data_start
    for cut in {0, 3, 4, 23, 24, start - 1, start, len(whole) - 1, *map(int, rng.integers(0, len(whole), 30))}:
        source.write_bytes(whole[:cut])
        with pytest.raises(UserError) as caught:
            embed_schedule(source, tmp_path / "out.gguf", schedule)
        assert str(source) in str(caught.value) and "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_an_attention_factor_that_the_file_cannot_hold(tiny_llama, tmp_path):
    def extend_with_huge(writer):
        writer.add_float64("llama.rope.scaling.attn_factor", 1e300)

    source = tiny_llama(tmp_path / "in.gguf", extend=extend_with_huge)
    with pytest.raises(UserError, match=r"attn_factor|attention_factor"):
        embed_schedule(source, tmp_path / "out.gguf", plan_extension(read_header(source), 512, "pi").schedule)
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]
