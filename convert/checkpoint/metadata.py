"""A model's metadata except its tokeniser's: its origin, its sizes, and how it is run.

The values are collected by gguf's own writer, which knows each key's name and type; it writes nothing.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ...container import Value
from ...container.values import encode
from ...errors import UserError
from ..json_file import read_json
from .architectures import Architecture
from .config import Config
from .rope import scaled_context, write_rope

FILE_TYPES = {
    gguf.GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32,
    gguf.GGMLQuantizationType.F16: gguf.LlamaFileType.MOSTLY_F16,
    gguf.GGMLQuantizationType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    gguf.GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


KINDS = {str: "text", int: "a whole number", float: "a number"}
LARGEST = {int: 2.0**31, float: 3.4e38}
SAMPLING: Mapping[str, tuple[type, str]] = {
    "sequence": (str, "sampling_sequence"),
    "top_k": (int, "sampling_top_k"),
    "top_p": (float, "sampling_top_p"),
    "min_p": (float, "sampling_min_p"),
    "xtc_probability": (float, "sampling_xtc_probability"),
    "xtc_threshold": (float, "sampling_xtc_threshold"),
    "temperature": (float, "sampling_temp"),
    "penalty_last_n": (int, "sampling_penalty_last_n"),
    "repetition_penalty": (float, "sampling_penalty_repeat"),  # llama.cpp's copy of gguf reads it, PyPI's does not yet
    "penalty_repeat": (float, "sampling_penalty_repeat"),
    "mirostat": (int, "sampling_mirostat"),
    "mirostat_tau": (float, "sampling_mirostat_tau"),
    "mirostat_eta": (float, "sampling_mirostat_eta"),
}
"""Settings of generation_config.json: their types, and their names in gguf."""

ENTRIES = ("base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources")
"""Keys of a model card that may hold maps, each of which describes a model or a data set."""

READ = ("tags", "pipeline_tag", "language", "languages", "license", "license_name", "license_link", "name", "author")
"""Keys of a model card that are missed if they are odd; gguf reads some more."""

DESCRIBING = "general."
NEEDED = ("architecture", "type", "alignment", "file_type", "quantization_version")
"""Keys under `general.` that are more than a description of the model."""


def model_values(
    folder: Path,
    config: Config,
    entry: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: gguf.GGMLQuantizationType,
    name: str | None = None,
) -> tuple[tuple[Value, ...], tuple[str, ...]]:
    """Return all metadata except the tokeniser's, and notes for the user on descriptions that are left out.

    Args:
        shapes: of all tensors in the file, in torch's order.
        wanted: the type of matrices.
        name: the model's name; by default its model card's, or the folder's.

    Raises:
        UserError: the config lacks a value, or has an invalid one.
    """
    writer = gguf.GGUFWriter(path=None, arch=gguf.MODEL_ARCH_NAMES[entry.arch])
    writer.add_type(gguf.GGUFType.MODEL)
    for tensor, shape in shapes.items():
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), 4 * math.prod(shape))
    described, notes = _general(folder, name, writer.get_total_parameter_count())
    described.set_gguf_meta_model(writer)
    for key in entry.keys:
        value = scaled_context(config) if key.name == "context_length" else key.value(config)
        if value is not None:
            getattr(writer, f"add_{key.name}")(value)
    write_rope(writer, config, entry)
    writer.add_file_type(FILE_TYPES[wanted])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    values = []
    for found in _values(writer):
        problem = _problem(found)
        if problem is None:
            values.append(found)
        elif found.key.startswith(DESCRIBING) and found.key.removeprefix(DESCRIBING) not in NEEDED:
            notes.append(f"{found.key}: {problem}; left out")
        else:
            raise UserError(f"{folder}: {found.key}: {problem}")
    return tuple(values), tuple(notes)


def _general(folder: Path, name: str | None, parameters: tuple[int, int, int, int]) -> tuple[gguf.Metadata, list[str]]:
    """Let gguf interpret the model card and the model's names; what is odd in them is left out, with notes."""
    total, shared, expert, n_experts = parameters
    card, notes = _card(folder)
    given = read_json(folder / "config.json").get("_name_or_path")
    names = {"_name_or_path": given if isinstance(given, str) else None}
    try:
        found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, names, folder, total)
    except Exception as error:  # gguf may raise anything on free text
        notes.append(f"README.md: {_line(error)}; left out")
        found = gguf.Metadata()
    notes += _read_generation(folder, found)
    found.name = name or (found.name if _is_text(found.name) else None) or folder.resolve().name
    if found.size_label is None and total > 0:
        found.size_label = gguf.size_label(total, shared, expert, n_experts)
    return found, notes


def _card(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The head of the model card, with values of the types that gguf expects."""
    try:
        with _quiet():
            card = gguf.Metadata.load_model_card(folder)
    except Exception as error:  # YAML, decoding and what else free text may cause
        return {}, [f"README.md: its head is not readable as a model card and is left out: {_line(error)}"]
    notes: list[str] = []
    plain = {str(key): _plain(str(key), value, notes) for key, value in card.items()}
    return {key: value for key, value in plain.items() if value is not None}, notes


def _plain(key: str, value: Any, notes: list[str]) -> Any:
    """A value of a model card as text, a list of texts, or a list of maps of texts; None if it is neither."""
    if isinstance(value, list):
        items = [_plain(key, item, notes) for item in value if not isinstance(item, list)]
        return [item for item in items if item is not None]
    if isinstance(value, dict) and key in ENTRIES:
        return {str(name): str(item) for name, item in value.items() if isinstance(item, str | int | float)}
    if isinstance(value, dict):
        if key in READ:
            notes.append(f"README.md: {key}: {value!r:.40}, expected text; left out")
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"  # YAML reads the language "no" as false
    return None if value is None else str(value)


def _read_generation(folder: Path, found: gguf.Metadata) -> list[str]:
    """Take the settings for sampling from generation_config.json; return notes on those that are left out."""
    path, notes = folder / "generation_config.json", []
    try:
        settings = read_json(path) if path.is_file() else {}
    except UserError as error:
        return [f"{error}; left out"]
    for name, (kind, field) in SAMPLING.items():
        value = settings.get(name)
        if value is None:
            continue
        whole = isinstance(value, float) and kind is int and value.is_integer()
        fits = isinstance(value, str) if kind is str else isinstance(value, int | float) and not isinstance(value, bool)
        if fits and kind is not str:
            fits = abs(value) < LARGEST[kind] and (kind is float or whole or isinstance(value, int))
        if fits:
            setattr(found, field, kind(value))
        else:
            notes.append(f"{path.name}: {name}: {value!r:.40}, expected {KINDS[kind]}; left out")
    return notes


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be written; JSON and YAML may escape halves of characters."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without gguf's own messages on the terminal."""
    logger = logging.getLogger("metadata")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _line(error: BaseException) -> str:
    """An error's message on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


def _values(writer: gguf.GGUFWriter) -> Iterator[Value]:
    for key, value in writer.kv_data[0].items():
        if value.type == gguf.GGUFValueType.ARRAY:
            if value.value:  # GGUF has no type for the items of an empty list
                item = value.sub_type or gguf.GGUFValueType.get_type(value.value[0])
                yield Value(key, value.type, list(value.value), item)
        else:
            yield Value(key, value.type, value.value)


def _problem(value: Value) -> str | None:
    """Why a value cannot be written under its key, such as text for a number, or a number that is too large."""
    try:
        encode(value)
    except (struct.error, AttributeError, TypeError, ValueError, OverflowError) as error:
        return f"{value.value!r:.60}, expected {gguf.GGUFValueType(value.type).name} ({_line(error)})"
    return None
