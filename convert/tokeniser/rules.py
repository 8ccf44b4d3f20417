"""What differs between architectures in how a checkpoint's tokeniser is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokeniserRules:
    """One way of reading.

    Attributes:
        kinds: that an architecture comes with, in the order in which they are looked for: "sentencepiece"
            (tokenizer.model), "byte-fallback" (its vocabulary as BPE, in tokenizer.json), "byte-level" (BPE).
        space_prefix: whether a space goes before a text, where that is fixed for SentencePiece.
        reads_space_prefix: whether tokenizer_config.json says so.
        byte_level_class: the `tokenizer_class` that tells byte-level BPE in spite of `kinds`.
        plain_words: added tokens stay as they are written: no spaces for "▁", nothing guessed from how they look.
        llama_sizes: vocabularies that are known by their size have rules of their own (Code Llama's, StarCoder's).
    """

    kinds: tuple[str, ...]
    space_prefix: bool | None = None
    reads_space_prefix: bool = False
    byte_level_class: str | None = None
    plain_words: bool = False
    llama_sizes: bool = False


LLAMA = TokeniserRules(("sentencepiece", "byte-fallback", "byte-level"), reads_space_prefix=True, llama_sizes=True)
QWEN = TokeniserRules(("sentencepiece", "byte-level"))
PHI3 = TokeniserRules(("sentencepiece",), byte_level_class="GPT2Tokenizer", plain_words=True)
GEMMA2 = TokeniserRules(("sentencepiece",), space_prefix=False)
GEMMA3 = TokeniserRules(("sentencepiece", "byte-level"), space_prefix=False)
SENTENCEPIECE_ONLY = TokeniserRules(("sentencepiece",))
