"""What `/set NAME VALUE` changes in a chat, and the ranges of its values, which the options share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..runtime.chat import Sampling

MAX_SEED = 2**32 - 1
MAX_TOP_K = 2**31 - 1
NONE = ("none", "off", '""', "''")


@dataclass(frozen=True)
class Setting:
    """One setting: the field of `Sampling` that it sets, how its text is read, and values to offer."""

    field: str
    help: str
    read: Callable[[str], Any]
    examples: tuple[str, ...] = ()


def _number(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            wanted = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            raise UserError(f"{text!r}, expected a number {wanted}")
        return value

    return read


def _whole(low: int, high: int, or_none: bool = False) -> Callable[[str], int | None]:
    def read(text: str) -> int | None:
        if or_none and text.lower() in NONE:
            return None
        if text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high:
            return int(text)
        raise UserError(f"{text!r}, expected a whole number from {low} to {high}{', or none' if or_none else ''}")

    return read


def read_stop(text: str) -> str:
    """Return a stop text as it was meant: `\\n` is a newline, `\\t` a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _stops(text: str) -> tuple[str, ...]:
    return () if text.lower() in NONE else (read_stop(text),)


SETTINGS = {
    "temp": Setting("temperature", "sampling temperature; 0 = greedy", _number(0, math.inf), ("0", "0.2", "0.8", "1")),
    "top-p": Setting("top_p", "keep the most likely tokens with this probability in all", _number(0, 1), ("0.95", "1")),
    "top-k": Setting("top_k", "keep so many of the most likely tokens; 0 = all", _whole(0, MAX_TOP_K), ("40", "0")),
    "min-p": Setting("min_p", "drop tokens less likely than this share of the best", _number(0, 1), ("0.05", "0")),
    "repeat-penalty": Setting("repeat_penalty", "penalty for repetition; 1 = none", _number(0.01, 100), ("1", "1.1")),
    "max-tokens": Setting(
        "max_tokens", "longest answer, in tokens", _whole(1, 2**31 - 1, or_none=True), ("none", "256")
    ),
    "seed": Setting("seed", "random seed", _whole(0, MAX_SEED, or_none=True), ("none", "1")),
    "stop": Setting("stops", "a text that ends an answer", _stops, ("none",)),
}


def set_setting(sampling: Sampling, name: str, value: str) -> Sampling:
    """Return `sampling` with one setting changed; `name` may have underscores, or be the field's.

    Raises:
        UserError: no such setting, or a value that it cannot have.
    """
    key = name.lower().replace("_", "-")
    key = {"temperature": "temp", "stops": "stop", "num-predict": "max-tokens"}.get(key, key)
    if key not in SETTINGS:
        raise UserError(f"/set {name}: no such setting, expected one of {', '.join(SETTINGS)}")
    setting = SETTINGS[key]
    try:
        return replace(sampling, **{setting.field: setting.read(value)})
    except UserError as error:
        raise UserError(f"/set {key}: {error}") from None


def shown_settings(sampling: Sampling) -> list[tuple[str, str, str]]:
    """Return each setting's name, value and help."""
    rows = []
    for name, setting in SETTINGS.items():
        value = getattr(sampling, setting.field)
        shown = "none" if value in (None, ()) else ", ".join(map(repr, value)) if name == "stop" else f"{value:g}"
        rows.append((name, shown, setting.help))
    return rows
