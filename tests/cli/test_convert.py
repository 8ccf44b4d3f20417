"""`ropewalk convert` as a user runs it: the files, the output, and one-line error messages."""

import json
import os
from functools import partial

import llama_cpp
import numpy as np
import pytest
from ropewalk.container import embedded_schedule, native_schedule, read_header
from ropewalk.factors import extend, write_schedule


@pytest.fixture(scope="module")
def run(ropewalk_command):
    return partial(ropewalk_command, "convert")


@pytest.fixture
def source(tiny_llama, tmp_path):
    return tiny_llama(tmp_path / "in.gguf")


@pytest.fixture
def left(tmp_path):
    """Names of files in the folder that were not there when the test started."""
    return lambda *known: sorted({path.name for path in tmp_path.iterdir()} - {"in.gguf", *known})


def test_a_closed_form(run, source, tmp_path, left):
    done = run(source, tmp_path / "out.gguf", "--context", 1000)
    assert done.returncode == 0 and done.stderr == ""
    for words in ("trained for 256 tokens, holds 1,000", "up to       512", "(yarn)", "stock llama.cpp:", "no factors"):
        assert words in done.stdout, words
    assert "\x1b[" not in done.stdout
    schedule = embedded_schedule(read_header(tmp_path / "out.gguf"))
    assert schedule == extend(native_schedule(read_header(source)), 1000, "yarn")
    assert left() == ["out.gguf"]


def test_as_json(run, source, tmp_path):
    done = run(source, tmp_path / "out.gguf", "--context", 512, "--method", "pi", "--type", "q8_0", "--json")
    facts = json.loads(done.stdout)
    assert facts["bytes"] == (tmp_path / "out.gguf").stat().st_size < source.stat().st_size
    assert [(band["context"], band["rescale_factors"]) for band in facts["bands"]] == [
        (256, [1.0] * 16),
        (512, [2.0] * 16),
    ]
    assert facts["context"] == 512 and facts["original_context"] == 256 and facts["stock_llama_cpp"]


def test_a_schedule(run, source, tmp_path):
    schedule = extend(native_schedule(read_header(source)), 2048, "ntk")
    write_schedule(schedule, tmp_path / "s.json")
    done = run(source, tmp_path / "out.gguf", "--schedule", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    assert embedded_schedule(read_header(tmp_path / "out.gguf")) == schedule


def test_a_near_window(run, source, tmp_path):
    done = run(source, tmp_path / "out.gguf", "--context", 512, "--method", "near")
    assert done.returncode == 0, done.stderr
    assert "up to       512  λ 3 to 3 beyond 128 tokens, attention × 1  (near)" in done.stdout
    assert "It has no near window (128 tokens): it reads with plain λ (yarn)." in done.stdout
    done = run(source, tmp_path / "64.gguf", "--context", 512, "--method", "near", "--near-tokens", 64, "--json")
    bands = json.loads(done.stdout)["bands"]
    assert [band["near_tokens"] for band in bands] == [0, 64] and bands[0]["plain"] is None
    assert bands[1]["plain"]["found"]["method"] == "yarn" and bands[1]["plain"]["context"] == 512


def test_only_a_weight_type(run, source, tmp_path):
    done = run(source, tmp_path / "out.gguf", "--type", "f16")
    assert done.returncode == 0, done.stderr
    assert read_header(tmp_path / "out.gguf").get("llama.context_length") == 256


def test_notes_say_what_happens_to_existing_factors(run, tiny_llama, tmp_path):
    tiny_llama(tmp_path / "in.gguf", rope_freqs=[1.0] * 8 + [8.0] * 8)
    done = run(tmp_path / "in.gguf", tmp_path / "1.gguf", "--context", 512)
    assert "note: the model's own scaling (λ 1 to 8) is kept" in done.stdout
    done = run(tmp_path / "1.gguf", tmp_path / "2.gguf", "--context", 1024)
    assert "note: the schedule in the file (native + yarn, 512 tokens) is dropped" in done.stdout
    done = run(tmp_path / "1.gguf", tmp_path / "3.gguf", "--context", 1024, "--existing", "compose", "--type", "q4_0")
    assert "(native + yarn, 512 tokens) is kept" in done.stdout
    done = run(tmp_path / "3.gguf", tmp_path / "4.gguf", "--type", "q8_0")
    assert "note: the weights were quantised already (q4_0" in done.stdout


def test_that_llama_cpp_does_not_load_a_model_is_said(run, tiny_llama, tmp_path):
    path = tiny_llama(tmp_path / "m.gguf")
    data = path.read_bytes()
    assert "does not load" not in run(path, tmp_path / "sound.gguf", "--context", 1024).stdout
    path.write_bytes(data.replace(b"blk.1.attn_v.weight", b"blk.1.none_v.weight"))
    done = run(path, tmp_path / "out.gguf", "--context", 1024)
    assert done.returncode == 0
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"stock llama.cpp: does not load it (llama-cpp-python {llama_cpp.__version__}): ")
    assert "blk.1.attn_v.weight" in last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to do: expected --context, --schedule or --type"),
        (["--context", 256], "context: 256, expected more than the 256 tokens"),
        (["--context", 0], "context: 0, expected more"),
        (["--context", "long"], "'--context'"),
        (["--context", "nan"], "'--context'"),
        (["--context", 2**40], "expected at most 2147483647"),
        (["--context", 512, "--method", "magic"], "method: 'magic', expected one of yarn, ntk, pi, near"),
        (["--context", 512, "--type", "q99"], "type: 'q99', expected one of"),
        (["--context", 512, "--existing", "maybe"], "existing: 'maybe', expected compose or replace"),
        (["--context", 512, "--method", "near", "--near-tokens", 257], "near_tokens: 257, expected 1 to 255"),
        (["--context", 512, "--method", "near", "--near-tokens", 0], "near_tokens: 0, expected 1 to 255"),
        (["--context", 512, "--near-tokens", 64], "--near-tokens 64: expected --method near"),
        (["--method", "pi"], "--method pi: expected --context"),
        (["--context", 512, "--colour"], "colour"),
        (["--schedule", "none.json"], "none.json: cannot read the schedule: No such file"),
        (["--schedule", "."], "cannot read the schedule"),
        (["--schedule", "s.json", "--method", "pi"], "--method pi: not allowed with --schedule"),
        (["--schedule", "s.json", "--context", 4096], "s.json reaches 1024 tokens"),
        (["--schedule", "broken.json"], "broken.json: not a JSON file"),
        (["--schedule", "n_rot.json"], "schedule is for n_rot 64, the model has 32"),
        (["--schedule", "base.json"], "schedule is for freq_base 500000, the model has 10000"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_in_the_options(mistake, options, message, source, tiny_llama, tmp_path, left):
    others = tmp_path / "others"
    others.mkdir()
    models = {"s": {}, "n_rot": {"n_embd": 128}, "base": {"freq_base": 5e5}}
    for name, changes in models.items():
        if f"{name}.json" in options:
            schedule = native_schedule(read_header(tiny_llama(others / "model.gguf", **changes)))
            write_schedule(extend(schedule, 1024), others / f"{name}.json")
    (others / "broken.json").write_text("{")
    assert message in mistake("convert", source, tmp_path / "out.gguf", *options, cwd=others)
    assert left("others") == []


def test_mistakes_in_the_files(mistake, source, tiny_llama, tmp_path, left):
    model, out = source.read_bytes(), tmp_path / "out.gguf"
    start = read_header(source).data_start
    wrong = {
        "empty": (b"", "empty: "),
        "text": (b"hello, this is not a model at all\n" * 10, "text: "),
        "head": (model[: start // 2], "head: "),
        "data": (model[: start + 1000], "data: cut short in tensor"),
        "counts": (model[:8] + b"\xff" * 16 + model[24:], "counts: "),
    }
    for name, (raw, message) in wrong.items():
        (tmp_path / name).write_bytes(raw)
        assert message in mistake("convert", tmp_path / name, out, "--context", 512)
    assert "No such file" in mistake("convert", tmp_path / "none.gguf", out, "--context", 512)
    assert "no config.json, expected a Hugging Face checkpoint" in mistake("convert", tmp_path, out, "--context", 512)
    bert = tiny_llama(tmp_path / "bert.gguf", arch="bert")
    assert "architecture 'bert' has no RoPE" in mistake("convert", bert, out, "--context", 512)
    assert left(*wrong, "bert.gguf") == []


def test_mistakes_in_the_output(run, mistake, source, tmp_path, left):
    (tmp_path / "there.gguf").write_bytes(b"precious")
    assert "already exists (--force replaces it)" in mistake(
        "convert", source, tmp_path / "there.gguf", "--context", 512
    )
    assert (tmp_path / "there.gguf").read_bytes() == b"precious"
    assert "is a folder" in mistake("convert", source, tmp_path, "--context", 512)
    assert "the output is the input" in mistake("convert", source, source, "--context", 512, "--force")
    assert "no such folder" in mistake("convert", source, tmp_path / "none" / "out.gguf", "--context", 512)
    assert run(source, tmp_path / "there.gguf", "--context", 512, "--force").returncode == 0
    assert read_header(tmp_path / "there.gguf").get("llama.context_length") == 512
    assert left("there.gguf") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(mistake, source, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in mistake("convert", source, tmp_path / "closed" / "out.gguf", "--context", 512)


def test_random_damage_to_the_head_is_a_mistake_or_harmless(source, tmp_path):
    """In this process, to be quick; the tests above cover how `main` reports errors."""
    from ropewalk.convert import embed_schedule, plan_extension
    from ropewalk.errors import UserError

    whole, start = source.read_bytes(), read_header(source).data_start
    rng = np.random.default_rng(7)
    done = 0
    for _ in range(300):
        raw = bytearray(whole)
        for at in rng.integers(0, min(start, 900) if rng.random() < 0.7 else start, rng.integers(1, 4)):
            raw[at] = rng.integers(0, 256)
        source.write_bytes(raw)
        try:
            schedule = plan_extension(read_header(source), 2048, "yarn").schedule
            embed_schedule(source, tmp_path / "out.gguf", schedule, force=True)
            done += 1
            read_header(tmp_path / "out.gguf")
        except UserError as error:
            assert "\n" not in str(error)
    assert 20 < done < 280
