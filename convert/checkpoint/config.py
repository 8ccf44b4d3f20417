"""A checkpoint's config.json, with its numbers checked when they are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..json_file import read_json

MAX_COUNT = 1 << 31  # GGUF holds these as 32 bits


@dataclass(frozen=True)
class Config:
    """The values of config.json, and transformers' defaults for those that it omits."""

    path: Path
    values: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def count(self, name: str) -> int:
        """A positive whole number.

        Raises:
            UserError: it is missing or not such a number.
        """
        value = self._given(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_COUNT:
            raise self.wrong(name, "a positive whole number")
        return value

    def number(self, name: str) -> float:
        """A finite number.

        Raises:
            UserError: it is missing or not such a number.
        """
        return self.finite(name, self._given(name))

    def optional(self, name: str) -> int | None:
        """A positive whole number, or None if there is none."""
        return None if self.get(name) is None else self.count(name)

    def finite(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, "a number", value)
        return float(value)

    def wrong(self, name: str, expected: str, found: Any = None) -> UserError:
        value = repr(self.get(name) if found is None else found)
        return UserError(f"{self.path}: {name}: {value[:60]}, expected {expected}")

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        return Config(self.path, {**defaults, **self.values})

    def _given(self, name: str) -> Any:
        if self.get(name) is None:
            raise UserError(f"{self.path}: {name}: missing, expected a number")
        return self.values[name]


def read_config(folder: Path) -> Config:
    """Read a checkpoint's config; in a multimodal one, that of the language model.

    Raises:
        UserError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json, expected a Hugging Face checkpoint")
    values = read_json(path)
    inner = values.get("text_config")
    if isinstance(inner, dict):
        values = {**values, **inner, "architectures": inner.get("architectures") or values.get("architectures")}
    return Config(path, values)
