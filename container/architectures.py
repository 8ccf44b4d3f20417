"""llama.cpp's architectures (as of llama-cpp-python 0.3.36), and how their RoPE differs."""

from __future__ import annotations

from .header import Header

LLAMA_CPP_PYTHON = "0.3.36"
"""The release that the lists here are from."""

KNOWN_ARCHITECTURES = frozenset(
    """
    afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bert bitnet bloom chameleon chatglm
    clip codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4
    dflash dots1 dots3note dream eagle3 ernie4_5 ernie4_5-moe eurobert exaone exaone-moe exaone4 falcon falcon-h1
    gemma gemma-embedding gemma2 gemma3 gemma3n gemma4 gemma4-assistant glm-dsa glm4 glm4moe glm5-next gpt-oss gpt2
    gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok grovemoe hrm_text hunyuan-dense
    hunyuan-moe hunyuan_vl hy_v3 hy_v4 internlm2 jais jais2 jamba jina-bert-v2 jina-bert-v3 kimi-k3 kimi-linear laguna
    lfm2 lfm2moe llada llada-moe llama llama-embed llama4 maincoder mamba mamba2 maple mellum mimo2 minicpm minicpm3
    minimax-01 minimax-m2 minimax-m3 mistral3 mistral4 modern-bert mpt muse-glimmer nanbeige nemotron nemotron_h
    nemotron_h_moe neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe openelm orion paddleocr pangu-embedded phi2
    phi3 phimoe plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe qwen3moe
    qwen3next qwen3tts qwen3vl qwen3vlmoe qwen4exp refact rnd1 rwkv6 rwkv6qwen2 rwkv7 seed_oss smallthinker smollm3
    spark2_5 stablelm starcoder starcoder2 step35 t5 t5encoder talkie wavtokenizer-dec xverse
    """.split()  # noqa: SIM905
)
"""Architectures that llama.cpp has a loader for."""

ARCHITECTURES_WITHOUT_ROPE = frozenset(
    """
    arwkv7 bert bloom clip glm5-next gpt2 gptj jais jamba jina-bert-v2 kimi-k3 kimi-linear mamba mamba2 mpt nemotron_h
    nemotron_h_moe refact rwkv6 rwkv6qwen2 rwkv7 starcoder t5 t5encoder wavtokenizer-dec
    """.split()  # noqa: SIM905
)
"""Architectures to which `llama_model_rope_type` gives no RoPE, and bert and starcoder, whose graphs do not rotate."""

NATIVE_FACTOR_ARCHITECTURES = frozenset(
    """
    apertus deci granite granite_swa granitemoe llama llama-embed minicpm minicpm3 mistral3 phi3 phimoe
    """.split()  # noqa: SIM905
)
"""Architectures whose loader reads `rope_factors_long/short` and whose graph rotates by them.

Others do not know these tensors, and llama.cpp refuses such a file. pangu-embedded loads but ignores them, and
step35's layers differ in their rotary dimensions.
"""

ROPE_SWITCH_ARCHITECTURES = frozenset({"granite", "granitehybrid", "graniteswitch"})
"""Architectures that read `rope.scaling.finetuned` as the switch for rotating at all."""

ALPHA_ARCHITECTURES = frozenset({"hunyuan-dense", "hunyuan_vl"})
"""Architectures that derive an NTK-aware base from `rope.scaling.alpha`."""

YARN_BETA_ARCHITECTURES = frozenset({"grok", "mistral3"})
"""Architectures that read YaRN's betas; the others run with 32 and 1 whatever the file says."""

YARN_LOG_MULTIPLIER = {"deepseek2": 0.1, "deepseek32": 0.1, "mistral3": 1.0, "mistral4": 0.1}
"""Architectures that read `yarn_log_multiplier`, and the factor by which the file's number has been multiplied."""


def has_rope(header: Header) -> bool:
    """Whether llama.cpp rotates anything in this model."""
    switched_off = header.get(f"{header.arch}.rope.scaling.finetuned") is False
    if header.arch in ROPE_SWITCH_ARCHITECTURES and switched_off:
        return False
    return header.arch not in ARCHITECTURES_WITHOUT_ROPE and header.get(f"{header.arch}.rope.dimension_count") != 0


def takes_native_factors(header: Header) -> bool:
    """Whether stock llama.cpp can read rescale factors for this model from tensors in the file.

    Not where the original context, which selects between them, is also the unit of the attention temperature.
    """
    return header.arch in NATIVE_FACTOR_ARCHITECTURES and not header.get(f"{header.arch}.attention.temperature_scale")
