"""Tiny checkpoints of every architecture are converted as by llama.cpp's own converter, and give the right logits.

That converter's output is recorded in oracle.json (`make oracle` records it again); the logits are those of
transformers' models.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import gguf_digest as digest
import numpy as np
import pytest
import ropewalk
import tiny_checkpoints as checkpoints
import torch
from ropewalk.convert import convert_checkpoint

ORACLE = json.loads(Path(__file__).with_name("oracle.json").read_text(encoding="utf-8"))["files"]
CASES = {case.name: case for case in checkpoints.CASES}
FILES = [(case.name, kind) for case in checkpoints.CASES for kind in case.types]


def test_every_file_of_the_oracle_is_compared():
    assert [f"{name} {kind}" for name, kind in FILES] == list(ORACLE)


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_equals_llama_cpps_converter(name, kind, checkpoint, tmp_path):
    file = tmp_path / "out.gguf"
    convert_checkpoint(checkpoint(name), file, weight_type=kind)
    found, expected = digest.gguf_digest(file), copy.deepcopy(ORACLE[f"{name} {kind}"])
    metadata = {key: value for key, value in found["metadata"].items() if not key.startswith("ropewalk.")}
    if CASES[name].tokeniser_files == "json":
        # llama.cpp's converter gives all tokens of such a tokeniser the same score, so that half of all lines get other
        # tokens than with the original (test_tokeniser.py).
        assert metadata.pop("tokenizer.ggml.scores") != expected["metadata"].pop("tokenizer.ggml.scores")
        # It also takes special added tokens for user-defined ones, which are recognised in what a user types.
        types = special_as_user_defined(file, len(CASES[name].added))
        assert metadata.pop("tokenizer.ggml.token_type") != expected["metadata"]["tokenizer.ggml.token_type"]
        assert types == expected["metadata"].pop("tokenizer.ggml.token_type")
    if name.startswith("gemma3"):
        # It writes no EOS token if there are several, so that llama.cpp takes its default, which is Gemma's BOS.
        ends = [metadata.pop(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
        assert ends == [["UINT32", 1], ["UINT32", 106]]
    differing = digest.differences(metadata, expected["metadata"])
    differing += digest.differences(found["tensors"], expected["tensors"])
    assert not differing, "\n".join(differing)


def special_as_user_defined(file: Path, n_added: int) -> list[Any]:
    """The digest of a file's token types, with the control tokens among the last `n_added` made user-defined ones."""
    field = gguf.GGUFReader(file).fields["tokenizer.ggml.token_type"]
    types = np.array([int(field.parts[i][0]) for i in field.data], "<i4")
    last = types[-n_added:]
    last[last == gguf.TokenType.CONTROL] = gguf.TokenType.USER_DEFINED
    return ["INT32[]", {"length": len(types), "sha256": hashlib.sha256(types.tobytes()).hexdigest()[:32]}]


@pytest.mark.parametrize(
    ("name", "length", "context"), [(n, *read) for n, case in CASES.items() for read in case.reads]
)
def test_logits_are_those_of_transformers(name, length, context, checkpoint, tmp_path):
    file = tmp_path / "out.gguf"
    convert_checkpoint(checkpoint(name), file, weight_type="f32")
    tokens = some_tokens(CASES[name].config["vocab_size"], length)
    expected = transformers_logits(checkpoint(name), CASES[name].config, tokens)
    assert 0.5 < expected.std() < 10
    # llama.cpp's GELU is a float16 table: a number near a rounding boundary may be rounded either way.
    allowed = 2e-3 if name.startswith("gemma") else 1e-3
    assert np.abs(llama_logits(file, tokens, context) - expected).max() < allowed


def some_tokens(vocabulary: int, length: int) -> list[int]:
    """Any tokens except the first few, which are special."""
    return [(7 + 211 * i * (i + 3)) % (vocabulary - 8) + 3 for i in range(length)]


def llama_logits(file: Path, tokens: list[int], context: int) -> np.ndarray:
    model = ropewalk.Llama(
        str(file),
        n_ctx=context,
        logits_all=True,
        verbose=False,
        flash_attn=False,
        type_k=0,  # float32, as `type_v`
        type_v=0,
        n_threads=1,
        n_batch=context,
    )
    try:
        model.eval(tokens)
        return model.scores[: len(tokens)].copy()
    finally:
        model.close()


def transformers_logits(folder: Path, config: dict[str, Any], tokens: list[int]) -> np.ndarray:
    """Logits of transformers' model; its loader must find every parameter in the checkpoint, and no others."""
    from transformers import AutoModelForCausalLM

    if config["model_type"] == "minicpm":
        return minicpm_logits(folder, config, tokens)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    if config["model_type"].startswith("gemma"):
        for layer in model.model.layers:
            layer.mlp.act_fn.forward = half_gelu
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


def half_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU as llama.cpp computes it on CPUs: a table from float16 to float16."""
    table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


def minicpm_logits(folder: Path, config: dict[str, Any], tokens: list[int]) -> np.ndarray:
    """MiniCPM is Llama with three scales, folded into the weights here, as transformers has no class for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"]
    same = ["max_position_embeddings", "rms_norm_eps", "rope_scaling", "rope_theta", "vocab_size"]
    model = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in sizes + same}, attn_implementation="eager"))
    if (folder / "pytorch_model.bin").exists():
        weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    else:
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
    weights = {name: weight.float() for name, weight in weights.items()}
    embedding = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embedding)
    weights["lm_head.weight"] = head * (config["dim_model_base"] / config["hidden_size"])
    weights["model.embed_tokens.weight"] = embedding * config["scale_emb"]
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] = weights[name] * (config["scale_depth"] / config["num_hidden_layers"] ** 0.5)
    model.load_state_dict(weights)
    with torch.inference_mode():
        return model.eval()(torch.tensor([tokens])).logits[0].numpy()
