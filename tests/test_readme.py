"""Every example in README.md is run, and does what is printed there."""

import json
import os
import pydoc_data.topics
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import typer
from ropewalk.cli.main import app
from safetensors.torch import save_file
from tiny_tokenisers import write_bpe

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
NOT_HERE = ("make ", "pip ", "ropewalk demo")  # set-up, and what takes minutes


def examples():
    """(command, printed output) of each `$ …` line in the console blocks."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            if not command.startswith(NOT_HERE):
                found.append((command, output.strip()))
    return found


def run(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    place = tmp_path_factory.mktemp("readme")
    (place / "model.gguf").symlink_to(smollm2)
    (place / "notes.md").write_text(pydoc_data.topics.topics["assert"], encoding="utf-8")
    return place


HUGGING_FACE = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def checkpoint(smollm2, folder):
    """The bundled model as a Hugging Face checkpoint."""
    place = folder / "checkpoint"
    place.mkdir()
    reader = gguf.GGUFReader(smollm2)
    heads = {"attn_q": 9, "attn_k": 3}
    weights = {}
    for tensor in reader.tensors:
        numbers = np.array(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(tensor.shape[::-1])
        *layer, name, _ = tensor.name.removeprefix("blk.").split(".")
        if name in heads:  # back from pairs of neighbours to halves
            pairs = numbers.reshape(heads[name], -1, 2, numbers.shape[1])
            numbers = pairs.swapaxes(1, 2).reshape(numbers.shape)
        at = f"model.layers.{layer[0]}." if layer else "model."
        weights[f"{at}{HUGGING_FACE[name]}.weight"] = torch.from_numpy(np.ascontiguousarray(numbers)).bfloat16()
    save_file(weights, place / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    (place / "config.json").write_text(json.dumps(config))
    write_bpe(place)


def shape(text):
    """The text without what differs from machine to machine: numbers, and the spaces around them."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.,]+", "#", text))


def test_the_commands(folder, checkpoint):
    commands = examples()
    assert [command.split("ropewalk ")[1].split()[0] for command, _ in commands] == [
        "convert",
        "convert",
        "chat",
        "inspect",
        "chat",
        "summarize",
    ]
    for command, printed in commands:
        result = run(command, folder)
        assert result.returncode == 0, result.stderr
        name = command.split("ropewalk ")[1].split()[0]
        if name in ("convert", "inspect"):
            assert shape(result.stdout.strip()) == shape(printed)
        elif name == "chat":
            assert len(result.stdout.strip()) > 10 and not result.stderr
        else:
            written = json.loads((folder / "summaries.jsonl").read_text(encoding="utf-8"))
            assert len(written["summary"]) > 20


def test_commands_that_take_long_are_at_least_understood():
    commands = typer.main.get_command(app).commands
    shown = re.findall(r"^ropewalk (\w+) (.*)$", README, flags=re.MULTILINE)
    assert {"search", "eval"} <= {name for name, _ in shown}
    for name, arguments in shown:
        assert commands[name].make_context(name, shlex.split(arguments)).params, name


def test_the_python(folder):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    if not (folder / "model-32k.gguf").exists():
        run("ropewalk convert model.gguf model-32k.gguf --context 32768", folder)
    (folder / "example.py").write_text(code, encoding="utf-8")
    result = run(f"{sys.executable} example.py", folder)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


def test_what_it_points_at_is_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
