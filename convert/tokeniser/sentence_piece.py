"""SentencePiece vocabularies: pieces with their scores and types, and the tokens that were added to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from ...errors import UserError
from ..json_file import read_json
from .files import AddedToken, TokeniserFiles
from .looks import looks_special
from .rules import TokeniserRules
from .trial import SAMPLE, Vocabulary, differing_texts, trial_notes

UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0
SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL)
MAX_MODEL_BYTES = 256 << 20


def write_sentencepiece(
    writer: GGUFWriter, files: TokeniserFiles, rules: TokeniserRules, space_prefix: bool | None
) -> tuple[Vocabulary, tuple[str, ...]]:
    """Write the vocabulary of tokenizer.model; return it, and notes for the user.

    Args:
        space_prefix: whether a space will be added before a text, if that is written.

    Raises:
        UserError: sentencepiece cannot read it, or an added token is invalid.
    """
    model = load_model(files.folder / "tokenizer.model")
    tokens, scores, types = _pieces(model, files.vocab_size)

    def put(token: int, text: str, kind: TokenType) -> None:
        if token < len(tokens):  # tokens beyond the model's rows are left out
            tokens[token], scores[token], types[token] = text, ADDED_SCORE, kind

    for token, text in _added_json(files):
        put(token, text, TokenType.USER_DEFINED)
    # Of a tokenizer.json that cannot be used otherwise, only tokens after the model's own are certain to be for it.
    added = tuple(entry for entry in files.added if files.broken is None or entry.id >= model.vocab_size())
    entries = (*files.configured, *added) if rules.literal_added else (*added, *files.configured)
    configured = {entry.id for entry in files.configured}
    for entry in entries:
        kept = entry.id < len(tokens) and tokens[entry.id] == entry.text and types[entry.id] in SPECIAL
        if rules.literal_added or entry.id in configured or not kept:  # the model knows <unk> and <s> as they are
            put(entry.id, *_added(entry, rules))
    vocabulary = Vocabulary(files.folder / "tokenizer.model", "llama", tokens, types, scores)
    vocabulary.check_distinct()
    vocabulary.write(writer, "default")
    differing = differing_texts(vocabulary, "default", SAMPLE, model.encode(list(SAMPLE)), space_prefix)
    return vocabulary, trial_notes(vocabulary, "llama.cpp", differing)


def load_model(path: Path) -> Any:
    """Load tokenizer.model with the `sentencepiece` library.

    Raises:
        UserError: the library cannot read it.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, expected at most {MAX_MODEL_BYTES:,}")
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(path.read_bytes())
        for i in range(model.vocab_size()):
            model.IdToPiece(i)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except RuntimeError:
        raise UserError(f"{path}: not a SentencePiece model") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: a piece is not UTF-8 text") from None
    return model


def _pieces(model: Any, rows: int) -> tuple[list[str], list[float], list[int]]:
    n = model.vocab_size()
    tokens = [f"[PAD{i}]" for i in range(rows)]
    scores, types = [UNUSED_SCORE] * rows, [int(TokenType.UNUSED)] * rows
    for i in range(min(n, rows)):
        tokens[i], scores[i] = model.IdToPiece(i), model.GetScore(i)
        types[i] = int(
            TokenType.UNKNOWN
            if model.IsUnknown(i)
            else TokenType.CONTROL
            if model.IsControl(i)
            else TokenType.UNUSED
            if model.IsUnused(i)
            else TokenType.BYTE
            if model.IsByte(i)
            else TokenType.NORMAL
        )
    return tokens, scores, types


def _added_json(files: TokeniserFiles) -> list[tuple[int, str]]:
    path = files.folder / "added_tokens.json"
    if not path.is_file():
        return []
    added = read_json(path)
    for text, token in added.items():
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise UserError(f"{path}: {text!r:.40}: {token!r:.30}, expected a number from 0")
    return [(token, text) for text, token in added.items()]


def _added(entry: AddedToken, rules: TokeniserRules) -> tuple[str, TokenType]:
    if entry.special or (not rules.literal_added and looks_special(entry.text)):
        return entry.text, TokenType.CONTROL
    # llama.cpp looks for these in the original text, before spaces become "▁".
    return entry.text if rules.literal_added else entry.text.replace("▁", " "), TokenType.USER_DEFINED
