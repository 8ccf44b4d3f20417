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
from .sentence_piece import load_model, write_sentencepiece
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

MAX_OTHER_PIECES = 0.01
"""Share of tokens that may differ between tokenizer.model and tokenizer.json, as some models rename spare ones."""

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
    kind, kind_notes = _kind(files, rules)
    space_prefix = files.config.get("add_prefix_space")
    space_prefix = space_prefix if rules.reads_space_prefix and isinstance(space_prefix, bool) else None
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)
    if kind == "sentencepiece":
        prefix = space_prefix if rules.space_prefix is None else rules.space_prefix
        vocabulary, notes = write_sentencepiece(writer, files, rules, prefix)
    elif kind == "byte-fallback":
        vocabulary, notes = write_byte_fallback_bpe(writer, files, space_prefix)
    else:
        vocabulary, notes = write_byte_level_bpe(writer, files)
    special_notes = write_special(writer, files, vocabulary)
    write_template(writer, files)
    _write_extras(writer, files, rules, kind)
    return tuple(_values(writer)), (*kind_notes, *notes, *special_notes)


def _kind(files: TokeniserFiles, rules: TokeniserRules) -> tuple[str, tuple[str, ...]]:
    """The kind of tokeniser that is there, and a note if a file of another kind cannot be used.

    tokenizer.model comes first: llama.cpp's own form is nearest to it.

    Raises:
        UserError: there is none, or none that can be used.
    """
    model_file = files.folder / "tokenizer.model"
    in_json = None if files.bpe is None else "byte-fallback" if files.is_byte_fallback else "byte-level"
    unusable = _unusable(model_file, files) if model_file.is_file() else None
    in_model = "sentencepiece" if model_file.is_file() and unusable is None else None
    broken = [str(error) for error in (unusable, files.broken) if error is not None]
    configured = rules.byte_level_class and files.config.get("tokenizer_class") == rules.byte_level_class
    kind = (in_json or in_model) if configured else (in_model or in_json)
    if kind is not None:
        used = "tokenizer.model" if kind == "sentencepiece" else "tokenizer.json"
        return kind, tuple(f"{message}; {used} is used" for message in broken)
    if broken:
        raise unusable or files.broken or AssertionError(broken)
    wanted = "tokenizer.model or tokenizer.json"
    if (files.folder / "tekken.json").is_file():
        raise UserError(
            f"{files.folder}: has only tekken.json, expected {wanted} (Mistral's models also come with one)"
        )
    raise UserError(f"{files.folder}: no tokeniser, expected {wanted}")


def _unusable(path: Path, files: TokeniserFiles) -> UserError | None:
    """Why a tokenizer.model cannot be used: it is of another kind, or its pieces are not those of tokenizer.json."""
    try:
        model = load_model(path)
    except UserError as error:
        return error
    if files.bpe is None:
        return None
    texts = {token: text for text, token in files.bpe["model"]["vocab"].items()}
    texts |= {entry.id: entry.text for entry in files.added}
    added = {entry.id for entry in files.added}
    pieces = range(min(model.vocab_size(), files.vocab_size))
    other = sum(i not in added and texts.get(i) != model.IdToPiece(i) for i in pieces)
    if other <= len(pieces) * MAX_OTHER_PIECES:
        return None
    return UserError(f"{path}: {other:,} of {len(pieces):,} tokens are not those of tokenizer.json")


def _write_extras(writer: GGUFWriter, files: TokeniserFiles, rules: TokeniserRules, kind: str) -> None:
    if rules.space_prefix is not None and kind == "sentencepiece":
        writer.add_add_space_prefix(rules.space_prefix)
    if not rules.llama_sizes:
        return
    if files.vocab_size == CODE_LLAMA_SIZE and "tokenizer.ggml.eot_token_id" not in writer.kv_data[0]:
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
