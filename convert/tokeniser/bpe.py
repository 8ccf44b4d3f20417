"""BPE vocabularies from tokenizer.json: byte-level (GPT-2's alphabet), or over characters with byte fallback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from ...errors import UserError
from .files import AddedToken, TokeniserFiles
from .looks import looks_special
from .pre_tokeniser import encoded, find_pre_tokeniser
from .trial import SAMPLE, Vocabulary, differing_texts, note, trial_notes

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def write_byte_level_bpe(writer: GGUFWriter, files: TokeniserFiles) -> tuple[Vocabulary, tuple[str, ...]]:
    """Write the vocabulary, except its merges, which `write_special` writes; return it, and notes for the user.

    Raises:
        UserError: there are tokens beyond the model's vocabulary or invalid merges, or llama.cpp lacks the
            pre-tokeniser.
    """
    path = files.folder / "tokenizer.json"
    tokeniser = load(path)
    texts, notes = _texts(path, files, tokeniser)
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
    vocabulary = Vocabulary(path, "gpt2", tokens, types, merges=merges)
    vocabulary.check_distinct()
    pre = find_pre_tokeniser(files, tokeniser, vocabulary)
    vocabulary.write(writer, pre.name)
    return vocabulary, (*notes, *note(f"llama.cpp's pre-tokeniser {pre.name}", pre.differing))


def write_byte_fallback_bpe(
    writer: GGUFWriter, files: TokeniserFiles, space_prefix: bool | None
) -> tuple[Vocabulary, tuple[str, ...]]:
    """Write the vocabulary as a SentencePiece one; return it, and notes for the user.

    llama.cpp first merges the pair with the highest score, so a token's score is the negative rank of its merge.
    (llama.cpp's own converter gives all tokens the same score, so that half of all lines get other tokens than with the
    original tokeniser.)

    Args:
        space_prefix: whether a space is added before a text, if that has been written already.

    Raises:
        UserError: there are tokens beyond the model's vocabulary, or invalid merges.
    """
    path = files.folder / "tokenizer.json"
    tokeniser = load(path)
    base = tokeniser.get_vocab(with_added_tokens=False)
    texts, notes = _texts(path, files, tokeniser)
    added = {entry.text: entry for entry in (*files.configured, *files.added)}
    special = _special_tokens(files) | {e.text for e in added.values() if e.special or looks_special(e.text)}
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(path, files)):
        ranks.setdefault(left + right, rank)
    tokens, scores, types = [], [], []
    for i in range(files.vocab_size):
        text = texts.get(i, f"[PAD{i}]")
        if i not in texts:
            kind = TokenType.UNUSED
        elif BYTE.fullmatch(text) and text in base:
            kind = TokenType.BYTE
        elif text in special:
            kind = TokenType.CONTROL
        elif text in base and (text not in added or "▁" in text):
            kind = TokenType.NORMAL  # merges lead to added ones with "▁", which is not in the original text
        else:
            kind = TokenType.USER_DEFINED
        tokens.append(text)
        scores.append(float(-ranks.get(text, len(ranks))))
        types.append(int(kind))
    vocabulary = Vocabulary(path, "llama", tokens, types, scores)
    vocabulary.check_distinct()
    vocabulary.write(writer, "default")
    sample = encoded(tokeniser, SAMPLE)
    differing = differing_texts(vocabulary, "default", *sample, space_prefix)
    if differing and space_prefix is None:
        without = differing_texts(vocabulary, "default", *sample, False)
        if len(without) < len(differing):
            writer.add_add_space_prefix(False)
            differing = without
    return vocabulary, (*notes, *trial_notes(vocabulary, "llama.cpp", differing))


def load(path: Path) -> Any:
    """Load the tokeniser with the `tokenizers` library, whose format tokenizer.json is.

    Raises:
        UserError: the library cannot read it.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokeniser: {' '.join(str(error).split())[:160]}") from None


def _texts(path: Path, files: TokeniserFiles, tokeniser: Any) -> tuple[dict[int, str], tuple[str, ...]]:
    """The tokens' texts by id, and a note if there are added ones beyond the model's rows, which are left out."""
    texts = {token: text for text, token in tokeniser.get_vocab(with_added_tokens=True).items()}
    base, rows = tokeniser.get_vocab(with_added_tokens=False), files.vocab_size
    if not texts:
        raise UserError(f"{path}: model.vocab: no tokens")
    last = max(base.values(), default=0)
    if last >= rows:
        raise UserError(f"{path}: token {texts[last]!r:.40} has id {last:,}, expected less than vocab_size, {rows:,}")
    beyond = [text for token, text in texts.items() if token >= rows]
    kept = {token: text for token, text in texts.items() if token < rows}
    if not beyond:
        return kept, ()
    return kept, (f"tokeniser: {len(beyond)} added tokens beyond vocab_size are left out, e.g. {beyond[0]!r:.40}",)


def _added(entry: AddedToken, tokeniser: Any) -> tuple[str, TokenType]:
    """An added token's text and type; the text is normalised here, as llama.cpp looks for it in unnormalised text."""
    text = entry.text
    if not entry.normalized:
        text = tokeniser.decode(tokeniser.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    if entry.special or looks_special(text):
        return text, TokenType.CONTROL
    return text.replace("▁", " "), TokenType.USER_DEFINED


def _special_tokens(files: TokeniserFiles) -> set[str]:
    """Texts of the tokens that the configuration names: BOS, EOS, UNK and so on."""
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    entries = [files.config.get(f"{name}_token") for name in names]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = files.config.get(key)
        entries += more if isinstance(more, list) else more.values() if isinstance(more, dict) else ()
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return {text for text in texts if isinstance(text, str)}


def _merges(path: Path, files: TokeniserFiles) -> list[str]:
    """Pairs as "left right"; a space within a token is written as Ġ, as in GPT-2's alphabet."""
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _pairs(path, files)]


def _pairs(path: Path, files: TokeniserFiles) -> Iterator[tuple[str, str]]:
    assert files.bpe is not None
    merges = files.bpe["model"].get("merges")
    if not isinstance(merges, list):
        raise UserError(f"{path}: model.merges: {type(merges).__name__}, expected a list")
    for i, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise UserError(f"{path}: model.merges.{i}: {merge!r:.60}, expected two tokens")
        yield pair[0], pair[1]
