"""Metadata at which llama.cpp aborts the process instead of reporting an error, checked before it sees the file.

The rules are the assertions of llama.cpp as of llama-cpp-python 0.3.36: llama-model.cpp (`load_hparams`),
llama-vocab.cpp, the graphs of the architectures, and ggml-cpu's ops.cpp.
"""

from __future__ import annotations

from typing import Any

import llama_cpp

from ...container import GGUFError, Header, has_rope, model_parts
from ...container.alphabet import Alphabet, alphabet
from ...errors import UserError
from ..memory import MAX_LAYERS, counts, head_size, value_size

MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
EPSILONS = ("layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon")

NO_TOKENISER = ("none", "no_vocab")
DEFAULT_TOKENS = {"llama": 2, "gpt2": 11}  # the last of the tokens that llama.cpp takes for BOS and EOS unless told
BYTE_TOKEN = 6  # GGUF's token type of a single byte
BYTE_TOKEN_CHARACTERS = 3  # of "<0x0A>", which llama.cpp skips unchecked

WHOLE_HEAD_ARCHITECTURES = frozenset(
    """
    apertus arcee arctic baichuan chameleon codeshell cogvlm cohere2moe dbrx deci deepseek dots1 dream ernie4_5
    ernie4_5-moe exaone exaone-moe exaone4 falcon granite granite_swa granitemoe graniteswitch grok grovemoe
    hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 llada llada-moe llama llama4 maincoder mellum minicpm
    mistral3 olmo olmo2 olmoe orion paddleocr pangu-embedded plamo qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl
    qwen3vlmoe rnd1 seed_oss smallthinker smollm3 starcoder2 talkie xverse
    """.split()  # noqa: SIM905
)
"""Architectures whose graphs assert that all of a head is rotated, and that values are as long as keys."""

EQUAL_HEAD_ARCHITECTURES = WHOLE_HEAD_ARCHITECTURES | frozenset(
    """
    afmoe bailingmoe2 bitnet chatglm cohere2 command-r dflash eagle3 eurobert glm4 glm4moe gptneox granitehybrid
    laguna llama-embed minimax-01 minimax-m2 minimax-m3 modern-bert muse-glimmer nanbeige nemotron neo-bert openelm
    phi2 phi3 pockettts qwen qwen35 qwen35moe qwen3next qwen3tts qwen4exp spark2_5 stablelm
    """.split()  # noqa: SIM905
)
"""Architectures whose graphs assert that values are as long as keys; of those that rotate."""


def check_loadable(header: Header, vocab_only: bool = False) -> None:
    """Refuse a file at which llama.cpp would abort.

    Raises:
        UserError: names the key, what it holds and what was expected.
    """
    _check_tokens(header)
    if vocab_only:
        return
    _check_layers(header)
    _check_experts(header)
    _check_head(header)
    _check_attention(header)
    for name in EPSILONS:
        key = f"{header.arch}.attention.{name}"
        if key in header.entries and header.number(key) < 0:
            raise GGUFError(f"{header.path}: {key}: {header.number(key):g}, expected at least 0")


def alphabet_of(header: Header) -> Alphabet | None:
    """Return what the model's vocabulary can spell if llama.cpp would abort at other texts; None if there are none."""
    if header.get("tokenizer.ggml.model") != "llama":
        return None
    found = (header.entries.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    tokens, types = (header.array(entry.key) if entry and entry.item_type is not None else [] for entry in found)
    return alphabet(map(str, tokens), types) if tokens else None


def check_special_tokens(path: Any, vocab: Any) -> None:
    """Refuse a loaded vocabulary that llama.cpp would abort at on the first text, as a token that it adds is missing.

    Raises:
        UserError: names the token.
    """
    words = llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_WPM  # adds both to every text
    for name, added, token in (
        ("bos", words or llama_cpp.llama_vocab_get_add_bos(vocab), llama_cpp.llama_vocab_bos(vocab)),
        ("eos", llama_cpp.llama_vocab_get_add_eos(vocab), llama_cpp.llama_vocab_eos(vocab)),
        ("sep", words, llama_cpp.llama_vocab_sep(vocab)),
    ):
        if added and token == llama_cpp.LLAMA_TOKEN_NULL:
            raise _missing(path, name)


def _check_layers(header: Header) -> None:
    (n_layer,) = counts(header, "block_count", (1,), 1, MAX_LAYERS)
    (predicting,) = counts(header, "nextn_predict_layers", (0,), 0)
    if predicting > n_layer:
        raise GGUFError(f"{header.path}: {header.arch}.nextn_predict_layers: {predicting}, expected at most {n_layer}")


def _check_experts(header: Header) -> None:
    (count,) = counts(header, "expert_count", (0,), 0, MAX_EXPERTS)
    if header.arch in ("hunyuan-dense", "hunyuan_vl") and count <= 1:
        return  # llama.cpp forgets them
    used = max(counts(header, "expert_used_count", (0,), 0, per_layer=True))
    (groups,), (groups_used,) = (counts(header, f"expert_group{name}_count", (0,), 0) for name in ("", "_used"))
    if used > count or (count and not used):
        expected = f"1 to {count}" if count else "0"
        raise GGUFError(f"{header.path}: {header.arch}.expert_used_count: {used}, expected {expected} (expert_count)")
    if groups and (groups >= count or count % groups):
        raise GGUFError(
            f"{header.path}: {header.arch}.expert_group_count: {groups}, expected a divisor of {count} below it"
        )
    if groups > 1 and not 0 < groups_used < groups:
        raise GGUFError(
            f"{header.path}: {header.arch}.expert_group_used_count: {groups_used}, expected 1 to {groups - 1}"
        )


def _check_head(header: Header) -> None:
    if not has_rope(header):
        return
    size = head_size(header)
    (n_rot,) = counts(header, "rope.dimension_count", (size,), 0)
    whole = header.arch in WHOLE_HEAD_ARCHITECTURES
    if n_rot > size or (whole and n_rot != size):
        expected = f"{'' if whole else 'at most '}the head size, {size}"
        raise GGUFError(f"{header.path}: {header.arch}.rope.dimension_count: {n_rot}, expected {expected}")
    if header.arch in EQUAL_HEAD_ARCHITECTURES and value_size(header) != size:
        raise GGUFError(
            f"{header.path}: {header.arch}.attention.value_length: {value_size(header)}, expected the key's, {size}"
        )


def _check_attention(header: Header) -> None:
    """In phi3, queries, keys and values may be one tensor or three; the loader also takes none."""
    if header.arch != "phi3":
        return
    names = {tensor.name for part in model_parts(header) for tensor in part.tensors}
    for i in range(*counts(header, "block_count", (1,), 1, MAX_LAYERS)):
        parts = {f"blk.{i}.attn_{name}.weight" for name in "qkv"}
        if f"blk.{i}.attn_qkv.weight" not in names and not parts <= names:
            raise GGUFError(f"{header.path}: blk.{i}.attn_qkv.weight: missing")


def _check_tokens(header: Header) -> None:
    model, key = header.get("tokenizer.ggml.model"), "tokenizer.ggml.tokens"
    if model in NO_TOKENISER:
        raise GGUFError(f"{header.path}: tokenizer.ggml.model: {model!r}, expected a model with a tokeniser")
    entry = header.entries.get(key)
    if entry is None or entry.item_type is None:
        return  # llama.cpp says so
    tokens = header.array(key)
    if len(tokens) != len(set(tokens)):
        token = _repeated(tokens)
        if token:
            raise GGUFError(f"{header.path}: {key}: {token!r:.80} appears twice, expected distinct tokens")
    _check_byte_tokens(header, model, tokens)
    # Older releases crash on these while they load the file; the others are seen by `check_special_tokens`.
    default = DEFAULT_TOKENS.get(str(model), 0)
    for name in ("bos", "eos"):
        added = header.get(f"tokenizer.ggml.add_{name}_token") is True
        if added and header.get(f"tokenizer.ggml.{name}_token_id") is None and default >= len(tokens):
            raise _missing(header.path, name)


def _missing(path: Any, name: str) -> UserError:
    return UserError(f"{path}: tokenizer.ggml.{name}_token_id: missing, and the model adds that token to texts")


def _repeated(tokens: list[Any]) -> str | None:
    seen: set[Any] = set()
    for token in tokens:
        # An empty token gets a name of its own, and bytes that are not UTF-8 may differ where their text does not.
        if token in seen and token and "\ufffd" not in str(token):
            return str(token)
        seen.add(token)
    return None


def _check_byte_tokens(header: Header, model: Any, tokens: list[Any]) -> None:
    key = "tokenizer.ggml.token_type"
    entry = header.entries.get(key)
    if entry is None or entry.item_type is None:
        return
    types = header.array(key)
    if len(types) < len(tokens):
        raise GGUFError(f"{header.path}: {key}: {len(types):,} types, expected one for each of {len(tokens):,} tokens")
    if BYTE_TOKEN not in types:
        return
    for i, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind == BYTE_TOKEN and (model == "bert" or len(str(token)) < BYTE_TOKEN_CHARACTERS):
            raise GGUFError(f"{header.path}: tokenizer.ggml.tokens: {i}: {token!r:.80}, expected a byte like '<0x0A>'")
