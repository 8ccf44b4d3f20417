"""The memory plan: against what llama.cpp really allocates, and its refusals."""

import re
import subprocess
import sys

import pytest
import ropewalk
from ropewalk import UserError
from ropewalk.container import read_header
from ropewalk.runtime import choose_kv, plan_memory
from ropewalk.runtime.graph.kernels import why_missing

ALLOCATED = """
import llama_cpp, sys
llama_cpp.Llama(sys.argv[1], n_ctx=int(sys.argv[2]), n_batch=512, type_k=int(sys.argv[3]), type_v=int(sys.argv[4]),
                flash_attn=sys.argv[5] == "True", n_threads=1, verbose=True)
"""


def allocated(path, n_ctx, type_k, type_v, flash_attn):
    """(cache, compute) in MiB, as reported in llama.cpp's log."""
    arguments = [sys.executable, "-c", ALLOCATED, str(path), *map(str, (n_ctx, type_k, type_v, flash_attn))]
    log = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr
    cache = re.search(r"llama_kv_cache: size = +([\d.]+) MiB", log)
    compute = re.findall(r"compute buffer size = +([\d.]+) MiB", log)
    return float(cache[1]), sum(map(float, compute))


@pytest.mark.parametrize(
    "n_ctx, kv, types",
    [(4096, "f16", (1, 1)), (16000, "q8_0:f16", (8, 1)), (16384, "q8_0", (8, 8)), (1024, "q4_0", (2, 2))],
)
def test_the_plan_matches_what_llama_cpp_allocates(smollm2, n_ctx, kv, types):
    plan = plan_memory(read_header(smollm2), n_ctx, kv)
    cache, compute = allocated(smollm2, n_ctx, *types, plan.flash_attn)
    assert plan.cache_bytes / 2**20 == pytest.approx(cache, abs=0.01)
    assert 1.0 <= plan.compute_bytes / 2**20 / compute < 1.5
    assert plan.flash_attn == (kv in ("q8_0", "q4_0"))


@pytest.mark.skipif(bool(why_missing()), reason="the kernels were not compiled")
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_the_plan_holds_what_the_kernels_allocate(smollm2, kv, monkeypatch):
    llm = ropewalk.Llama(smollm2, n_ctx=2048, kv=kv, flash_attn=True, n_threads=3, n_threads_batch=3, verbose=False)
    llm.eval(list(range(300, 1500)))
    llm.eval([7])
    options = {"flash_attn": True, "n_threads": 3}
    plans = [plan_memory(read_header(smollm2), 2048, kv, fast_prefill=fast, **options) for fast in (True, False)]
    planned = plans[0].compute_bytes - plans[1].compute_bytes
    assert planned / 4 < llm._kernels.n_bytes <= planned
    llm.close()
    monkeypatch.setenv("ROPEWALK_KERNELS", "0")
    assert plan_memory(read_header(smollm2), 2048, kv, fast_prefill=True, **options).total_bytes > plans[0].total_bytes


def test_auto_takes_the_most_exact_that_fits(smollm2):
    header = read_header(smollm2)
    needs = {kv: plan_memory(header, 8192, kv).total_bytes for kv in ("f16", "q8_0:f16", "q8_0", "q4_0")}
    for kv, total in needs.items():
        assert choose_kv(header, 8192, "auto", available=total).kv_type == kv
    with pytest.raises(UserError) as caught:
        choose_kv(header, 8192, "auto", available=needs["q4_0"] - 1)
    numbers = [needs["q4_0"], plan_memory(header, 8192, "q4_0").cache_bytes]
    for n in numbers:
        assert f"{n / 2**20:,.0f}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_fit_is_refused_before_it_is_loaded(tiny_llama, tmp_path):
    path = tiny_llama(tmp_path / "m.gguf", context_length=2**31 - 1)
    with pytest.raises(UserError, match=r"not enough memory for 2147483647 tokens"):
        ropewalk.Llama(path, n_ctx=0, kv="auto", verbose=False)


@pytest.mark.parametrize("kv", ["q8", "", "f16:", "f16:q8_0:f16", "auto:f16", None, 8])
def test_an_unknown_cache_type_is_refused(smollm2, kv):
    with pytest.raises(UserError, match=r"kv: .* expected auto, one of f32, f16"):
        plan_memory(read_header(smollm2), 512, kv)


def test_heads_that_do_not_divide_into_blocks(tiny_llama, tmp_path):
    path = tiny_llama(tmp_path / "m.gguf", n_embd=48, n_head=2)
    header = read_header(path)
    assert choose_kv(header, 256, "auto").kv_type == "f16"
    with pytest.raises(UserError, match="head size 24 is not a multiple of q8_0's block, 32"):
        choose_kv(header, 256, "q8_0")


def test_logits_of_all_tokens_are_counted(smollm2):
    header = read_header(smollm2)
    few, all_ = (plan_memory(header, 4096, "f16", logits_all=flag).total_bytes for flag in (False, True))
    assert all_ - few > 4096 * 49152 * 4
