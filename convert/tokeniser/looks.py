"""Recognise tokens that are meant to be special although their files do not say so."""

from __future__ import annotations

KNOWN = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")  # DeepSeek Coder's and Gemma's


def looks_special(text: str) -> bool:
    """Whether a token has a form that is rare in text: ``<|…|>``, ``<｜…｜>``, ``<unused…>``, or known by name."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in KNOWN or any(text.startswith(first) and text.endswith(last) for first, last in brackets)
