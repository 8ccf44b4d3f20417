"""Options that are lists: numbers of tokens, and names."""

from __future__ import annotations

from ..errors import UserError


def numbers_of(option: str, text: str, least: int = 1) -> tuple[int, ...]:
    """Parse comma-separated numbers of tokens, of at least `least`, sorted.

    Raises:
        UserError: something else; names `option`.
    """
    from ..factors import MAX_CONTEXT

    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] < least or numbers[-1] > MAX_CONTEXT:
        raise UserError(f"{option}: {text!r}, expected numbers of tokens like 4096,8192")
    return numbers


def names_of(text: str) -> tuple[str, ...]:
    """Split comma-separated names, each of them once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))
