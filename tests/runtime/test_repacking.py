"""Whether llama.cpp may repack weights is measured once in a process of its own, and remembered."""

import json
import logging
import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from ropewalk.container import read_header
from ropewalk.runtime import Llama, repacking, repacking_trial
from ropewalk.runtime.graph import admission
from ropewalk.runtime.graph.admission import check_engine
from ropewalk.runtime.graph.kernels import why_missing
from ropewalk.runtime.repacking import SWITCH, Comparison, known_comparison, known_comparisons, may_repack

THREADS = {"n_threads": 2, "n_threads_batch": 2}

needs_kernels = pytest.mark.skipif(bool(why_missing()), reason="the kernels were not compiled")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As on a machine where nothing has been measured, and where llama.cpp repacks Q4_0."""
    monkeypatch.delenv(SWITCH)
    check_engine()  # by the real Python, and remembered
    monkeypatch.setattr(repacking, "_folder", lambda: tmp_path / "cache" / "ropewalk")
    monkeypatch.setattr(repacking, "_types_repacked_here", lambda: frozenset({"Q4_0"}))
    monkeypatch.setattr(repacking, "default_threads", lambda: 2)
    monkeypatch.setattr(repacking, "MIN_BYTES", 1000)
    repacking._compared.cache_clear()
    yield tmp_path / "cache" / "ropewalk"
    repacking._compared.cache_clear()


@pytest.fixture
def python(monkeypatch, tmp_path):
    """Put a shell script in the place of the Python that runs the trial; the folder it is run with is logged."""

    def put(script):
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\necho "$2" >> {tmp_path / "calls"}\n{script}\n')
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


@pytest.fixture
def calls(tmp_path):
    return lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


@pytest.fixture
def model(tmp_path, tiny_llama):
    """A model whose layers are mostly of a type."""

    def make(kind="Q4_0", experts=False):
        def extend(writer):
            blocks = gguf.quantize(np.ones((4, 64, 256), np.float32), gguf.GGMLQuantizationType[kind])
            blocks = blocks if experts else blocks.reshape(256, -1)
            writer.add_tensor("blk.0.extra.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])

        path = tiny_llama(tmp_path / f"{kind}-{experts}.gguf", n_embd=8, extend=extend)
        return read_header(path)

    return make


def answer(reading, writing):
    return f"echo noise; echo '{json.dumps({'reading': reading, 'writing': writing})}'"


@pytest.mark.parametrize(
    ("reading", "writing", "ours"),
    [
        (2.2, 1.14, True),
        (2.2, 0.6, True),
        (1.06, 1.06, True),
        (1.04, 1.04, False),
        (0.4, 0.9, False),
        (3.0, 0.3, False),
    ],
)
def test_ours_must_win_clearly_reading_and_writing_together(fresh, python, model, reading, writing, ours):
    python(answer(reading, writing))
    assert may_repack(model(), ours=True, **THREADS) is not ours
    assert known_comparison(model()) == Comparison("Q4_0", 2, 2, reading=reading, writing=writing)


def test_it_is_measured_once_for_a_type_and_a_number_of_threads(fresh, python, model, calls, caplog):
    python(answer(2, 2))
    with caplog.at_level(logging.INFO):
        assert not may_repack(model(), ours=True, **THREADS)
    assert "measuring once" in caplog.text
    repacking._compared.cache_clear()
    assert not may_repack(model(), ours=True, **THREADS)
    assert len(calls()) == 1
    may_repack(model(), ours=True, n_threads=1, n_threads_batch=2)
    assert len(calls()) == 2 and "'Q4_0', 1, 2)" in calls()[1]
    assert [(known.n_threads, known.n_threads_batch) for known in known_comparisons()] == [(1, 2), (2, 2)]


def test_another_machine_is_measured_anew(fresh, python, model, calls, monkeypatch):
    python(answer(2, 2))
    may_repack(model(), ours=True, **THREADS)
    monkeypatch.setattr(repacking, "identity", lambda: "another")
    assert known_comparison(model()) is None and known_comparisons() == ()
    may_repack(model(), ours=True, **THREADS)
    assert len(calls()) == 2


@pytest.mark.parametrize("left", ["", "{", "[1]", "null", '{"kind": 1}', '{"kind": "Q4_0", "reading": "x"}'])
def test_a_spoilt_memory_is_made_anew(fresh, python, model, calls, left):
    python(answer(2, 2))
    may_repack(model(), ours=True, **THREADS)
    next(fresh.glob("repacking-*.json")).write_text(left)
    repacking._compared.cache_clear()
    assert known_comparison(model()) is None
    assert not may_repack(model(), ours=True, **THREADS) and len(calls()) == 2


def test_a_cache_folder_that_cannot_be_written_to(fresh, python, model, calls):
    fresh.parent.write_text("a file in its place")
    python(answer(2, 2))
    assert not may_repack(model(), ours=True, **THREADS)
    assert not may_repack(model(), ours=True, **THREADS)
    assert len(calls()) == 1  # remembered by this process


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -SEGV $$", "exit code -11"),
        ("echo 'ImportError: no module' >&2; exit 3", "ImportError: no module"),
        ("echo 'no figures'", "no figures"),
        ("echo '{\"speed\": 3}'", "speed"),
        ("exit 0", "nothing"),
        ("exec sleep 60", "timed out"),
    ],
)
def test_where_it_fails_weights_stay_repacked(fresh, python, model, calls, monkeypatch, script, reason):
    monkeypatch.setattr(repacking, "PATIENCE_S", 0.5)
    python(script)
    assert may_repack(model(), ours=True, **THREADS)
    known = known_comparison(model())
    assert reason in known.failed and "\n" not in known.failed
    folder = calls()[0].split("main('")[1].split("'")[0]
    assert not Path(folder).exists()
    repacking._compared.cache_clear()
    assert may_repack(model(), ours=True, **THREADS) and len(calls()) == 1
    place = next(fresh.glob("repacking-*.json"))
    os.utime(place, (0, 0))  # it may have been the lack of memory on that day
    python(answer(2, 2))
    repacking._compared.cache_clear()
    assert not may_repack(model(), ours=True, **THREADS)


@pytest.mark.parametrize(("value", "repacked"), [("1", True), ("0", False), ("off", False), ("", None)])
def test_the_environment_decides_without_a_measurement(fresh, python, model, calls, monkeypatch, value, repacked):
    python(answer(2, 2))
    monkeypatch.setenv(SWITCH, value)
    found = may_repack(model(), ours=True, **THREADS)
    assert found is (False if repacked is None else repacked) and len(calls()) == (repacked is None)


def test_what_needs_no_measurement(fresh, python, model, calls, monkeypatch):
    python(answer(2, 2))
    for header, ours in ((model(), False), (model("Q8_0"), True), (model(experts=True), True)):
        assert may_repack(header, ours=ours, **THREADS)
    monkeypatch.setattr(repacking, "MIN_BYTES", 1 << 20)
    assert may_repack(model(), ours=True, **THREADS)
    assert not calls()


def test_types_by_what_llama_cpp_was_built_with(monkeypatch):
    for built, yes, no in (
        (b"CPU : AVX2 = 1 | REPACK = 1 | ", {"Q4_0", "Q4_K", "IQ4_NL"}, {"Q4_1", "IQ4_XS", "F16"}),
        (b"CPU : AMX_INT8 = 1 | REPACK = 1 | ", {"Q4_0", "Q4_1", "Q2_K"}, {"BF16", "F32"}),
        (b"CPU : AVX2 = 1 | ", set(), {"Q4_0", "Q4_1"}),
    ):
        monkeypatch.setattr(repacking.llama_cpp, "llama_print_system_info", lambda built=built: built)
        found = repacking._types_repacked_here()
        assert yes <= found and not no & found


@needs_kernels
@pytest.mark.parametrize(("reading", "repacked"), [(2.0, False), (0.5, True)])
def test_a_model_is_loaded_accordingly(fresh, python, tiny_llama, tmp_path, monkeypatch, reading, repacked):
    path = tiny_llama(tmp_path / "m.gguf", n_embd=64)
    monkeypatch.setattr(repacking, "_types_repacked_here", lambda: frozenset({"F32"}))
    python(answer(reading, 1))
    for options, expected in (({}, repacked), ({"exact": True}, False), ({"fast_prefill": False}, True)):
        llm = Llama(path, n_ctx=64, verbose=False, **THREADS, **options)
        assert llm.model_params.use_extra_bufts is expected
        llm.close()


@needs_kernels
def test_a_real_measurement(monkeypatch, tmp_path, capfd):
    for name, value in (("N_EMBD", 256), ("N_HEAD", 4), ("N_HEAD_KV", 2), ("N_FF", 512), ("READ", 64)):
        monkeypatch.setattr(repacking_trial, name, value)
    monkeypatch.setattr(repacking_trial, "ENOUGH_S", 0.05)
    monkeypatch.setattr(admission, "_trusted", None)  # and as it was, afterwards
    found = {}
    for kind in ("Q4_0", "Q5_1"):
        repacking_trial.main(str(tmp_path), kind, 2, 2)
        found[kind] = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert not list(tmp_path.iterdir())
    assert found["Q5_1"] == {"repacked": False}
    compared = Comparison("Q4_0", 2, 2, **found["Q4_0"])
    assert not compared.repacked or (0.01 < compared.reading < 100 and 0.01 < compared.writing < 100)
