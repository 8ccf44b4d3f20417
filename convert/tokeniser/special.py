"""Special tokens (BOS, EOS and so on), and whether a tokeniser adds them to a text itself.

The rules are those of llama.cpp's converter: tokenizer.json's post-processor first, then tokenizer_config.json, then
the ids in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from .files import TokeniserFiles
from .trial import Vocabulary, ending_tokens

NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass
class _Found:
    """What has been found so far: whether to add a token, by name, and the tokens' texts, by name."""

    adds: dict[str, bool] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = NAMES


def write_special(writer: GGUFWriter, files: TokeniserFiles, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Write the merges, the ids of special tokens, and whether they are added; return notes for the user."""
    found = _Found(texts={name: text for name in NAMES if (text := _text(files.config.get(f"{name}_token")))})
    if files.bpe is not None:
        _post_process(files.bpe.get("post_processor"), found, has_config=bool(files.config))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    ids, notes = _ids(files, found, len(vocabulary.tokens))
    notes += _add_ends(files, vocabulary, ids)
    for name, token in ids.items():
        if hasattr(writer, f"add_{name}_token_id"):  # GGUF has none for CLS
            getattr(writer, f"add_{name}_token_id")(token)
    for name, add in _flags(files, found).items():
        if hasattr(writer, f"add_add_{name}_token"):
            getattr(writer, f"add_add_{name}_token")(add)
    if files.bpe is not None:
        for key, value in _normaliser(files.bpe.get("normalizer")).items():
            writer.add_bool(f"tokenizer.ggml.normalizer.{key}", value)
    return tuple(notes)


def _text(entry: Any) -> str | None:
    """A token's text, from either of the forms that it has in tokenizer_config.json."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) else None


def _ids(files: TokeniserFiles, found: _Found, n_tokens: int) -> tuple[dict[str, int], list[str]]:
    """The ids of special tokens by name, and notes on ids in config.json that no token has."""
    ids: dict[str, int] = {}
    notes: list[str] = []

    def put(name: str, token: Any) -> None:
        if isinstance(token, bool) or not isinstance(token, int) or name in ids:
            return
        if 0 <= token < n_tokens:
            ids[name] = token
        else:
            notes.append(f"{name}_token_id {token}: not one of the {n_tokens:,} tokens, and ignored")

    if files.config:
        for name in found.names:
            if name in found.texts:
                put(name, next((entry.id for entry in files.added if entry.text == found.texts[name]), None))
    for name in found.names:
        given = files.model_config.get(f"{name}_token_id")
        for token in given if isinstance(given, list) else [given]:
            put(name, token)
    return ids, notes


def _add_ends(files: TokeniserFiles, vocabulary: Vocabulary, ids: dict[str, int]) -> list[str]:
    """Add ids of more tokens that end a generation, as EOT and EOM; return a note if there are too many.

    config.json and generation_config.json may list several EOS tokens. llama.cpp has one, but ends a generation at
    these two as well, and at tokens with some well-known texts.
    """
    given: list[Any] = []
    for settings in (files.model_config, files.generation):
        value = settings.get("eos_token_id")
        given += value if isinstance(value, list) else [value]
    tokens = [token for token in given if isinstance(token, int) and not isinstance(token, bool)]
    more = [
        token
        for token in dict.fromkeys(tokens)
        if token not in {ids.get(name) for name in ("eos", "eot", "eom", "unk")}
        and 0 <= token < len(vocabulary.tokens)
        and vocabulary.types[token] not in (TokenType.UNKNOWN, TokenType.UNUSED)
    ]
    known = ending_tokens(vocabulary, more) if more else ()
    more = [token for token in more if token not in known]
    for name in ("eot", "eom"):
        if more and name not in ids:
            ids[name] = more.pop(0)
    if not more:
        return []
    names = ", ".join(repr(vocabulary.tokens[token])[:40] for token in more)
    return [f"eos_token_id: llama.cpp has no more keys for tokens that end a generation; {names} will not"]


def _flags(files: TokeniserFiles, found: _Found) -> dict[str, bool]:
    flags = dict(found.adds)
    for name in found.names:
        given = files.config.get(f"add_{name}_token")
        if isinstance(given, bool):
            flags.setdefault(name, given)
    return flags


def _post_process(processor: Any, found: _Found, has_config: bool) -> None:
    if not isinstance(processor, Mapping):
        return
    texts = found.texts
    texts.update(
        {name: texts[other] for name, other in (("bos", "cls"), ("eos", "sep")) if name not in texts and other in texts}
    )
    listed = processor.get("processors")
    for step in listed if isinstance(listed, list) else [processor]:
        if not isinstance(step, Mapping):
            continue
        if step.get("type") == "ByteLevel":
            found.adds.setdefault("bos", False)
            found.adds.setdefault("eos", False)
        elif step.get("type") == "RobertaProcessing":
            found.adds.update(bos=True, eos=True, sep=True)
            for name in ("cls", "sep"):
                pair = step.get(name)
                if has_config and name not in texts and isinstance(pair, list) and pair and isinstance(pair[0], str):
                    texts[name] = pair[0]
        elif step.get("type") == "TemplateProcessing":
            _template(step, found, has_config)


def _template(step: Mapping[str, Any], found: _Found, has_config: bool) -> None:
    """Record what a template adds before and after a text, and between two."""
    single, pair, texts = _items(step.get("single")), _items(step.get("pair")), found.texts
    first = last = None
    if len(single) > 1:
        first, last = _special(single[0]), _special(single[-1])
    if first:
        if not has_config:
            texts["bos"] = first
        elif first not in (texts.get("bos"), texts.get("cls")):
            texts.setdefault("bos", first)
            texts.setdefault("cls", first)
        found.adds["bos"] = first in (texts.get("bos"), texts.get("cls"))
    if last:
        if has_config and last != texts.get("eos"):
            # The configured EOS then ends a turn.
            other = next((name for name in ("eot", "eom") if name not in found.names), None)
            if other:
                found.names = (*found.names, other)
                if "eos" in texts:
                    texts[other] = texts["eos"]
        texts["eos"] = last
        found.adds["eos"] = True
    inner = pair[1 if first and pair and _special(pair[0]) == first else 0 :]
    inner = inner[:-1] if last and inner and _special(inner[-1]) == last else inner
    if inner and _sequence(inner[0]) == "A" and _sequence(inner[-1]) == "B" and inner[1:-1]:
        between, ends = inner[1:-1], (texts.get("sep"), texts.get("eos"))
        add = bool(_special(between[0]) in ends and _special(between[0]) and not last)
        if len(between) == 2 and _special(between[1]) and _special(between[1]) in ends:
            add = True
        found.adds["sep"] = add
        if add and "sep" not in texts and has_config and "eos" in texts:
            texts["sep"] = texts["eos"]


def _items(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _special(item: Mapping[str, Any]) -> str | None:
    inner = item.get("SpecialToken")
    return inner.get("id") if isinstance(inner, Mapping) else None


def _sequence(item: Mapping[str, Any]) -> str | None:
    inner = item.get("Sequence")
    return inner.get("id") if isinstance(inner, Mapping) else None


def _normaliser(normaliser: Any) -> dict[str, bool]:
    """Whether text is lower-cased, or stripped of its accents, before it is looked up."""
    if not isinstance(normaliser, Mapping):
        return {}
    kind, found = normaliser.get("type"), {}
    if kind == "Lowercase":
        found["lowercase"] = True
    elif kind == "StripAccents":
        found["strip_accents"] = True
    elif kind == "BertNormalizer":
        found = {
            name: normaliser[name] for name in ("lowercase", "strip_accents") if isinstance(normaliser.get(name), bool)
        }
    elif kind == "Sequence" and isinstance(normaliser.get("normalizers"), list):
        for step in normaliser["normalizers"]:
            found |= _normaliser(step)
    return found
