"""The architectures that can be converted: one entry each, with its names in transformers and what they become in GGUF.

Values are written through the methods of gguf's own writer (`add_<name>`), which know each key's name and type; weights
get their names from gguf's tensor-name map. An entry only adds facts: which of transformers' names holds what,
transformers' defaults for what config.json omits (its config classes, version 4.57), and how weights are laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH

from ...errors import UserError
from ..tokeniser import GEMMA2, GEMMA3, LLAMA, PHI3, QWEN, SENTENCEPIECE_ONLY, TokeniserRules
from .config import Config


@dataclass(frozen=True)
class Key:
    """One metadata value, written by gguf's method ``add_<name>``; a value of None is not written."""

    name: str
    value: Callable[[Config], Any]


@dataclass(frozen=True)
class Permute:
    """Interleave the rows of each head: transformers rotates halves of a head, llama.cpp's `llama` pairs of neighbours.

    `heads` is the config's name for the number of heads.
    """

    heads: str


@dataclass(frozen=True)
class Shift:
    """Add a number: Gemma's norms multiply by 1 + weight."""

    by: float


@dataclass(frozen=True)
class Stack:
    """Stack experts' matrices into one tensor, `into`; `experts` is the config's name for their number.

    In `into`, {0}, {1}, … are the pattern's groups; the second group is the expert's number.
    """

    experts: str
    into: str


@dataclass(frozen=True)
class Halves:
    """Split the second-to-last dimension into two tensors; {0}, … in their names are the pattern's groups."""

    first: str
    second: str


@dataclass(frozen=True)
class Rename:
    """Change only the name."""

    into: str


@dataclass(frozen=True)
class Drop:
    """Do not write the tensor."""


@dataclass(frozen=True)
class TrimRows:
    """Leave out rows beyond the vocabulary."""


Change = Permute | Shift | Stack | Halves | Rename | Drop | TrimRows


@dataclass(frozen=True)
class Rule:
    """The change to tensors whose whole name matches a regular expression."""

    pattern: str
    change: Change


@dataclass(frozen=True)
class Architecture:
    """An architecture that can be converted.

    Attributes:
        classes: transformers' class names, as in config.json's `architectures`.
        arch: llama.cpp's architecture.
        keys: metadata, in addition to what every model has (`general`) and RoPE (`rope`).
        rules: for tensors; the first that matches applies, and tensors that match none are not changed.
        tokeniser: how its tokeniser is read.
        defaults: values for what config.json leaves out.
        activations: what llama.cpp computes in the feed-forward part, by transformers' names.
        rope: which of RoPE's keys llama.cpp's converter writes for it: "common", "phi3", or "none".
        experts: the config's name for the number of experts, if it has them.
        aliases: other names of settings in some configs, by name.
        unread: returns notes on settings that llama.cpp does not read from the file and assumes to be different.
    """

    classes: tuple[str, ...]
    arch: MODEL_ARCH
    keys: tuple[Key, ...]
    tokeniser: TokeniserRules
    rules: tuple[Rule, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activations: tuple[str, ...] = ("silu", "swish")
    rope: str = "common"
    experts: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    unread: Callable[[Config], tuple[str, ...]] = lambda config: ()


def count(name: str) -> Callable[[Config], int]:
    return lambda config: config.count(name)


def number(name: str) -> Callable[[Config], float]:
    return lambda config: config.number(name)


def not_negative(name: str) -> Callable[[Config], float]:
    def check(config: Config) -> float:
        if config.number(name) < 0:  # llama.cpp aborts on it, while it computes
            raise config.wrong(name, "a number of at least 0")
        return config.number(name)

    return check


def experts_used(experts: str) -> Callable[[Config], int]:
    """The number of experts per token, of those that the config calls `experts`."""

    def check(config: Config) -> int:
        if config.count("num_experts_per_tok") > config.count(experts):
            raise config.wrong("num_experts_per_tok", f"at most {experts}, {config.count(experts)}")
        return config.count("num_experts_per_tok")

    return check


def optional(name: str) -> Callable[[Config], int | None]:
    return lambda config: config.optional(name)


def heads_kv(config: Config) -> int:
    """The number of key and value heads; as many as query heads if they are not grouped."""
    return config.optional("num_key_value_heads") or config.count("num_attention_heads")


def head_dim(config: Config) -> int:
    """The size of one head, derived if the config does not give it."""
    given = config.optional("head_dim")
    if given is not None:
        return given
    heads = config.count("num_attention_heads")
    if config.count("hidden_size") % heads:
        raise config.wrong("num_attention_heads", f"a divisor of hidden_size, {config.count('hidden_size')}")
    return config.count("hidden_size") // heads


SIZES = (
    Key("block_count", count("num_hidden_layers")),
    Key("context_length", count("max_position_embeddings")),
    Key("embedding_length", count("hidden_size")),
    Key("feed_forward_length", count("intermediate_size")),
    Key("head_count", count("num_attention_heads")),
    Key("head_count_kv", heads_kv),
    Key("layer_norm_rms_eps", not_negative("rms_norm_eps")),
)
GIVEN_HEADS = (Key("key_length", optional("head_dim")), Key("value_length", optional("head_dim")))
DERIVED_HEADS = (Key("key_length", head_dim), Key("value_length", head_dim))
LLAMA_SIZES = (Key("vocab_size", count("vocab_size")), Key("rope_dimension_count", head_dim))

INTERLEAVED = (
    Rule(r".*\.q_proj\.(weight|bias)", Permute("num_attention_heads")),
    Rule(r".*\.k_proj\.(weight|bias)", Permute("num_key_value_heads")),
)
GEMMA_RULES = (Rule(r"lm_head\.weight", Drop()), Rule(r".*norm\.weight", Shift(1.0)))

UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
"""The default of most classes; those without it have tied embeddings."""

LLAMA_DEFAULTS: dict[str, Any] = {
    **UNTIED,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
MISTRAL_DEFAULTS: dict[str, Any] = {
    **LLAMA_DEFAULTS,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
}
QWEN_DEFAULTS: dict[str, Any] = {
    **LLAMA_DEFAULTS,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
}
GELU = ("gelu_pytorch_tanh", "gelu")


def _ignored_window(config: Config) -> tuple[str, ...]:
    window, context = config.get("sliding_window"), config.count("max_position_embeddings")
    if isinstance(window, int) and not isinstance(window, bool) and 0 < window < context:
        return (f"sliding_window {window:,}: llama.cpp lets every token attend to all before it",)
    return ()


def _ignored_switched_window(config: Config) -> tuple[str, ...]:
    """Qwen and SmolLM3: a window only if it is switched on, in the layers of `layer_types` or from a layer on."""
    if not config.get("use_sliding_window"):
        return ()
    kinds, first = config.get("layer_types"), config.get("max_window_layers")
    if isinstance(kinds, list):
        used = "sliding_attention" in kinds
    else:
        used = not isinstance(first, int) or first < config.count("num_hidden_layers")
    return _ignored_window(config) if used else ()


def _normalised_experts(config: Config) -> tuple[str, ...]:
    if config.get("norm_topk_prob"):
        return ()
    return ("norm_topk_prob false: llama.cpp makes the weights of a token's experts sum to 1",)


def _checks(*checks: Callable[[Config], tuple[str, ...]]) -> Callable[[Config], tuple[str, ...]]:
    return lambda config: tuple(note for check in checks for note in check(config))


def _every_fourth_without_rope(config: Config) -> tuple[str, ...]:
    layers, n = config.get("no_rope_layers"), config.count("num_hidden_layers")
    if layers and layers != [int((i + 1) % 4 != 0) for i in range(n)]:
        return ("no_rope_layers: llama.cpp omits RoPE in every fourth layer and in no other",)
    return ()


def _gemma(period: int, largest: int) -> Callable[[Config], tuple[str, ...]]:
    """llama.cpp's Gemma: full attention in one layer of `period`; another scale in the model of `largest` layers."""

    def check(config: Config) -> tuple[str, ...]:
        notes, n = [], config.count("num_hidden_layers")
        kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(n)]
        for name, usual in (("layer_types", kinds), ("sliding_window_pattern", period)):
            if config.get(name) not in (None, usual):
                notes.append(f"{name}: llama.cpp gives full attention to one layer in {period}")
                break
        width = config.count("hidden_size") // config.count("num_attention_heads") if n == largest else head_dim(config)
        if config.get("query_pre_attn_scalar") not in (None, width):
            given = config.get("query_pre_attn_scalar")
            notes.append(f"query_pre_attn_scalar {given}: llama.cpp assumes {width}, so the answers will differ")
        if config.get("use_bidirectional_attention"):
            notes.append("use_bidirectional_attention: llama.cpp lets a token attend only to those before it")
        if config.get("attn_logit_softcapping") and period != 2:
            notes.append("attn_logit_softcapping: llama.cpp does not limit attention's logits in this architecture")
        if config.get("tie_word_embeddings") is False and period == 2:
            notes.append("tie_word_embeddings false: llama.cpp uses the embedding as the output")
        return tuple(notes)

    return check


ARCHITECTURES = (
    Architecture(
        classes=("LlamaForCausalLM", "LLaMAForCausalLM"),
        arch=MODEL_ARCH.LLAMA,
        keys=(*SIZES, *DERIVED_HEADS, *LLAMA_SIZES),
        rules=INTERLEAVED,
        tokeniser=LLAMA,
        defaults=LLAMA_DEFAULTS,
    ),
    Architecture(
        classes=("MistralForCausalLM",),
        arch=MODEL_ARCH.LLAMA,
        keys=(*SIZES, *GIVEN_HEADS, *LLAMA_SIZES),
        rules=INTERLEAVED,
        tokeniser=LLAMA,
        defaults=MISTRAL_DEFAULTS,
        unread=_ignored_window,
    ),
    Architecture(
        classes=("MixtralForCausalLM",),
        arch=MODEL_ARCH.LLAMA,
        keys=(
            *SIZES,
            *GIVEN_HEADS,
            *LLAMA_SIZES,
            Key("expert_count", count("num_local_experts")),
            Key("expert_used_count", experts_used("num_local_experts")),
        ),
        rules=(
            *INTERLEAVED,
            Rule(
                r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight",
                Stack("num_local_experts", "layers.{0}.feed_forward.experts.{2}.weight"),
            ),
        ),
        tokeniser=LLAMA,
        defaults={
            **MISTRAL_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        experts="num_local_experts",
        aliases={"num_local_experts": "num_experts"},
        unread=_ignored_window,
    ),
    Architecture(
        classes=("SmolLM3ForCausalLM",),
        arch=MODEL_ARCH.SMOLLM3,
        keys=(*SIZES, *GIVEN_HEADS, *LLAMA_SIZES),
        rules=INTERLEAVED,
        tokeniser=LLAMA,
        defaults={
            **LLAMA_DEFAULTS,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
        },
        unread=_checks(_every_fourth_without_rope, _ignored_switched_window),
    ),
    Architecture(
        classes=("Qwen2ForCausalLM",),
        arch=MODEL_ARCH.QWEN2,
        keys=(*SIZES, *GIVEN_HEADS),
        tokeniser=QWEN,
        defaults={**QWEN_DEFAULTS, "num_key_value_heads": 32},
        unread=_ignored_switched_window,
    ),
    Architecture(
        classes=("Qwen3ForCausalLM",),
        arch=MODEL_ARCH.QWEN3,
        keys=(*SIZES, *GIVEN_HEADS),
        tokeniser=QWEN,
        defaults={**QWEN_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
        unread=_ignored_switched_window,
    ),
    Architecture(
        classes=("Qwen3MoeForCausalLM",),
        arch=MODEL_ARCH.QWEN3MOE,
        keys=(
            *SIZES,
            *GIVEN_HEADS,
            Key("expert_count", count("num_experts")),
            Key("expert_used_count", experts_used("num_experts")),
            Key("expert_feed_forward_length", count("moe_intermediate_size")),
        ),
        rules=(
            Rule(
                r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight",
                Stack("num_experts", "model.layers.{0}.mlp.experts.{2}.weight"),
            ),
            Rule(
                r"(.*\.mlp\.experts)\.gate_up_proj(?:\.weight)?", Halves("{0}.gate_proj.weight", "{0}.up_proj.weight")
            ),
            Rule(r"(.*\.mlp\.experts\.down_proj)", Rename("{0}.weight")),
        ),
        tokeniser=QWEN,
        defaults={
            **QWEN_DEFAULTS,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        experts="num_experts",
        aliases={"num_experts": "num_local_experts"},
        unread=_checks(_ignored_switched_window, _normalised_experts),
    ),
    Architecture(
        classes=("Phi3ForCausalLM",),
        arch=MODEL_ARCH.PHI3,
        keys=(*SIZES, Key("sliding_window", lambda config: config.optional("sliding_window") or 0)),
        tokeniser=PHI3,
        defaults={
            **UNTIED,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "hidden_act": "silu",
        },
        rope="phi3",
        unread=_ignored_window,
    ),
    Architecture(
        classes=("Gemma2ForCausalLM",),
        arch=MODEL_ARCH.GEMMA2,
        keys=(
            *SIZES,
            *GIVEN_HEADS,
            Key("attn_logit_softcapping", number("attn_logit_softcapping")),
            Key("final_logit_softcapping", number("final_logit_softcapping")),
            Key("sliding_window", count("sliding_window")),
        ),
        rules=GEMMA_RULES,
        tokeniser=GEMMA2,
        defaults={**GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        activations=GELU,
        rope="none",
        unread=_gemma(2, 46),
    ),
    Architecture(
        classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        arch=MODEL_ARCH.GEMMA3,
        keys=(
            *SIZES,
            *GIVEN_HEADS,
            Key("sliding_window", count("sliding_window")),
            Key("final_logit_softcapping", lambda config: config.get("final_logit_softcapping") or None),
        ),
        rules=(Rule(r"model\.embed_tokens\.weight", TrimRows()), Rule(r".*norm\.weight", Shift(1.0))),
        tokeniser=GEMMA3,
        defaults={
            **GEMMA_DEFAULTS,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
        },
        activations=GELU,
        unread=_gemma(6, 62),
    ),
    Architecture(
        classes=("MiniCPMForCausalLM",),
        arch=MODEL_ARCH.MINICPM,
        keys=(
            *SIZES,
            *GIVEN_HEADS,
            Key("embedding_scale", number("scale_emb")),
            Key("residual_scale", lambda c: c.number("scale_depth") / c.count("num_hidden_layers") ** 0.5),
            Key("logit_scale", lambda c: c.count("hidden_size") / c.count("dim_model_base")),
        ),
        rules=INTERLEAVED,
        tokeniser=SENTENCEPIECE_ONLY,
    ),
)
"""To add one: an entry here, and a tiny checkpoint in the tests."""


def architecture_of(config: Config) -> Architecture:
    """Return the entry for a checkpoint.

    Raises:
        UserError: there is none; the message lists those that exist.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise config.wrong("architectures", "a list with the name of the model's class")
    for entry in ARCHITECTURES:
        if names[0] in entry.classes:
            return entry
    known = ", ".join(entry.classes[0] for entry in ARCHITECTURES)
    raise UserError(
        f"{config.path}: architectures: {names[0]!r}, expected one of {known};"
        " a GGUF file of any architecture with RoPE can be extended directly"
    )
