"""Weights that are stored as 8-bit numbers and their scales (FP8, INT8), read as the floats that they stand for.

As in llama.cpp's converter, a weight is its 8-bit number times its scale, in float32; there is one scale for a tensor,
a row, or a block of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...errors import UserError
from .config import Config
from .folder import Checkpoint, Scale, StoredTensor

METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
"""Values of quant_method whose 8-bit weights have such scales; the others pack several numbers into one."""

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
ENDINGS = ("_scale_inv", "_scale")
"""What follows a weight's name in its scale's; both are factors, although the first is called an inverse."""

ACTIVATIONS = ("activation_scale", "input_scale", ".k_scale", ".v_scale", "output_scale")
"""Name endings of scales for what is computed, which llama.cpp does not quantise."""


def with_scales(checkpoint: Checkpoint, config: Config) -> Checkpoint:
    """Attach scales to the weights that have them, and leave the scales out of the checkpoint's tensors.

    A `quantization_config` that is left over beside weights that are floats is only noted.

    Raises:
        UserError: the weights are quantised in a way that cannot be undone here, or a scale does not fit its weight.
    """
    given = config.get("quantization_config")
    tensors, method = checkpoint.tensors, given.get("quant_method") if isinstance(given, Mapping) else None
    if all(_is_float(stored) for stored in tensors.values()):
        if not given:
            return checkpoint
        note = f"quantization_config ({method or 'no method'}): ignored, as the weights are not quantised"
        return replace(checkpoint, notes=(*checkpoint.notes, note))
    if given and method not in METHODS:
        raise config.wrong("quantization_config", "none, or 8-bit weights with scales (fp8, compressed-tensors)")
    kept: dict[str, StoredTensor] = {}
    scales = set()
    for name, stored in tensors.items():
        scale = next((tensors[name + ending] for ending in ENDINGS if name + ending in tensors), None)
        if stored.dtype in EIGHT_BITS and scale is not None:
            scales.add(scale.name)
            block = _block(config, given)
            _check_fits(stored, scale, block)
            stored = replace(stored, scale=Scale(scale, block))
        elif stored.dtype in EIGHT_BITS and given:
            raise UserError(f"{stored.shard}: {name}: {stored.dtype}, expected a scale beside it ({name}_scale)")
        kept[name] = stored
    kept = {name: stored for name, stored in kept.items() if name not in scales and not name.endswith(ACTIVATIONS)}
    return replace(checkpoint, tensors=kept)


def _is_float(stored: StoredTensor) -> bool:
    return stored.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _block(config: Config, given: Any) -> tuple[int, ...] | None:
    """The size of blocks with one scale each, in the last dimensions; None if there are none."""
    block = given.get("weight_block_size") if isinstance(given, Mapping) else None
    groups = given.get("config_groups") if isinstance(given, Mapping) else None
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        block = (weights.get("block_structure") if isinstance(weights, Mapping) else None) or block
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in block):
        raise config.wrong("quantization_config.weight_block_size", "two positive whole numbers", block)
    return tuple(block)


def _check_fits(stored: StoredTensor, scale: StoredTensor, block: tuple[int, ...] | None) -> None:
    shape = stored.shape
    if block is not None and len(scale.shape) >= 2:
        lead = len(shape) - len(block)
        sizes = (math.ceil(n / size) for n, size in zip(shape[lead:], block, strict=True)) if lead >= 0 else ()
        wanted = [(*shape[:lead], *sizes)]
    else:
        wanted = [(), *((*shape[:n], *[1] * more) for n in range(len(shape)) for more in range(len(shape) - n + 1))]
        wanted += [(1,) * n for n in range(1, len(shape) + 1)]
    if scale.shape not in wanted or not scale.dtype.is_floating_point:
        of = f"blocks of {list(block)}" if block else "rows"
        raise UserError(
            f"{scale.shard}: {scale.name}: shape {list(scale.shape)}, expected scales of the {of} of {list(shape)}"
        )
