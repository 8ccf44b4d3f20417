"""A checkpoint's config.json, with its numbers checked when they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..json_file import read_json

MAX_COUNT = 1 << 31  # GGUF holds these as 32 bits
MAX_NUMBER = 3.4e38  # and fractions as float32
SCALING = ("rope_scaling", "rope_parameters")


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
        """`value` as a number that fits in float32.

        Raises:
            UserError: it does not.
        """
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
            large = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) > MAX_NUMBER
            raise self.wrong(name, f"a number up to {MAX_NUMBER:g}" if large else "a number", value)
        return float(value)

    def check_scaling(self) -> None:
        """Check the numbers in RoPE's maps, with which logarithms and powers are computed.

        Raises:
            UserError: one does not fit in float32.
        """
        for name in SCALING:
            self._check_numbers(name, self.get(name))
        self._check_numbers("original_max_position_embeddings", self.get("original_max_position_embeddings"))

    def _check_numbers(self, name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                self._check_numbers(f"{name}.{key}", item)
        elif isinstance(value, list):
            for item in value:
                self._check_numbers(name, item)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self.finite(name, value)

    def wrong(self, name: str, expected: str, found: Any = None) -> UserError:
        value = repr(self.get(name) if found is None else found)
        return UserError(f"{self.path}: {name}: {value[:60]}, expected {expected}")

    def with_defaults(self, defaults: Mapping[str, Any], aliases: Mapping[str, str] | None = None) -> Config:
        """Fill in what the config omits: from a setting's other name, or else by default."""
        found = {name: self.values[other] for name, other in (aliases or {}).items() if other in self.values}
        return Config(self.path, {**defaults, **found, **self.values})

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
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder}: a LoRA adapter alone, expected the model with it merged (merge_and_unload, save_pretrained)"
            )
        raise UserError(f"{folder}: no config.json, expected a Hugging Face checkpoint")
    values = read_json(path)
    inner = values.get("text_config")
    if isinstance(inner, dict):
        values = {**values, **inner, "architectures": inner.get("architectures") or values.get("architectures")}
    return Config(path, values)
