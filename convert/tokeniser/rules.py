"""How a checkpoint's tokeniser is read, where architectures differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokeniserRules:
    """How the tokenisers of some architectures are read.

    Attributes:
        space_prefix: whether a space is added before a text, where that is fixed for SentencePiece.
        reads_space_prefix: whether tokenizer_config.json decides on that space.
        byte_level_class: the `tokenizer_class` that means byte-level BPE although there is a tokenizer.model.
        literal_added: added tokens are kept as written: "▁" is not replaced, and their form does not make them special.
        llama_sizes: vocabularies that are recognised by their size have rules of their own (Code Llama, StarCoder).
    """

    space_prefix: bool | None = None
    reads_space_prefix: bool = False
    byte_level_class: str | None = None
    literal_added: bool = False
    llama_sizes: bool = False


LLAMA = TokeniserRules(reads_space_prefix=True, llama_sizes=True)
QWEN = TokeniserRules()
PHI3 = TokeniserRules(byte_level_class="GPT2Tokenizer", literal_added=True)
GEMMA2 = TokeniserRules(space_prefix=False)
GEMMA3 = TokeniserRules(space_prefix=False)
SENTENCEPIECE_ONLY = TokeniserRules()
