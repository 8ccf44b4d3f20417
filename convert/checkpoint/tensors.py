"""Plan the file's tensors from a checkpoint's: names, order, changes to their numbers, and types.

Nothing is read here. A planned tensor is a list of parts that follow each other in the file, each one a stored tensor
and its change. Changes are views and permutations of the stored numbers (and a shift when they are written), so that
planning can try them on shapes alone, and writing needs no more than one stored tensor and a few of its rows as floats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from gguf import GGMLQuantizationType, get_tensor_name_map

from ...errors import UserError
from .architectures import Architecture, Drop, Halves, Permute, Rename, Rule, Shift, Stack, TrimRows
from .config import Config
from .folder import Checkpoint, StoredTensor
from .loader import Slot, loader_slots

View = Callable[[torch.Tensor], torch.Tensor]

BUFFERS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
"""Name endings of tensors that are computed, not learned."""

OTHER_MODALITIES = re.compile(r"(^|\.)(vision_|audio_|visual\.)|projector\.|vision_tower|audio_tower")
"""Matches in names of weights that do not belong to the language model."""

WRAPPERS = {
    "base_model.model.": "of a PEFT wrapper, expected the merged model (merge_and_unload, then save_pretrained)",
    "_orig_mod.": "of a compiled model (torch.compile), expected its _orig_mod, saved by save_pretrained",
    "module.": "of a DataParallel, DDP or FSDP wrapper, expected its module, saved by save_pretrained",
}
"""Beginnings of names that a program has put around a model's own, and what they say."""

FLOAT32_NAMES = ("ffn_gate_inp.weight",)
"""Name endings of matrices that are float32 in every file, as llama.cpp expects; so are vectors and norms."""


VOCABULARY_WIDE = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


@dataclass(frozen=True)
class TensorPart:
    """One stored tensor and its change: a view or permutation, then the addition of a number."""

    stored: StoredTensor
    view: View = lambda tensor: tensor
    shift: float = 0.0


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: `shape` in torch's order, and the parts, in order along the first dimension."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    parts: tuple[TensorPart, ...]


@dataclass(frozen=True)
class _Named:
    """The result of a rule for one stored tensor: its name as gguf's map knows it, and its part."""

    name: str
    part: TensorPart


@dataclass
class _Stacks:
    """Experts seen so far, by the name of the tensor into which they are stacked."""

    seen: dict[str, dict[int, TensorPart]] = field(default_factory=dict)

    def add(self, name: str, expert: int, part: TensorPart, n_experts: int) -> tuple[TensorPart, ...] | None:
        """Add an expert; return all of the stack's parts once it is complete."""
        stack = self.seen.setdefault(name, {})
        stack[expert] = part
        if len(stack) < n_experts:
            return None
        del self.seen[name]
        return tuple(stack[i] for i in range(n_experts))


def plan_tensors(
    checkpoint: Checkpoint, config: Config, entry: Architecture, wanted: GGMLQuantizationType, rows: int
) -> tuple[Planned, ...]:
    """Plan the tensors that the file will hold, in the order of the checkpoint.

    Args:
        wanted: the type of matrices, where it is possible.
        rows: the number of tokens in the vocabulary.

    Raises:
        UserError: the architecture does not have a tensor, or one is missing or of the wrong shape.
    """
    names = get_tensor_name_map(entry.arch, _layers(checkpoint, config))
    planned: dict[str, Planned] = {}
    for name, shape, parts in _changed(checkpoint, config, entry, rows):
        _check_floats(parts)
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise _unknown(parts[0].stored, entry)
        if new in planned:
            raise UserError(f"{parts[0].stored.shard}: {parts[0].stored.name}: is a second {new}")
        planned[new] = Planned(new, shape, _type_of(new, shape, wanted), parts)
    _check_slots(checkpoint, config, entry, planned, rows)
    return tuple(planned.values())


def first_matrix_type(checkpoint: Checkpoint) -> GGMLQuantizationType:
    """The 16-bit type that loses least: bfloat16 if the first 16-bit matrix has that type, else float16."""
    for stored in checkpoint.tensors.values():
        if len(stored.shape) >= 2 and stored.dtype in (torch.bfloat16, torch.float16):
            return GGMLQuantizationType.BF16 if stored.dtype == torch.bfloat16 else GGMLQuantizationType.F16
    return GGMLQuantizationType.F16


def _layers(checkpoint: Checkpoint, config: Config) -> int:
    """The number of layers, which sets the size of the name map; never more than there are tensors."""
    n = config.count("num_hidden_layers")
    if n > len(checkpoint.tensors):
        raise config.wrong("num_hidden_layers", f"at most the {len(checkpoint.tensors)} tensors in {checkpoint.folder}")
    return n


def _changed(
    checkpoint: Checkpoint, config: Config, entry: Architecture, rows: int
) -> Iterator[tuple[str, tuple[int, ...], tuple[TensorPart, ...]]]:
    """Yield the name, shape and parts of each tensor after its rule."""
    stacks = _Stacks()
    for stored in checkpoint.tensors.values():
        name = stored.name.replace("language_model.", "")
        if stored.name.endswith(BUFFERS) or OTHER_MODALITIES.search(stored.name):
            continue
        rule, match = _rule(entry, name)
        if match is not None and rule is not None and isinstance(rule.change, Stack):
            into = rule.change.into.format(*match.groups())
            n = config.count(rule.change.experts)
            expert = int(match.group(2))
            if expert >= n:
                raise UserError(f"{stored.shard}: {stored.name}: expected experts 0 to {n - 1} ({rule.change.experts})")
            parts = stacks.add(into, expert, TensorPart(stored), n)
            if parts is not None:
                yield into, (n, *_same_shape(parts)), parts
            continue
        for named in _apply(rule, match, stored, name, config, rows):
            yield named.name, _shape(named.part), (named.part,)
    for into, stack in stacks.seen.items():
        first = next(iter(stack.values())).stored
        raise UserError(f"{first.shard}: {into}: only {len(stack)} experts, the others are missing")


def _rule(entry: Architecture, name: str) -> tuple[Rule | None, re.Match[str] | None]:
    for rule in entry.rules:
        match = re.fullmatch(rule.pattern, name)
        if match:
            return rule, match
    return None, None


def _apply(
    rule: Rule | None, match: re.Match[str] | None, stored: StoredTensor, name: str, config: Config, rows: int
) -> list[_Named]:
    if rule is None or match is None:
        return [_Named(name, TensorPart(stored))]
    match rule.change:
        case Drop():
            return []
        case Rename(into):
            return [_Named(into.format(*match.groups()), TensorPart(stored))]
        case Shift(by):
            return [_Named(name, TensorPart(stored, shift=by))]
        case Permute(heads):
            n = config.optional(heads) or config.count("num_attention_heads")
            if not stored.shape or stored.shape[0] % (2 * n):
                raise _bad_shape(stored, f"a first dimension that is a multiple of 2 × {n} heads ({heads})")
            return [_Named(name, TensorPart(stored, lambda tensor: interleaved(tensor, n)))]
        case Halves(first, second):
            if len(stored.shape) < 2 or stored.shape[-2] % 2:
                raise _bad_shape(stored, "an even second-to-last dimension")
            half = stored.shape[-2] // 2
            return [
                _Named(first.format(*match.groups()), TensorPart(stored, lambda tensor: tensor[..., :half, :])),
                _Named(second.format(*match.groups()), TensorPart(stored, lambda tensor: tensor[..., half:, :])),
            ]
        case TrimRows():
            return [_Named(name, TensorPart(stored, lambda tensor: tensor[:rows]))]
        case _:
            raise AssertionError(rule.change)


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head in the order 0, d/2, 1, d/2 + 1, …: pairs that rotate together become neighbours."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _shape(part: TensorPart) -> tuple[int, ...]:
    stored = part.stored
    return tuple(part.view(torch.empty(stored.shape, dtype=stored.dtype, device="meta")).shape)


def _same_shape(parts: tuple[TensorPart, ...]) -> tuple[int, ...]:
    shape = parts[0].stored.shape
    for part in parts:
        if part.stored.shape != shape:
            raise _bad_shape(part.stored, f"{list(shape)}, as for the first expert")
    return shape


def _type_of(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The choice of llama.cpp's converter: vectors, norms, routers and everything but weights are float32."""
    if len(shape) <= 1 or name.endswith(("_norm.weight", *FLOAT32_NAMES)) or not name.endswith(".weight"):
        return GGMLQuantizationType.F32
    if wanted == GGMLQuantizationType.Q8_0 and shape[-1] % 32:
        return GGMLQuantizationType.F16
    return wanted


def _check_slots(
    checkpoint: Checkpoint, config: Config, entry: Architecture, planned: Mapping[str, Planned], rows: int
) -> None:
    """Check that llama.cpp's loader has a place for every tensor, of its shape, and that it finds all that it needs."""
    slots = loader_slots(entry, config, rows)
    layers: dict[int, set[str]] = {i: set() for i in range(config.count("num_hidden_layers"))}
    for tensor in planned.values():
        match = re.fullmatch(r"blk\.(\d+)\.(.*)", tensor.name)
        if match:
            layers[int(match.group(1))].add(match.group(2))
        slot = slots.get(f"blk.*.{match.group(2)}" if match else tensor.name)
        if slot is None:
            stored = tensor.parts[0].stored
            raise UserError(
                f"{stored.shard}: {stored.name}: llama.cpp takes no {tensor.name} in a {entry.classes[0]} model"
            )
        _check_shape(config, tensor, slot)
    for name, slot in slots.items():
        if slot.required and not name.startswith("blk.") and name not in planned:
            raise UserError(
                f"{checkpoint.folder}: no tensor for {name}, expected one ({config.path.name}): {slot.usual}"
            )
    by_name = {name.removeprefix("blk.*."): slot for name, slot in slots.items() if name.startswith("blk.")}
    every = set().union(*layers.values())
    for i, found in layers.items():
        for missing in sorted((every | {name for name, slot in by_name.items() if slot.required}) - found):
            why = "which other layers have" if missing in every else "which every layer needs"
            usual = by_name[missing].usual.replace("*", str(i))
            raise UserError(f"{checkpoint.folder}: layer {i} has no tensor for {missing}, {why}: {usual}")


def _check_floats(parts: tuple[TensorPart, ...]) -> None:
    for part in parts:
        if part.stored.scale is None and not part.stored.dtype.is_floating_point:
            kind = str(part.stored.dtype).removeprefix("torch.")
            raise UserError(f"{part.stored.shard}: {part.stored.name}: {kind} numbers, expected floats")


def _unknown(stored: StoredTensor, entry: Architecture) -> UserError:
    """A name that gguf's map does not know."""
    where = f"{stored.shard}: {stored.name}: "
    if ".lora_" in stored.name:
        return UserError(f"{where}a LoRA adapter's weight, expected a model with the adapter merged (merge_and_unload)")
    for start, what in WRAPPERS.items():
        if stored.name.startswith(start):
            return UserError(f"{where}its name begins with {start!r}, which is {what}")
    return UserError(f"{where}not a tensor of {entry.classes[0]}")


def _check_shape(config: Config, tensor: Planned, slot: Slot) -> None:
    if tensor.shape == slot.shape:
        return
    stored = tensor.parts[0].stored
    if len(tensor.parts) > 1:  # experts, one stored tensor each
        expected = str(list(slot.shape[1:]))
    elif stored.shape == tensor.shape:
        expected = str(list(slot.shape))
    else:
        expected = f"{list(slot.shape)} in {tensor.name} instead of {list(tensor.shape)}"
    rows = " and one row for each token" if slot.usual in VOCABULARY_WIDE else ""
    raise _bad_shape(stored, f"{expected} from {config.path.name}{rows}")


def _bad_shape(stored: StoredTensor, expected: str) -> UserError:
    return UserError(f"{stored.shard}: {stored.name}: shape {list(stored.shape)}, expected {expected}")
