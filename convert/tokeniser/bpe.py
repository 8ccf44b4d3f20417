"""BPE vocabularies from tokenizer.json: over an alphabet of bytes (GPT-2's), or over characters, with bytes beside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from ...errors import UserError
from .files import AddedToken, TokeniserFiles
from .looks import looks_special
from .pre_tokeniser import find_pre_tokeniser
from .rules import TokeniserRules

SCORE = -1000.0
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def write_byte_level_bpe(writer: GGUFWriter, files: TokeniserFiles, rules: TokeniserRules) -> Sequence[str]:
    """Write the vocabulary; the merges, which `write_special` writes.

    Raises:
        UserError: tokens beyond the model's vocabulary, merges that are none, or a pre-tokeniser that llama.cpp lacks.
    """
    path = files.folder / "tokenizer.json"
    tokeniser = load(path)
    texts = {token: text for text, token in tokeniser.get_vocab(with_added_tokens=True).items()}
    _check_size(path, texts, files.vocab_size)
    added = {entry.id: entry for entry in (*files.configured, *files.added) if texts.get(entry.id) == entry.text}
    tokens, types = [], []
    for i in range(files.vocab_size):
        if i not in texts:
            text, kind = f"[PAD{i}]", TokenType.UNUSED
        elif i in added:
            text, kind = _added(added[i], tokeniser)
        else:
            text, kind = texts[i], TokenType.NORMAL
        tokens.append(text)
        types.append(int(kind))
    merges = _merges(path, files)
    pre = find_pre_tokeniser(path, files, tokeniser, tokens, types, merges)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    return merges


def write_byte_fallback_bpe(writer: GGUFWriter, files: TokeniserFiles) -> int:
    """Write the vocabulary as SentencePiece's; the number of tokens.

    Raises:
        UserError: tokens beyond the model's vocabulary.
    """
    path = files.folder / "tokenizer.json"
    tokeniser = load(path)
    base = tokeniser.get_vocab(with_added_tokens=False)
    texts = {token: text for text, token in tokeniser.get_vocab(with_added_tokens=True).items()}
    _check_size(path, texts, files.vocab_size)
    special = _special_words(files)
    n_base = len(base)
    tokens, types = [], []
    for i in sorted(texts):
        text = texts[i]
        if BYTE.fullmatch(text) and i < n_base:
            kind = TokenType.BYTE
        elif text in special:
            kind = TokenType.CONTROL
        else:
            kind = TokenType.NORMAL if i < n_base else TokenType.USER_DEFINED
        tokens.append(text)
        types.append(int(kind))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([SCORE] * len(tokens))
    writer.add_token_types(types)
    return len(tokens)


def load(path: Path) -> Any:
    """The tokeniser itself, by the library that tokenizer.json is of.

    Raises:
        UserError: it cannot read it.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokeniser: {' '.join(str(error).split())[:160]}") from None


def _check_size(path: Path, texts: dict[int, str], rows: int) -> None:
    if not texts:
        raise UserError(f"{path}: model.vocab: no tokens")
    last = max(texts)
    if last >= rows:
        raise UserError(
            f"{path}: token {texts[last]!r:.40} has number {last:,}, expected less than vocab_size, {rows:,}"
        )


def _added(entry: AddedToken, tokeniser: Any) -> tuple[str, TokenType]:
    """llama.cpp looks for added tokens in the text as it is: what normalising would change is changed here."""
    text = entry.text
    if not entry.normalized:
        text = tokeniser.decode(tokeniser.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    if entry.special or looks_special(text):
        return text, TokenType.CONTROL
    return text.replace("▁", " "), TokenType.USER_DEFINED


def _special_words(files: TokeniserFiles) -> set[str]:
    """Tokens that the configuration names: the first, the last, the unknown one and so on."""
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    entries = [files.config.get(f"{name}_token") for name in names]
    more = files.config.get("additional_special_tokens") or files.config.get("extra_special_tokens")
    entries += more if isinstance(more, list) else []
    words = {entry.get("content") if isinstance(entry, dict) else entry for entry in entries}
    return {word for word in words if isinstance(word, str)}


def _merges(path: Path, files: TokeniserFiles) -> list[str]:
    """Pairs as "left right"; a space within one of them as GPT-2's alphabet has it, Ġ."""
    assert files.bpe is not None
    merges = files.bpe["model"].get("merges")
    if not isinstance(merges, list):
        raise UserError(f"{path}: model.merges: {type(merges).__name__}, expected a list")
    found = []
    for i, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise UserError(f"{path}: model.merges.{i}: {merge!r:.60}, expected two tokens")
        found.append(" ".join(part.replace(" ", "Ġ") for part in pair))
    return found
