"""Find llama.cpp's pre-tokeniser that splits text as a tokenizer.json does: by its definition, checked on a sample.

llama.cpp knows pre-tokenisers by name (llama-vocab.cpp), and many names stand for models that split alike. The
definition in tokenizer.json is brought to a plain form and looked up; of its names, the one that gives the same tokens
on a sample is used. A definition that is not in the table may still split as one of the names does: all are tried, on
a longer sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from .files import TokeniserFiles
from .trial import SAMPLE, Vocabulary, differing_texts

GPT2 = "GPT-2"
"""Stands for the regular expression that is built into ByteLevel."""

_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}?"
    rf"|\p{{N}}{{1,3}}|{_CASED}"
)
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED}"
SEED = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_MIXED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NAMES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    (GPT2,): ("gpt-2",),
    ("digits", GPT2): ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    (LLAMA3,): ("llama-bpe", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"),
    (QWEN2,): ("qwen2", "stablelm2", "hunyuan", "grok-2"),
    (QWEN35,): ("qwen35",),
    (GPT4O,): ("gpt-4o",),
    (TEKKEN,): ("tekken",),
    (SEED,): ("seed-coder",),
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _MIXED): ("deepseek-v3", "hunyuan-dense"),
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "digits"): ("deepseek-coder",),
    (r" ?[^(\s|[.,!?…。，、।۔،])]+",): ("bloom", "poro-chat"),
    (r" ?[^(\s|[.,!?…。，、।۔،])]+", "digits"): ("viking",),
}
"""llama.cpp's names by definition: regular expressions in order, ``digits`` for one digit per piece."""

OTHERS = (
    *("gpt-2", "smollm", "llama-bpe", "llama3", "qwen2", "qwen35", "gpt-4o", "tekken", "seed-coder", "deepseek-llm"),
    *("deepseek-coder", "deepseek-v3", "falcon", "bloom", "viking", "superbpe", "bailingmoe", "exaone-moe", "youtu"),
    *("kimi-k2", "afmoe", "minicpm5", "tiny_aya", "chameleon", "jais-2", "granite-embed-multi-97m", "spark2_5"),
    *("ufakzeka", "laguna", "default"),
)
"""One name for each way of splitting text that llama.cpp has."""

IGNORING_MERGES = frozenset({"llama-bpe", "llama3", "glm4", "tekken", "youtu", "minicpm5", "granite-embed-multi-97m"})
"""With these, a piece that is itself a token becomes that token, whatever the merges say."""


@dataclass(frozen=True)
class PreTokeniser:
    """A name for ``tokenizer.ggml.pre``, and the sample texts that llama.cpp tokenises differently with it."""

    name: str
    differing: tuple[str, ...] = ()


def find_pre_tokeniser(files: TokeniserFiles, tokeniser: Any, vocabulary: Vocabulary) -> PreTokeniser:
    """Return llama.cpp's name for a definition.

    Even for a definition that it knows, llama.cpp may split text differently here and there, as its regular expressions
    are simpler (GPT-4o's and Tekken's outside ASCII). Such a name is accepted if it agrees on ASCII text; others only
    if they agree everywhere.

    Raises:
        UserError: llama.cpp has no pre-tokeniser that splits alike.
    """
    assert files.bpe is not None
    definition = tuple(plain_form(files.bpe.get("pre_tokenizer")))
    ignores = bool(files.bpe["model"].get("ignore_merges"))

    def likeliest_first(names: Sequence[str]) -> list[str]:
        return sorted(names, key=lambda name: (name in IGNORING_MERGES) != ignores)

    best: PreTokeniser | None = None
    for name in likeliest_first(NAMES.get(definition, ())):
        tried = PreTokeniser(name, differing_texts(vocabulary, name, *encoded(tokeniser, SAMPLE)))
        if best is None or len(tried.differing) < len(best.differing):
            best = tried
        if not best.differing:
            break
    if best and not any(text.isascii() for text in best.differing):
        return best
    longer = encoded(tokeniser, (*SAMPLE, *_variations()))
    for name in likeliest_first(OTHERS):
        if not differing_texts(vocabulary, name, *longer):
            return PreTokeniser(name)
    raise UserError(
        f"{vocabulary.path}: pre_tokenizer: {list(definition)!r:.120}: llama.cpp has none that splits text alike"
    )


def encoded(tokeniser: Any, texts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Return the texts, normalised if the tokeniser would do that first (llama.cpp would not), and their tokens."""
    normalised = [_normalised(tokeniser, text) for text in texts]
    return normalised, [tokeniser.encode(text, add_special_tokens=False).ids for text in normalised]


def _normalised(tokeniser: Any, text: str) -> str:
    if tokeniser.normalizer is None:
        return text
    once = str(tokeniser.normalizer.normalize_str(text))
    return once if tokeniser.normalizer.normalize_str(once) == once else text


def plain_form(step: Any) -> Iterator[str]:
    """Yield the regular expressions that a definition applies, one after the other."""
    if not isinstance(step, Mapping):
        return
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "Sequence":
        for inner in step.get("pretokenizers") or ():
            yield from plain_form(inner)
    elif kind == "ByteLevel":
        if step.get("use_regex", True):
            yield GPT2
    elif kind == "Digits":
        yield "digits" if step.get("individual_digits") else r"\p{N}+"
    elif kind == "Split" and isinstance(pattern, Mapping):
        expression = pattern.get("Regex", pattern.get("String"))
        yield "digits" if expression in (r"\p{N}", r"\d") else str(expression)
    else:
        yield str(kind)


def _variations() -> Iterator[str]:
    """The sample texts in upper case, with other spacing, and with words and numbers run together."""
    for text in SAMPLE:
        yield text.upper()
        yield text.replace(" ", "")
        yield text.replace(" ", "  ")
        yield "".join(f"{word}{i * 37}" for i, word in enumerate(text.split()))
        yield "\n".join(text.split())
