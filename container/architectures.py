"""What llama.cpp (as of llama-cpp-python 0.3.36) makes of each architecture's RoPE, where architectures differ."""

from __future__ import annotations

from .header import Header

ARCHITECTURES_WITHOUT_ROPE = frozenset(
    """
    arwkv7 bert bloom clip glm5-next gpt2 gptj jais jamba jina-bert-v2 kimi-k3 kimi-linear mamba mamba2 mpt nemotron_h
    nemotron_h_moe refact rwkv6 rwkv6qwen2 rwkv7 starcoder t5 t5encoder wavtokenizer-dec
    """.split()  # noqa: SIM905
)
"""Those that `llama_model_rope_type` gives no RoPE, and bert and starcoder, whose graphs do not rotate."""

NATIVE_FACTOR_ARCHITECTURES = frozenset(
    """
    apertus deci granite granite_swa granitemoe llama llama-embed minicpm minicpm3 mistral3 phi3 phimoe
    """.split()  # noqa: SIM905
)
"""Those whose loader takes `rope_factors_long/short` and whose graph rotates by them.

To others the tensors would be unknown, and llama.cpp refuses such a file. pangu-embedded loads but ignores them, and
step35 has layers with several rotary dimensions.
"""

ROPE_SWITCH_ARCHITECTURES = frozenset({"granite", "granitehybrid", "graniteswitch"})
"""Those that read `rope.scaling.finetuned` as whether to rotate at all."""

ALPHA_ARCHITECTURES = frozenset({"hunyuan-dense", "hunyuan_vl"})
"""Those that work out an NTK-aware base from `rope.scaling.alpha`."""

YARN_BETA_ARCHITECTURES = frozenset({"grok", "mistral3"})
"""Those that read YaRN's betas; the others run with 32 and 1 whatever the file says."""

YARN_LOG_MULTIPLIER = {"deepseek2": 0.1, "deepseek32": 0.1, "mistral3": 1.0, "mistral4": 0.1}
"""Those that read `yarn_log_multiplier`, and the factor that the file's number bears."""


def has_rope(header: Header) -> bool:
    """Whether llama.cpp rotates anything in this model."""
    switched_off = header.get(f"{header.arch}.rope.scaling.finetuned") is False
    if header.arch in ROPE_SWITCH_ARCHITECTURES and switched_off:
        return False
    return header.arch not in ARCHITECTURES_WITHOUT_ROPE and header.get(f"{header.arch}.rope.dimension_count") != 0


def takes_native_factors(header: Header) -> bool:
    """Whether stock llama.cpp can be given rescale factors for this model in tensors of the file.

    Not where the original context, which says which of them serve, is also the unit of the attention's temperature.
    """
    return header.arch in NATIVE_FACTOR_ARCHITECTURES and not header.get(f"{header.arch}.attention.temperature_scale")
