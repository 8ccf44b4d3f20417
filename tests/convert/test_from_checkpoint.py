"""A checkpoint converted in one pass: with a schedule, requantised, in little memory, whole or not at all."""

import json
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import ropewalk
import torch
from ropewalk.container import embedded_schedule, native_schedule, read_header, schedule_of
from ropewalk.convert import convert_checkpoint, convert_model, embed_schedule, plan_extension
from ropewalk.errors import UserError
from ropewalk.factors import dynamic_ntk, write_schedule
from safetensors.torch import load_file, save_file


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A case's folder, to be changed: ``copy(name, **config)`` with these values in config.json (None removes one)."""

    def write(name, **config):
        folder = tmp_path / name
        shutil.copytree(checkpoint(name), folder)
        values = json.loads((folder / "config.json").read_text())
        values = {k: v for k, v in {**values, **config}.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return write


def refused(folder, target, message, **options):
    with pytest.raises(UserError, match=message) as error:
        convert_checkpoint(folder, target, **options)
    assert "\n" not in str(error.value)
    assert not target.exists() and not [path for path in target.parent.iterdir() if path.name.endswith(".part")]


def weights(folder):
    return load_file(folder / "model.safetensors")


# --- with a schedule, or other types


def test_a_schedule_in_the_same_pass(checkpoint, tmp_path):
    folder, two, one = checkpoint("qwen3"), tmp_path / "two.gguf", tmp_path / "one.gguf"
    convert_checkpoint(folder, tmp_path / "plain.gguf", weight_type="f16")
    header = read_header(tmp_path / "plain.gguf")
    embed_schedule(header.path, two, plan_extension(header, 4 * schedule_of(header).context, "yarn").schedule)
    convert_checkpoint(
        folder,
        one,
        weight_type="f16",
        choose=lambda head: plan_extension(head, 4 * schedule_of(head).context, "yarn").schedule,
    )
    assert one.read_bytes() == two.read_bytes()


def test_a_schedule_onto_factors_that_are_tensors(checkpoint, tmp_path):
    """Llama 3's factors are a tensor of the file, which planning a schedule has to read."""
    folder = checkpoint("llama3")
    convert_checkpoint(
        folder,
        tmp_path / "one.gguf",
        choose=lambda head: plan_extension(head, 2 * schedule_of(head).context, "yarn").schedule,
    )
    convert_checkpoint(folder, tmp_path / "plain.gguf")
    header = read_header(tmp_path / "plain.gguf")
    embed_schedule(
        header.path, tmp_path / "two.gguf", plan_extension(header, 2 * schedule_of(header).context, "yarn").schedule
    )
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert max(native_schedule(header).bands[0].rescale_factors) > 1


@pytest.mark.parametrize("kind", ["q4_0", "q5_1"])
def test_types_to_which_llama_cpp_quantises(checkpoint, tmp_path, kind):
    folder = checkpoint("llama")
    convert_checkpoint(folder, tmp_path / "16.gguf")
    convert_model(tmp_path / "16.gguf", tmp_path / "two.gguf", weight_type=kind)
    convert_checkpoint(folder, tmp_path / "one.gguf", weight_type=kind.upper())
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    convert_checkpoint(
        folder,
        tmp_path / "long.gguf",
        weight_type=kind,
        choose=lambda head: plan_extension(head, 2 * schedule_of(head).context, "ntk").schedule,
    )
    long = read_header(tmp_path / "long.gguf")
    assert (
        embedded_schedule(long) == plan_extension(read_header(tmp_path / "16.gguf"), long_context(long), "ntk").schedule
    )
    assert {t.type for t in long.tensors} >= {t.type for t in read_header(tmp_path / "one.gguf").tensors}


def long_context(header):
    return schedule_of(header).context


def test_the_type_of_the_checkpoint_is_kept_by_default(checkpoint, tmp_path):
    convert_checkpoint(checkpoint("qwen3"), tmp_path / "out.gguf")
    assert {t.dtype for t in weights(checkpoint("qwen3")).values()} == {torch.bfloat16}
    types = {t.type for t in read_header(tmp_path / "out.gguf").tensors if len(t.shape) > 1}
    assert types == {gguf.GGMLQuantizationType.BF16}


# --- scaling that has no native form


def test_dynamic_ntk_becomes_bands(checkpoint, tmp_path):
    folder = checkpoint("llama-dynamic")
    convert_checkpoint(folder, tmp_path / "out.gguf")
    config = json.loads((folder / "config.json").read_text())
    factor, trained = config["rope_scaling"]["factor"], config["max_position_embeddings"]
    header = read_header(tmp_path / "out.gguf")
    schedule = embedded_schedule(header)
    assert schedule.bands[0] == native_schedule(header).bands[0] and schedule.context == int(factor * trained)
    expected = dynamic_ntk(schedule.facts.n_rot, factor, schedule.context, trained)
    assert schedule.bands[-1].rescale_factors == pytest.approx(tuple(expected))
    assert header.number("llama.context_length") == trained


def test_yarn_with_its_own_betas_and_attention_factor_gives_transformers_logits(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = checkpoint("llama-yarn-all")
    convert_checkpoint(folder, tmp_path / "out.gguf", weight_type="f32")
    tokens = [(7 + 211 * i * (i + 3)) % 500 + 3 for i in range(24)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    llm = ropewalk.Llama(
        tmp_path / "out.gguf", n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1
    )
    llm.eval(tokens)
    assert np.abs(llm.scores[:24] - expected).max() < 1e-3
    llm.close()


# --- what is wrong with a checkpoint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "expected one of LlamaForCausalLM, .*; a GGUF file of any architecture",
        ),
        ({"architectures": None}, "architectures: None, expected a list"),
        ({"hidden_size": "64"}, "config.json: hidden_size: '64', expected a positive whole number"),
        ({"hidden_size": 128}, r"shape \[512, 64\], expected \[512, 128\] from config.json"),
        (
            {"num_attention_heads": 7},
            r"shape \[64, 128\], expected \[64, 224\] from config.json",
        ),
        ({"num_hidden_layers": 3}, "layer 2 has no tensor for"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000, expected at most the"),
        ({"num_hidden_layers": 1}, "not a tensor of Qwen3ForCausalLM"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan, expected a number"),
        ({"rope_scaling": {"rope_type": "magic"}}, "rope_scaling.rope_type: 'magic', expected linear, yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: .*expected a number"),
        ({"rope_scaling": [2]}, r"rope_scaling: \[2\], expected a map"),
        (
            {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}},
            "long_factor: '?1 numbers'?, expected a list of",
        ),
        ({"max_position_embeddings": -5}, "max_position_embeddings: -5, expected a positive whole number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps: -1e-06, expected a number of at least 0"),
        ({"rope_theta": 1e39}, "rope_theta: 1e\\+39, expected a number up to 3.4e"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
            "rope_scaling.factor: 1000.*, expected a number up",
        ),
    ],
)
def test_an_invalid_config(copy, tmp_path, config, message):
    refused(copy("qwen3", **config), tmp_path / "out.gguf", message)


def test_a_missing_tensor_and_an_unknown_one(copy, tmp_path):
    folder = copy("qwen3")
    whole = weights(folder)
    norm = "model.layers.1.self_attn.q_norm.weight"
    save_file({n: t for n, t in whole.items() if n != norm}, folder / "model.safetensors")
    refused(folder, tmp_path / "out.gguf", "layer 1 has no tensor for attn_q_norm.weight, which other layers have")
    save_file({n: t for n, t in whole.items() if n != "model.norm.weight"}, folder / "model.safetensors")
    refused(folder, tmp_path / "out.gguf", r"no tensor for output_norm.weight, expected one \(config.json\)")
    save_file({**whole, "model.layers.0.magic.weight": torch.ones(3)}, folder / "model.safetensors")
    refused(folder, tmp_path / "out.gguf", "model.layers.0.magic.weight: not a tensor of Qwen3ForCausalLM")


def test_nans_are_reported(copy, tmp_path):
    folder = copy("qwen3")
    whole = weights(folder)
    whole["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(whole, folder / "model.safetensors")
    for kind in ("bf16", "f16", "q8_0"):
        notes = convert_checkpoint(folder, tmp_path / f"{kind}.gguf", weight_type=kind)
        assert [note for note in notes if "NaN" in note] == [
            "model.layers.0.mlp.up_proj.weight: contains NaNs; the model will generate noise"
        ]


def test_what_llama_cpp_runs_differently_is_reported(copy, tmp_path):
    notes = convert_checkpoint(copy("qwen3", hidden_act="relu"), tmp_path / "out.gguf")
    assert notes == ("hidden_act relu: llama.cpp computes silu",)


def test_a_tokeniser_that_is_missing(copy, tmp_path):
    folder = copy("qwen3")
    for file in (*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*")):
        file.unlink()
    refused(folder, tmp_path / "out.gguf", "tokenizer")


# --- memory, and kills at any moment

CONVERT = """import sys
from ropewalk.convert import convert_checkpoint
convert_checkpoint(*sys.argv[1:3], weight_type=sys.argv[3])"""


def large(folder: Path, small: Path, layers: int, hidden: int) -> int:
    """Write a checkpoint of zeros that take no disk space, with `small`'s tokeniser; return its largest tensor size."""
    folder.mkdir()
    for file in small.iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, folder)
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": None, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (4 * hidden, hidden) for n in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, 4 * hidden)}
        shapes |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)
    return max(2 * int(np.prod(shape)) for shape in shapes.values())


MEASURE = """
import pathlib, re
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_bounded_by_the_largest_tensor(checkpoint, tmp_path):
    largest = large(tmp_path / "large", checkpoint("llama"), layers=24, hidden=1024)
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 750 << 20
    for kind in ("f16", "q8_0"):
        command = [sys.executable, "-c", CONVERT + MEASURE, tmp_path / "large", tmp_path / "out.gguf", kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert int(done.stdout) * 1024 < 3 * largest + (400 << 20)
        (tmp_path / "out.gguf").unlink()


def test_killed_at_any_moment_it_leaves_no_partial_output(checkpoint, tmp_path):
    large(tmp_path / "large", checkpoint("llama"), layers=6, hidden=1024)
    command = [sys.executable, "-c", CONVERT, tmp_path / "large", tmp_path / "out.gguf", "q8_0"]
    started = time.monotonic()
    subprocess.run(command, check=True)
    usual, whole = time.monotonic() - started, (tmp_path / "out.gguf").read_bytes()
    (tmp_path / "out.gguf").unlink()
    rng = random.Random(1)
    for _ in range(4):
        child = subprocess.Popen(command)
        time.sleep(usual * rng.uniform(0.4, 0.95))
        child.send_signal(signal.SIGKILL)
        child.wait()
        if (tmp_path / "out.gguf").exists():
            assert (tmp_path / "out.gguf").read_bytes() == whole
            (tmp_path / "out.gguf").unlink()
    subprocess.run(command, check=True)
    assert (tmp_path / "out.gguf").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out.gguf"]


def test_the_disk_is_full(checkpoint, tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {hard}))\n{CONVERT}"
    command = [sys.executable, "-c", script, checkpoint("llama"), tmp_path / "out.gguf", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "UserError" in done.stderr and "cannot write" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_schedule_for_another_model_is_refused_before_anything_is_written(checkpoint, copy, tmp_path):
    convert_checkpoint(checkpoint("llama"), tmp_path / "a.gguf")
    write_schedule(schedule_of(read_header(tmp_path / "a.gguf")), tmp_path / "s.json")
    other = copy("llama", rope_theta=123456.0)

    def choose(header):
        from ropewalk.convert import plan_given
        from ropewalk.factors import read_schedule

        return plan_given(header, read_schedule(tmp_path / "s.json"), "s.json").schedule

    refused(other, tmp_path / "out.gguf", "the schedule is for freq_base", choose=choose)
