"""A model's metadata except its tokeniser's: its origin, its sizes, and how it is run.

The values are collected by gguf's own writer, which knows each key's name and type; it writes nothing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np

from ...container import Value
from ...container.values import encode
from ...errors import UserError
from .architectures import Architecture
from .config import Config
from .rope import write_rope

FILE_TYPES = {
    gguf.GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32,
    gguf.GGMLQuantizationType.F16: gguf.LlamaFileType.MOSTLY_F16,
    gguf.GGMLQuantizationType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    gguf.GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


def model_values(
    folder: Path,
    config: Config,
    entry: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: gguf.GGMLQuantizationType,
    name: str | None = None,
) -> tuple[Value, ...]:
    """Return all metadata except the tokeniser's.

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
    _general(folder, config, name, writer.get_total_parameter_count()).set_gguf_meta_model(writer)
    for key in entry.keys:
        value = key.value(config)
        if value is not None:
            getattr(writer, f"add_{key.name}")(value)
    write_rope(writer, config, entry)
    writer.add_file_type(FILE_TYPES[wanted])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return tuple(_checked(value, config) for value in _values(writer))


def _general(folder: Path, config: Config, name: str | None, parameters: tuple[int, int, int, int]) -> gguf.Metadata:
    """Let gguf read the model card, the names and generation_config.json."""
    total, shared, expert, n_experts = parameters
    try:
        found = gguf.Metadata.load(None, folder, name, total)
    except Exception as error:  # a model card is free text, on which gguf may raise anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder}: README.md or config.json: cannot be parsed: {first}") from None
    # gguf on PyPI does not know this setting yet; llama.cpp's own copy does.
    generation = gguf.Metadata.load_generation_config(folder)
    if found.sampling_penalty_repeat is None and "repetition_penalty" in generation:
        found.sampling_penalty_repeat = config.finite("repetition_penalty", generation["repetition_penalty"])
    if found.name is None:
        found.name = folder.resolve().name
    if found.size_label is None and total > 0:
        found.size_label = gguf.size_label(total, shared, expert, n_experts)
    return found


def _values(writer: gguf.GGUFWriter) -> Iterator[Value]:
    for key, value in writer.kv_data[0].items():
        if value.type == gguf.GGUFValueType.ARRAY:
            item = value.sub_type or gguf.GGUFValueType.get_type(value.value[0])
            yield Value(key, value.type, list(value.value), item)
        else:
            yield Value(key, value.type, value.value)


def _checked(value: Value, config: Config) -> Value:
    """Refuse a value that is not of its key's type, such as text for a temperature."""
    try:
        encode(value)
    except (struct.error, AttributeError, TypeError) as error:
        raise UserError(
            f"{config.path.parent}: {value.key}: {value.value!r:.60}, expected {gguf.GGUFValueType(value.type).name}"
            f" ({error})"
        ) from None
    return value
