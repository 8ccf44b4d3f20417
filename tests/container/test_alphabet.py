"""Which texts a SentencePiece vocabulary without a token for every byte can spell."""

from __future__ import annotations

import pytest
from ropewalk.container.alphabet import BYTES, alphabet

CONTROL, NORMAL = 3, 1


def test_every_byte_has_a_token() -> None:
    assert alphabet(["▁", *BYTES], []) is None
    letter = "A"  # a byte's own character is as good as its token
    assert alphabet([letter, *(text for text in BYTES if text != f"<0x{ord(letter):02X}>")], []) is None


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ("", None),
        ("a b", None),
        ("a<s>b", None),
        ("s", "s"),
        ("a é", "é"),
        ("a 你", None),
        (b"a \xc3", "\udcc3"),
        (b"a \xff", None),
    ],
)
def test_what_can_be_spelled(text: str | bytes, lacking: str | None) -> None:
    ascii_and_c3 = {*range(128), 0xC3}
    tokens = ["▁", "a", "b", "<s>", *(text for byte, text in enumerate(BYTES) if byte not in ascii_and_c3)]
    found = alphabet(tokens, [NORMAL, NORMAL, NORMAL, CONTROL, *[6] * 256])
    assert found is not None and len(found.missing) == 127  # all but those of a and b
    assert found.lacks(text.encode() if isinstance(text, str) else text) == lacking


def test_spaces_are_spelled_too() -> None:
    found = alphabet(["a"], [NORMAL])
    assert found is not None and found.lacks(b"a") == "▁"
