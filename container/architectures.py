"""How llama.cpp (as of llama-cpp-python 0.3.36) treats each architecture's RoPE, where architectures differ."""

from __future__ import annotations

from .header import Header

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
