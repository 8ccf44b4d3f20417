"""The installed llama.cpp is tried once in a process of its own, and what was found is remembered."""

import logging
import sys

import pytest
from ropewalk.errors import UserError
from ropewalk.runtime import Llama
from ropewalk.runtime.graph import admission, ggml
from ropewalk.runtime.graph.admission import Verdict
from ropewalk.runtime.graph.fast import TorchNodes
from ropewalk.runtime.graph.kernels import library, why_missing
from ropewalk.runtime.graph.kernels.library import INSTRUCTIONS, SWITCH


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As on a machine where nothing is known yet."""
    monkeypatch.setattr(admission.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    admission._verdict.cache_clear()
    yield tmp_path / "ropewalk"
    admission._verdict.cache_clear()


@pytest.fixture
def python(monkeypatch, tmp_path):
    """Put a shell script in the place of the Python that runs the self-test."""

    def put(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def test_it_passes_here_and_is_remembered(fresh, monkeypatch):
    assert admission.check_engine().refused == ""
    assert len(list(fresh.glob("engine-*.json"))) == 1
    admission._verdict.cache_clear()
    monkeypatch.setattr(admission, "_try", lambda: pytest.fail("tried twice"))
    assert admission.check_engine().refused == ""


def test_another_processor_or_library_is_tried_anew(fresh, monkeypatch):
    monkeypatch.setattr(admission, "_try", Verdict)
    admission.check_engine()
    for name, value in (("_processor", lambda: "flags: none"), ("VERSION", 99)):
        admission._verdict.cache_clear()
        monkeypatch.setattr(admission, name, value)
        admission.check_engine()
    assert len(list(fresh.glob("engine-*.json"))) == 3


@pytest.mark.parametrize("left", ["", "{", "[1]", '{"refused": ""', '{"nonsense": 1}', "null"])
def test_a_spoilt_memory_is_made_anew(fresh, monkeypatch, left):
    monkeypatch.setattr(admission, "_try", Verdict)
    admission.check_engine()
    kept = next(fresh.glob("engine-*.json"))
    kept.write_text(left)
    admission._verdict.cache_clear()
    assert admission.check_engine() == Verdict()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo noise; echo 'a K-shift does not rotate cached keys'; exit 1", "a K-shift does not rotate cached keys"),
        ("kill -SEGV $$", "its self-test crashed with SIGSEGV"),
        ("echo 'ImportError: no module' >&2; exit 3", "ImportError: no module"),
        ("sleep 60", "its self-test did not end within 0 s"),
    ],
)
def test_what_fails_is_refused_in_one_line(fresh, python, monkeypatch, tiny_llama, tmp_path, script, reason):
    python(script)
    monkeypatch.setattr(admission, "PATIENCE_S", 0.3)
    with pytest.raises(UserError) as caught:
        Llama(tiny_llama(tmp_path / "tiny.gguf"), n_ctx=128, verbose=False)
    said = str(caught.value)
    assert reason in said and f"supported: {ggml.SUPPORTED}" in said and "\n" not in said


def test_extra_buffers_that_crash_are_left_out(fresh, python, caplog, tiny_llama, tmp_path):
    python('case "$*" in *"main(True, "*) kill -SEGV $$;; esac; echo 8')
    with caplog.at_level(logging.WARNING):
        verdict = admission.check_engine()
    assert not verdict.refused and not verdict.extra_buffers
    assert "SIGSEGV" in caplog.text and "left out" in caplog.text
    llm = Llama(tiny_llama(tmp_path / "tiny.gguf"), n_ctx=128, verbose=False)
    assert llm.model_params.use_extra_bufts is False
    llm.close()


@pytest.mark.skipif(bool(why_missing()), reason="the kernels were not compiled")
def test_kernels_that_fail_are_left_out(fresh, python, caplog, tiny_llama, tmp_path):
    python('case "$*" in *", True)"*) echo "attention comes out wrong"; exit 1;; esac; echo 8')
    with caplog.at_level(logging.WARNING):
        verdict = admission.check_engine()
    assert not verdict.refused and verdict.extra_buffers and not verdict.kernels
    assert "attention comes out wrong" in caplog.text and "torch computes" in caplog.text
    llm = Llama(tiny_llama(tmp_path / "tiny.gguf"), n_ctx=128, flash_attn=True, verbose=False)
    assert llm._kernels is None and isinstance(llm._fast, TorchNodes)
    llm.close()


@pytest.mark.skipif(bool(why_missing()), reason="the kernels were not compiled")
def test_other_kernels_are_tried_anew(fresh, monkeypatch):
    monkeypatch.setattr(admission, "_try", Verdict)
    for name, value in ((SWITCH, "1"), (SWITCH, "0"), (SWITCH, "1"), (INSTRUCTIONS, "plain C")):
        admission._verdict.cache_clear()
        monkeypatch.setenv(name, value)
        admission.check_engine()
    assert len(list(fresh.glob("engine-*.json"))) == 3
    admission._verdict.cache_clear()
    fake = fresh / "library"
    fake.write_bytes(b"another build")
    monkeypatch.setattr(library, "_path", lambda: fake)
    admission.check_engine()
    assert len(list(fresh.glob("engine-*.json"))) == 4
