"""A checkpoint's tokeniser as GGUF metadata: SentencePiece, byte-level BPE, and BPE with byte fallback."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter

from ...container import Value
from ...errors import UserError
from .bpe import write_byte_fallback_bpe, write_byte_level_bpe
from .files import TokeniserFiles, open_tokeniser
from .rules import GEMMA2, GEMMA3, LLAMA, PHI3, QWEN, SENTENCEPIECE_ONLY, TokeniserRules
from .sentence_piece import write_sentencepiece
from .special import write_special
from .template import write_template

__all__ = [
    "GEMMA2",
    "GEMMA3",
    "LLAMA",
    "PHI3",
    "QWEN",
    "SENTENCEPIECE_ONLY",
    "TokeniserRules",
    "tokeniser_values",
]

CODE_LLAMA_SIZE, CODE_LLAMA_EOT = 32016, 32010
"""Code Llama's vocabulary size, and its end-of-turn token, which none of its files names."""

STARCODER_SIZE = 49152
"""Vocabulary size of StarCoder, Granite and SmolLM, whose tokenisers add no token before a text."""


def tokeniser_values(
    folder: Path, config: Mapping[str, Any], rules: TokeniserRules
) -> tuple[tuple[Value, ...], tuple[str, ...]]:
    """Return all `tokenizer.` keys, as llama.cpp's own converter writes them, and notes for the user.

    Args:
        config: config.json's values, with transformers' defaults for those that it omits.
        rules: what differs by architecture.

    Raises:
        UserError: the tokeniser is missing, broken, or of a kind that llama.cpp does not have.
    """
    files = open_tokeniser(folder, config)
    writer = GGUFWriter(path=None, arch="")
    kind = _kind(files, rules)
    space_prefix = files.config.get("add_prefix_space")
    space_prefix = space_prefix if rules.reads_space_prefix and isinstance(space_prefix, bool) else None
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)
    if kind == "sentencepiece":
        prefix = space_prefix if rules.space_prefix is None else rules.space_prefix
        n_tokens, notes = write_sentencepiece(writer, files, rules, prefix)
        write_special(writer, files, n_tokens, merges=())
    elif kind == "byte-fallback":
        n_tokens, notes = write_byte_fallback_bpe(writer, files, space_prefix)
        write_special(writer, files, n_tokens, merges=())
    else:
        merges, notes = write_byte_level_bpe(writer, files)
        write_special(writer, files, None, merges=merges)
    write_template(writer, files)
    _write_extras(writer, files, rules, kind)
    return tuple(_values(writer)), notes


def _kind(files: TokeniserFiles, rules: TokeniserRules) -> str:
    """The kind of tokeniser that is there: the first that the architecture may have, in the order of the rules."""
    if rules.byte_level_class and files.config.get("tokenizer_class") == rules.byte_level_class:
        return "byte-level"
    there = {
        "sentencepiece": (files.folder / "tokenizer.model").is_file(),
        "byte-fallback": files.is_byte_fallback,
        "byte-level": files.bpe is not None and not files.is_byte_fallback,
    }
    for kind in rules.kinds:
        if there[kind]:
            return kind
    names = {"sentencepiece": "tokenizer.model", "byte-fallback": "tokenizer.json", "byte-level": "tokenizer.json"}
    wanted = " or ".join(dict.fromkeys(names[kind] for kind in rules.kinds))
    if (files.folder / "tekken.json").is_file():
        raise UserError(
            f"{files.folder}: has only tekken.json, expected {wanted} (Mistral's models also come with one)"
        )
    raise UserError(f"{files.folder}: no tokeniser, expected {wanted}")


def _write_extras(writer: GGUFWriter, files: TokeniserFiles, rules: TokeniserRules, kind: str) -> None:
    if rules.space_prefix is not None and kind == "sentencepiece":
        writer.add_add_space_prefix(rules.space_prefix)
    if not rules.llama_sizes:
        return
    if files.vocab_size == CODE_LLAMA_SIZE:
        writer.add_eot_token_id(CODE_LLAMA_EOT)
    if files.vocab_size == STARCODER_SIZE:
        writer.add_add_bos_token(False)


def _values(writer: GGUFWriter) -> list[Value]:
    found = []
    for key, value in writer.kv_data[0].items():
        if key.startswith("tokenizer."):
            item = None
            if value.type == GGUFValueType.ARRAY:
                item = value.sub_type or GGUFValueType.get_type(value.value[0])
            found.append(Value(key, value.type, value.value, item))
    return found
