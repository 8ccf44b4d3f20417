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
}
"""Tensor types by their names in safetensors."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint and the file that holds it."""

    name: str
    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and its tensors by name, ordered by shard, then by name."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    _kept: dict[Path, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, memory-mapped from its shard.

        Raises:
            UserError: the shard cannot be read, or has changed since it was opened.
        """
        stored = self.tensors[name]
        if stored.shard.suffix == ".safetensors":
            tensor = _read_safetensor(stored)
        else:
            tensor = self._pickled(stored.shard)[name]
        if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
            raise UserError(f"{stored.shard}: {name}: changed while it was being read")
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

    Raises:
        UserError: there are none, a shard is missing or broken, or the index does not match the tensors.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        indexed = read_json(index).get("weight_map") if index.is_file() else None
        shards = _indexed_shards(index, indexed) if index.is_file() else sorted(folder.glob(f"{stem}*{suffix}"))
        if shards:
            found: dict[str, StoredTensor] = {}
            for shard in shards:
                for stored in _tensors_of(shard):
                    if stored.name in found:
                        raise UserError(f"{shard}: {stored.name}: is also in {found[stored.name].shard.name}")
                    found[stored.name] = stored
            if isinstance(indexed, dict):
                _check_index(index, indexed, found)
            return Checkpoint(folder, found)
    raise UserError(f"{folder}: no weights, expected model*.safetensors or pytorch_model*.bin")


def _indexed_shards(index: Path, weight_map: Any) -> list[Path]:
    names = sorted(set(weight_map.values())) if _is_text_map(weight_map) else None
    if not names:
        raise UserError(f"{index}: weight_map: missing or not a map of tensor names to files")
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: weight_map: {name!r}, expected the name of a file beside it")
        if not (index.parent / name).is_file():
            n = sum(shard == name for shard in weight_map.values())
            raise UserError(f"{index.parent / name}: missing, although {index.name} names it for {n} of the tensors")
    return [index.parent / name for name in names]


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _check_index(index: Path, weight_map: Mapping[str, str], found: Mapping[str, StoredTensor]) -> None:
    for name, shard in weight_map.items():
        if name not in found:
            raise UserError(f"{index}: {name}: is not in {shard}")
    for name, stored in found.items():
        if name not in weight_map:
            raise UserError(f"{stored.shard}: {name}: is not in {index.name}")


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
