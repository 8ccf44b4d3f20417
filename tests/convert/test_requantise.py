"""Weights converted to another type by llama.cpp's quantiser, in a separate process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from ropewalk.container import embedded_schedule, read_header
from ropewalk.convert import WEIGHT_TYPES, convert_model, embed_schedule, plan_extension, quantised_types
from ropewalk.errors import UserError


@pytest.fixture
def wide(tiny_llama, tmp_path):
    """A tiny model whose rows are long enough for every type (k-quants have blocks of 256)."""
    return tiny_llama(tmp_path / "wide.gguf", n_embd=256, n_head=4, n_head_kv=2)


def plan(path, context=1024):
    return plan_extension(read_header(path), context, "yarn").schedule


def test_the_names_are_llama_cpps():
    import llama_cpp

    assert all(hasattr(llama_cpp, f"LLAMA_FTYPE_{name}") for name in WEIGHT_TYPES.values())


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q2_k", "iq4_xs"])
def test_weights_change_and_all_else_stays(wide, kind, gguf_contents, tmp_path):
    import llama_cpp

    schedule = plan(wide)
    convert_model(wide, tmp_path / "out.gguf", schedule=schedule, weight_type=kind.upper())
    embed_schedule(wide, tmp_path / "plain.gguf", schedule)
    (fields, tensors), (fields_before, before) = map(gguf_contents, (tmp_path / "out.gguf", tmp_path / "plain.gguf"))
    expected = getattr(gguf.GGMLQuantizationType, kind.removesuffix("_m").removesuffix("_s").upper())
    assert tensors["blk.0.ffn_gate.weight"][0] == expected
    for name, tensor in before.items():
        if len(tensor[1]) == 1 or kind == "f32":
            assert tensors[name] == tensor, "norms and rescale factors are not touched"
    ours = {"general.file_type", "general.quantization_version"}
    assert {key: raw for key, raw in fields.items() if key not in ours} == fields_before
    header = read_header(tmp_path / "out.gguf")
    assert header.get("general.file_type") == getattr(llama_cpp, f"LLAMA_FTYPE_{WEIGHT_TYPES[kind]}")
    assert embedded_schedule(header) == schedule
    llm = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    llm.eval(list(range(3, 283)))
    assert np.isfinite(llm.scores[:280]).all()
    llm.close()


def test_a_type_alone_keeps_what_the_file_carries(wide, tmp_path):
    schedule = plan(wide)
    embed_schedule(wide, tmp_path / "long.gguf", schedule)
    convert_model(tmp_path / "long.gguf", tmp_path / "out.gguf", weight_type="q8_0")
    before, after = read_header(tmp_path / "long.gguf"), read_header(tmp_path / "out.gguf")
    assert embedded_schedule(after) == schedule
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        assert after.tensor_data(after.tensor(name)) == before.tensor_data(before.tensor(name))
        assert after.tensor(name).type == gguf.GGMLQuantizationType.F32
    assert after.file_size < before.file_size / 2


@pytest.mark.parametrize("extended", [False, True])
def test_a_file_of_another_alignment(tiny_llama, tmp_path, extended):
    source = tiny_llama(tmp_path / "in.gguf", extend=lambda writer: writer.add_custom_alignment(256))
    schedule = plan(source) if extended else None
    convert_model(source, tmp_path / "out.gguf", schedule=schedule, weight_type="q8_0")
    one = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    tiny_llama(tmp_path / "usual.gguf")
    convert_model(tmp_path / "usual.gguf", tmp_path / "usual.q8.gguf", weight_type="q8_0")
    for tensor in gguf.GGUFReader(tmp_path / "usual.q8.gguf").tensors:
        assert (one[tensor.name] == tensor.data).all()


def test_quantised_weights_may_be_quantised_again(wide, tmp_path):
    assert quantised_types(read_header(wide)) == []
    convert_model(wide, tmp_path / "q4.gguf", weight_type="q4_0")
    assert quantised_types(read_header(tmp_path / "q4.gguf")) == ["q4_0", "q6_k"]
    convert_model(tmp_path / "q4.gguf", tmp_path / "f16.gguf", weight_type="f16")
    assert quantised_types(read_header(tmp_path / "f16.gguf")) == []


def test_what_llama_cpp_refuses_is_one_line(tiny_llama, tmp_path):
    unknown = tiny_llama(tmp_path / "unknown.gguf", arch="nosucharch")
    with pytest.raises(
        UserError, match=r"unknown\.gguf: llama\.cpp cannot convert it to q8_0: unknown model arch"
    ) as caught:
        convert_model(unknown, tmp_path / "out.gguf", weight_type="q8_0")
    assert "\n" not in str(caught.value)
    nan = tiny_llama(tmp_path / "nan.gguf")
    header = read_header(nan)
    tensor = header.tensor("blk.0.ffn_gate.weight")
    with nan.open("rb+") as file:
        file.seek(header.data_start + tensor.offset)
        file.write(np.full(8, np.nan, dtype="<f4").tobytes())
    with pytest.raises(UserError, match=r"nan\.gguf: llama\.cpp cannot convert it to q8_0: .*"):
        convert_model(nan, tmp_path / "out.gguf", weight_type="q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.gguf", "unknown.gguf"]


def test_an_unknown_type_is_refused(wide, tmp_path):
    with pytest.raises(UserError, match="type: 'q9_9', expected one of f32, f16"):
        convert_model(wide, tmp_path / "out.gguf", weight_type="q9_9")
    with pytest.raises(UserError, match="nothing to do"):
        convert_model(wide, tmp_path / "out.gguf")


def test_progress_is_shown_in_bytes(wide, tmp_path):
    from contextlib import contextmanager

    seen = {}

    @contextmanager
    def bar(label):
        seen[label] = []
        yield lambda done, total: seen[label].append((done, total))

    convert_model(wide, tmp_path / "out.gguf", schedule=plan(wide), weight_type="f16", bar=bar)
    assert list(seen) == ["Requantising to f16", "Writing"]
    for steps in seen.values():
        assert len(steps) > 1 and steps == sorted(steps) and all(done <= total for done, total in steps)


CONVERT = "import sys; from ropewalk.convert import convert_model; convert_model(*sys.argv[1:3], weight_type='q4_k_m')"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_the_quantiser_ends_when_we_are_killed(smollm2, tmp_path):
    """Even by SIGKILL, after which we can do nothing."""
    out = tmp_path / "out.gguf"
    run = subprocess.Popen([sys.executable, "-c", CONVERT, smollm2, out])
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    deadline = time.monotonic() + 20
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.01)
    child = int(found[0])
    part = tmp_path / ".out.gguf.part"
    while part.stat().st_size == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 5
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(child)
    assert not out.exists()


def running(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_number_too_large_for_float16(tiny_llama, tmp_path):
    source = tiny_llama(tmp_path / "in.gguf")
    header, raw = read_header(source), bytearray(source.read_bytes())
    at = header.data_start + header.tensor("blk.0.ffn_up.weight").offset
    raw[at : at + 4] = np.float32(1e5).tobytes()
    source.write_bytes(raw)
    with pytest.raises(UserError, match=r"a number is too large for f16, expected bf16 or f32"):
        convert_model(source, tmp_path / "out.gguf", weight_type="f16")
    convert_model(source, tmp_path / "out.gguf", weight_type="bf16")
