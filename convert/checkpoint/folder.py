"""A Hugging Face checkpoint on disk: which tensors there are, and each of them when it is needed.

Shards are opened again for every tensor and memory-mapped, so that only the parts of a model that are in use are in
memory. Headers are checked before anything is read: by safetensors itself, and by torch with `weights_only`, which runs
no code.
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...errors import UserError
from ...files import MAX_NAME_BYTES
from ..json_file import read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Tensor types by their names in safetensors."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint and the file that holds it; if it has a scale, it is read as float32."""

    name: str
    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    scale: Scale | None = None

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Scale:
    """Factors for a tensor's numbers: for the whole, its rows, or blocks of a size in its last dimensions."""

    stored: StoredTensor
    block: tuple[int, ...] | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, its tensors by name, ordered by shard, then by name, and notes for the user."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...] = ()
    _kept: dict[Path, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor: memory-mapped from its shard, or as float32 if it has a scale.

        Raises:
            UserError: the shard cannot be read, or has changed since it was opened.
        """
        stored = self.tensors[name]
        if stored.scale is None:
            return self._stored(stored)
        return _scaled(self._stored(stored), self._stored(stored.scale.stored), stored.scale.block)

    def _stored(self, stored: StoredTensor) -> torch.Tensor:
        if stored.shard.suffix == ".safetensors":
            tensor = _read_safetensor(stored)
        else:
            tensor = self._pickled(stored.shard)[stored.name]
        if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
            raise UserError(f"{stored.shard}: {stored.name}: changed while it was being read")
        return tensor

    def _pickled(self, shard: Path) -> dict[str, torch.Tensor]:
        """A .bin file's tensors; a file that cannot be mapped is loaded whole, and kept until another is needed."""
        if shard not in self._kept:
            self._kept.clear()
            tensors, mapped = _load_pickled(shard)
            if mapped:
                return tensors
            self._kept[shard] = tensors
        return self._kept[shard]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find a checkpoint's tensors without reading them: safetensors, or else pytorch_model*.bin.

    As in transformers, a single file comes before an index, which may be left over; so may be an index's names.

    Raises:
        UserError: there are none, or a shard is missing or broken.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index, single = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
        notes: tuple[str, ...] = ()
        indexed = None
        if index.is_file() and single.is_file():
            notes = (f"{index.name}: ignored, as all weights are in {single.name}",)
            shards = [single]
        elif index.is_file():
            indexed = read_json(index).get("weight_map")
            shards = _indexed_shards(index, indexed)
        else:
            shards = sorted(folder.glob(f"{stem}*{suffix}"))
        if shards:
            found = _found(shards)
            if isinstance(indexed, dict):
                notes = _index_notes(index, indexed, found)
            return Checkpoint(folder, found, notes)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: a LoRA adapter alone, expected the model with it merged (merge_and_unload)")
    raise UserError(f"{folder}: no weights, expected model*.safetensors or pytorch_model*.bin")


def _found(shards: list[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        for stored in _tensors_of(shard):
            if stored.name in found:
                raise UserError(f"{shard}: {stored.name}: is also in {found[stored.name].shard.name}")
            found[stored.name] = stored
    return found


def _indexed_shards(index: Path, weight_map: Any) -> list[Path]:
    names = sorted(set(weight_map.values())) if _is_text_map(weight_map) else None
    if not names:
        raise UserError(f"{index}: weight_map: missing or not a map of tensor names to files")
    for name in names:
        if Path(name).name != name or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
            raise UserError(f"{index}: weight_map: {name!r:.80}, expected the name of a file beside it")
        if not (index.parent / name).is_file():
            n = sum(shard == name for shard in weight_map.values())
            raise UserError(f"{index.parent / name}: missing, although {index.name} names it for {n} of the tensors")
    return [index.parent / name for name in names]


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _index_notes(index: Path, weight_map: Mapping[str, str], found: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Notes on names that only the index or only the shards have; what a model needs is checked later."""
    notes = []
    for names, where in (
        ([name for name in weight_map if name not in found], "in no shard"),
        ([name for name in found if name not in weight_map], "not in the index"),
    ):
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            notes.append(f"{index.name}: out of date: {names[0]}{more} {where}")
    return tuple(notes)


def _tensors_of(shard: Path) -> list[StoredTensor]:
    if shard.suffix == ".safetensors":
        return _safetensors_of(shard)
    tensors, _ = _load_pickled(shard)
    size = shard.stat().st_size
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.dtype.itemsize > size:
            raise UserError(f"{shard}: {name}: shape {list(tensor.shape)} is larger than the file")
    return [StoredTensor(name, shard, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def _safetensors_of(shard: Path) -> list[StoredTensor]:
    found = []
    try:
        with safe_open(str(shard), framework="pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise UserError(f"{shard}: {name}: {part.get_dtype()} numbers, expected {', '.join(DTYPES)}")
                found.append(StoredTensor(name, shard, dtype, tuple(part.get_shape())))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shard}: not a whole safetensors file: {_line(error)}") from None
    return found


def _read_safetensor(stored: StoredTensor) -> torch.Tensor:
    try:
        with safe_open(str(stored.shard), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored.name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{stored.shard}: {stored.name}: cannot be read: {_line(error)}") from None


def _scaled(tensor: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...] | None) -> torch.Tensor:
    """A tensor's numbers times their scales, as float32, in the same order of operations as llama.cpp's converter."""
    scale = scale.to(torch.float32)
    if block is not None and scale.dim() >= len(block):
        first = scale.dim() - len(block)
        for i, size in enumerate(block):
            scale = scale.repeat_interleave(size, first + i)
        scale = scale[tuple(slice(0, size) for size in tensor.shape)]  # the last block may be cut off
    while scale.dim() < tensor.dim():
        scale = scale.unsqueeze(-1)
    return tensor.to(torch.float32).mul_(scale)


def _load_pickled(shard: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Load a .bin file's tensors, and say whether they are mapped (files from before torch 1.6 cannot be)."""
    try:
        mapped = _is_zip(shard)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is refused
            data = torch.load(shard, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(f"{shard}: not only tensors, and nothing else is loaded: {_line(error)}") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{shard}: not a whole PyTorch file: {_line(error)}") from None
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict) or not all(isinstance(value, torch.Tensor) for value in data.values()):
        raise UserError(f"{shard}: {type(data).__name__}, expected a map of names to tensors")
    if not all(isinstance(name, str) for name in data):
        raise UserError(f"{shard}: a tensor's name is not text")
    return data, mapped


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _line(error: BaseException) -> str:
    """An error's message on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
