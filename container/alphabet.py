"""Texts that a SentencePiece vocabulary cannot spell: llama.cpp ends the process at them.

Such a vocabulary has a token for each of the 256 bytes, into which characters fall apart that no other token has. Where
one is missing, llama.cpp throws an exception that nothing catches (`llama_vocab::byte_to_token`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONTROL, USER_DEFINED = 3, 4  # GGUF's token types whose spellings are found in a text before anything else
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"


@dataclass(frozen=True)
class Alphabet:
    """What a vocabulary without a token for each byte can spell.

    Attributes:
        characters: those that are tokens.
        missing: the bytes that no token stands for.
        whole: tokens that are found in a text as they are.
    """

    characters: frozenset[str]
    missing: frozenset[int]
    whole: re.Pattern[str]

    def lacks(self, text: bytes) -> str | None:
        """Return a character of `text` that cannot be spelled, if there is one."""
        rest = self.whole.sub("", text.decode("utf-8", "surrogateescape"))
        for character in dict.fromkeys(SPACE + rest.replace(" ", SPACE)):
            if character not in self.characters and not self.missing.isdisjoint(_bytes(character)):
                return character
        return None


def alphabet(tokens: Iterable[str], types: Sequence[int]) -> Alphabet | None:
    """Return what a SentencePiece vocabulary can spell; None if that is every text."""
    known = set(tokens)
    missing = frozenset(b for b, text in enumerate(BYTES) if text not in known and not (b < 128 and chr(b) in known))
    if not missing:
        return None
    whole = [text for text, kind in zip(tokens, types, strict=False) if text and kind in (CONTROL, USER_DEFINED)]
    pattern = "|".join(re.escape(text) for text in sorted(whole, key=len, reverse=True))
    return Alphabet(frozenset(t for t in known if len(t) == 1), missing, re.compile(pattern or r"(?!)"))


def _bytes(character: str) -> bytes:
    return character.encode("utf-8", "surrogateescape")
