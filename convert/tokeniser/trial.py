"""Try a vocabulary in llama.cpp: how it tokenises sample texts, before the file itself is written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from ...container.alphabet import BYTES, Alphabet, alphabet
from ...errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """Tokens with their types, and scores or merges; `path` is the file that they come from."""

    path: Path
    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()

    @cached_property
    def alphabet(self) -> Alphabet | None:
        """What a SentencePiece vocabulary can spell; None if that is every text."""
        return alphabet(self.tokens, self.types) if self.model == "llama" else None

    def check_distinct(self) -> None:
        """Refuse two tokens with the same text, on which llama.cpp aborts.

        Raises:
            UserError: there are two.
        """
        if len(set(self.tokens)) == len(self.tokens):
            return
        first: dict[str, int] = {}
        for i, text in enumerate(self.tokens):
            if first.setdefault(text, i) != i:
                raise UserError(
                    f"{self.path}: tokens {first[text]:,} and {i:,} are both {text!r:.40}, expected different ones"
                )

    def write(self, writer: GGUFWriter, pre: str) -> None:
        """Write all but the merges, which come later in files from llama.cpp's converter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(list(self.tokens))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.types))


SAMPLE = (
    "Hello, world! It's what they've said: I'll, you're, he'd, DON'T and I'M; 'quoted' 'til dawn.",
    "def f(x, *args):\n    return {k: v for k, v in x.items() if v is not None}  # a comment\n\n\n",
    "for (int i = 0; i < 10'000; ++i) { a[i] += b->c; }\t\t// tabs\r\n\r\nnext",
    "1 22 333 4444 55555 666666 7777777 3.14159 1,000,000 0xFF 1e-10 ١٢٣ ४५६",
    "  two spaces,   three,    four\n \n  \n   \n\t\n",
    "Größe, façade, naïve, Øre, Ünïcödé; straße",
    "Привет, мир! Как дела? Всё хорошо.",
    "你好，世界！今天天气很好。日本語のテキスト、カタカナ。 한국어 문장입니다.",
    "مرحبا بالعالم، كيف الحال؟ שלום עולם",
    "नमस्ते दुनिया। สวัสดีชาวโลก កាន់តែពិសេស",
    "🚀 emoji 😶\u200d🌫️ 👩\u200d👩\u200d👧 ✅ 🦙🦙 end",
    "CamelCaseWords snake_case_words kebab-case-words SCREAMING_CASE iPhone McDonald's O'Neill's",
    "a!b@c#d$e%f^g&h*i(j)k-l_m=n+o[p]q{r}s|t\\u;v:w'x\"y<z>,.?/~`",
    '------======= !!!!!!?????? ...... ``````` """""""',
    "\u00a0nbsp\u2003em\u200bzero\ufeffbom e\u0301 n\u0303",
)


def differing_texts(
    vocabulary: Vocabulary,
    pre: str,
    texts: Sequence[str],
    wanted: Sequence[list[int]],
    space_prefix: bool | None = None,
) -> tuple[str, ...]:
    """The texts for which llama.cpp's tokens differ from `wanted`, the original tokeniser's."""
    found = tokens_of(vocabulary, pre, texts, space_prefix)
    return tuple(text for text, a, b in zip(texts, found, wanted, strict=True) if a != b)


def trial_notes(vocabulary: Vocabulary, who: str, differing: Sequence[str]) -> tuple[str, ...]:
    """A note on bytes that no token stands for, and one on the samples that differ."""
    return (*_missing(vocabulary.alphabet), *note(who, differing))


def _missing(found: Alphabet | None) -> tuple[str, ...]:
    if found is None:
        return ()
    n, first = len(found.missing), BYTES[min(found.missing)]
    return (f"tokeniser: {n} of 256 bytes have no token, e.g. {first}: llama.cpp aborts at texts that need one",)


def note(who: str, differing: Sequence[str]) -> tuple[str, ...]:
    """A note on the samples that differ, if there are any."""
    if not differing:
        return ()
    n, first = len(differing), differing[0].strip()[:20]
    return (f"tokeniser: {who} tokenises {n} of {len(SAMPLE)} samples differently from the original, e.g. {first!r}",)


def tokens_of(
    vocabulary: Vocabulary, pre: str, texts: Sequence[str], space_prefix: bool | None = None
) -> list[list[int] | None]:
    """Tokenise texts with llama.cpp; None for one that the vocabulary cannot spell.

    Args:
        pre: the pre-tokeniser's name.
        space_prefix: whether a space is added before a text; None for llama.cpp's default.

    Raises:
        UserError: llama.cpp does not accept the vocabulary.
    """
    spells = vocabulary.alphabet
    with _loaded(vocabulary, pre, space_prefix) as vocab:
        return [None if spells and spells.lacks(text.encode()) else _tokens(vocab, text.encode()) for text in texts]


def ending_tokens(vocabulary: Vocabulary, tokens: Sequence[int]) -> set[int]:
    """Those of `tokens` at which llama.cpp ends a generation because of their texts.

    Raises:
        UserError: llama.cpp does not accept the vocabulary.
    """
    import llama_cpp

    with _loaded(vocabulary, "default") as vocab:
        # Without a key, llama.cpp takes a fixed id for EOS, which says nothing about that token.
        usual = llama_cpp.llama_vocab_eos(vocab)
        return {token for token in tokens if token != usual and llama_cpp.llama_vocab_is_eog(vocab, token)}


@contextmanager
def _loaded(vocabulary: Vocabulary, pre: str, space_prefix: bool | None = None) -> Iterator[Any]:
    """llama.cpp's vocabulary, through its C functions, as llama_cpp.Llama would also create a context."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def silence(level: int, text: bytes, data: Any) -> None: ...

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    with tempfile.TemporaryDirectory(prefix="ropewalk-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        _write(path, vocabulary, pre, space_prefix)
        llama_cpp.llama_log_set(silence, None)
        try:
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
            if not model:
                raise UserError(f"{vocabulary.path}: llama.cpp does not accept its vocabulary")
            try:
                yield llama_cpp.llama_model_get_vocab(model)
            finally:
                llama_cpp.llama_model_free(model)
        finally:
            llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)


def _write(path: Path, vocabulary: Vocabulary, pre: str, space_prefix: bool | None) -> None:
    writer = GGUFWriter(path, "llama")
    vocabulary.write(writer, pre)
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _tokens(vocab: Any, raw: bytes) -> list[int]:
    import llama_cpp

    limit = 3 * (len(raw) + 1)  # at most one token per byte, of which "▁" has three, and a space before them
    found = (llama_cpp.llama_token * limit)()
    n = llama_cpp.llama_tokenize(vocab, raw, len(raw), found, limit, False, False)
    assert n >= 0, raw
    return list(found[:n])
