"""A tokeniser's files, read once and checked for everything that the other modules rely on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..json_file import read_json

MAX_TOKENS = 1 << 24


@dataclass(frozen=True)
class AddedToken:
    """A token that was added to a vocabulary; `normalized` ones are matched in normalised text."""

    id: int
    text: str
    special: bool
    normalized: bool


@dataclass(frozen=True)
class TokeniserFiles:
    """The tokeniser's files in a checkpoint's folder.

    Attributes:
        bpe: tokenizer.json, or None if there is none that can be used.
        broken: why tokenizer.json cannot be used, if there is one.
        config: tokenizer_config.json, or empty.
        model_config: config.json's values.
        generation: generation_config.json, or empty if there is none that can be read.
        vocab_size: the model's, to which the vocabulary is padded.
        added: tokens that tokenizer.json adds.
        configured: tokens in tokenizer_config.json's `added_tokens_decoder`.
    """

    folder: Path
    bpe: Mapping[str, Any] | None
    config: Mapping[str, Any]
    model_config: Mapping[str, Any]
    vocab_size: int
    added: tuple[AddedToken, ...]
    configured: tuple[AddedToken, ...]
    generation: Mapping[str, Any] = field(default_factory=dict)
    broken: UserError | None = None

    @property
    def is_byte_fallback(self) -> bool:
        """Whether this is a SentencePiece vocabulary as BPE, with byte tokens for text that no other token covers."""
        if self.bpe is None:
            return False
        model, decoder = self.bpe["model"], self.bpe.get("decoder")
        return bool(
            model.get("type") == "BPE"
            and model.get("byte_fallback")
            and isinstance(decoder, dict)
            and decoder.get("type") == "Sequence"
        )


def open_tokeniser(folder: Path, model_config: Mapping[str, Any]) -> TokeniserFiles:
    """Read and check the tokeniser's files; a broken tokenizer.json is only reported, as there may be another.

    Raises:
        UserError: tokenizer_config.json is broken, or a token's id in it is out of range.
    """
    size = model_config.get("vocab_size")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= MAX_TOKENS:
        raise UserError(f"{folder / 'config.json'}: vocab_size: {size!r:.40}, expected a number up to {MAX_TOKENS:,}")
    json_file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    bpe, added, broken = _tokenizer_json(json_file) if json_file.is_file() else (None, (), None)
    config = read_json(config_file) if config_file.is_file() else {}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"{config_file}: added_tokens_decoder: {type(decoder).__name__}, expected a map")
    return TokeniserFiles(
        folder=folder,
        bpe=bpe,
        config=config,
        model_config=model_config,
        vocab_size=size,
        added=added,
        configured=tuple(_token(config_file, entry, key) for key, entry in decoder.items()),
        generation=_generation(folder / "generation_config.json"),
        broken=broken,
    )


def _generation(path: Path) -> Mapping[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}  # noted where the settings for sampling are read from it


def _tokenizer_json(
    path: Path,
) -> tuple[dict[str, Any] | None, tuple[AddedToken, ...], UserError | None]:
    """Its contents, its added tokens (a vocabulary of another kind has some, too), and why it cannot be used."""
    added: tuple[AddedToken, ...] = ()
    try:
        data = read_json(path)
        model = data.get("model")
        if not isinstance(model, dict):
            raise UserError(f"{path}: model: missing, expected the tokeniser's vocabulary")
        entries = data.get("added_tokens") or []
        if not isinstance(entries, list):
            raise UserError(f"{path}: added_tokens: {type(entries).__name__}, expected a list")
        added = tuple(_token(path, entry, None) for entry in entries)
        kind = model.get("type", "BPE")
        if kind != "BPE":
            raise UserError(
                f"{path}: model.type: {kind!r:.40}, expected 'BPE', the only supported kind of tokenizer.json"
            )
        vocab = model.get("vocab")
        if not isinstance(vocab, dict) or not all(isinstance(i, int) and 0 <= i < MAX_TOKENS for i in vocab.values()):
            raise UserError(f"{path}: model.vocab: expected a map of tokens to ids from 0")
    except UserError as error:
        return None, added, error
    return data, added, None


def _token(path: Path, entry: Any, key: str | None) -> AddedToken:
    """Check one entry; its id is its `key` in the file or, without a key, in the entry."""
    where = f"{path}: added token {key or ''}".rstrip()
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise UserError(f"{where}: {entry!r:.60}, expected a map with the token as `content`")
    token = entry.get("id") if key is None else int(key) if key.isdecimal() and len(key) < 10 else None
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < MAX_TOKENS:
        found = entry.get("id") if key is None else key
        raise UserError(f"{path}: added token {entry['content']!r:.40}: id {found!r:.30}, expected a number from 0")
    return AddedToken(token, entry["content"], bool(entry.get("special")), bool(entry.get("normalized", True)))
