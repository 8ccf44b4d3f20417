"""Convert a Hugging Face checkpoint to GGUF tensor by tensor, with a schedule or requantised in the same output."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from ..container import Header, Value, read_header, schedule_values
from ..container.reader import DEFAULT_ALIGNMENT
from ..container.writer import Advance, MetadataSource, TensorSource, gguf_bytes, write_gguf, write_gguf_head
from ..errors import UserError
from ..factors import Schedule
from ..processes import usable_cores
from .checkpoint import Architecture, Checkpoint, Config, architecture_of, open_checkpoint, read_config
from .checkpoint.metadata import model_values
from .checkpoint.own_schedule import own_schedule
from .checkpoint.quantise import TooLarge, quantised, tensor_bytes
from .checkpoint.rope import rope_tensors
from .checkpoint.scaled import with_scales
from .checkpoint.tensors import Planned, first_matrix_type, plan_tensors
from .embed import encoded, write_embedded
from .from_gguf import Bar, no_bar
from .load_trial import check_loads
from .output import check_space, named, output_file
from .requantise import check_weight_type, requantise
from .tokeniser import tokeniser_values

STREAMED = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
"""Types in which a checkpoint is written directly; for the others llama.cpp quantises, from 16 bits."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been read and checked: what its GGUF file will hold."""

    checkpoint: Checkpoint
    config: Config
    entry: Architecture
    values: tuple[Value, ...]
    planned: tuple[Planned, ...]
    extra: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


def read_source(
    folder: Path,
    weight_type: str | None = None,
    name: str | None = None,
    wanted: GGMLQuantizationType | None = None,
) -> Source:
    """Read all of a checkpoint except its weights, and check that they are what its config says.

    Args:
        weight_type: the type of matrices; by default the 16-bit type that loses least.
        name: the model's name; by default its model card's, or the folder's.
        wanted: the type in which matrices are read, if it is not the one that follows from `weight_type`.

    Raises:
        UserError: something is missing, broken or of an unsupported kind.
    """
    raw = read_config(folder)
    entry = architecture_of(raw)
    config = raw.with_defaults(entry.defaults, entry.aliases)
    config.check_scaling()
    checkpoint = with_scales(open_checkpoint(folder), config)
    if wanted is None:
        wanted = STREAMED.get(weight_type or "", first_matrix_type(checkpoint))
    extra = rope_tensors(config, entry)
    tokeniser, tokeniser_notes = tokeniser_values(folder, config.values, entry.tokeniser)
    planned = plan_tensors(checkpoint, config, entry, wanted, _n_tokens(tokeniser))
    shapes = {**{n: tuple(t.shape) for n, t in extra.items()}, **{tensor.name: tensor.shape for tensor in planned}}
    model, model_notes = model_values(folder, config, entry, shapes, wanted, name)
    notes = (*checkpoint.notes, *_notes(config, entry), *model_notes, *tokeniser_notes)
    return Source(checkpoint, config, entry, (*model, *tokeniser), planned, extra, notes)


def convert_checkpoint(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    weight_type: str | None = None,
    choose: Callable[[Header], Schedule | None] = lambda header: None,
    name: str | None = None,
    force: bool = False,
    bar: Bar = no_bar,
) -> tuple[str, ...]:
    """Write the checkpoint in `folder` to `target`, and return notes for the user.

    Args:
        weight_type: as for `convert_model`; by default the 16-bit type that loses least.
        choose: given the header of the file as it would be without another schedule than its own, returns the schedule
            to embed, if any.
        name: the model's name; by default its model card's, or the folder's.
        bar: shows the progress of each stage, in bytes.

    Raises:
        UserError: the checkpoint is incomplete or of an unsupported kind, or the output cannot be written; `target` is
            then unchanged.
    """
    weight_type = check_weight_type(weight_type) if weight_type is not None else None
    options = _Options(Path(folder), Path(target), weight_type, choose, force, bar)
    source = read_source(options.folder, weight_type, name)
    try:
        return _convert(source, options)
    except TooLarge as error:
        if weight_type in STREAMED:
            raise UserError(f"{error}, expected --type bf16 or f32") from None
        source = read_source(options.folder, weight_type, name, wanted=GGMLQuantizationType.BF16)
        return (*_convert(source, options), f"written in bfloat16: {error}")


@dataclass(frozen=True)
class _Options:
    """The arguments of `convert_checkpoint`."""

    folder: Path
    target: Path
    weight_type: str | None
    choose: Callable[[Header], Schedule | None]
    force: bool
    bar: Bar


def _convert(source: Source, options: _Options) -> tuple[str, ...]:
    folder, weight_type, bar = options.folder, options.weight_type, options.bar
    notes = list(source.notes)
    with (
        output_file(options.target, source=folder, force=options.force) as output,
        ThreadPoolExecutor(usable_cores()) as pool,
    ):
        metadata = [encoded(value, str(folder)) for value in source.values]
        tensors = list(_sources(source, pool, notes.append))
        with _head(folder, metadata, tensors, len(source.extra)) as header:
            check_loads(header.path, str(folder))
            own = own_schedule(source.config, header)
        metadata += [encoded(value) for value in (schedule_values(own) if own else [])]
        with _head(folder, metadata, tensors, len(source.extra)) as header:
            schedule = options.choose(header)
            streamed = weight_type is None or weight_type in STREAMED
            place = output.part if streamed else output.scratch
            with bar("Converting") as advance:
                if schedule is None:
                    _write(place, output.target, metadata, tensors, advance)
                else:
                    data = {tensor.name: tensor.chunks for tensor in tensors}
                    write_embedded(header, schedule, place, output.target, advance, data)
        if not streamed:
            assert weight_type is not None
            with bar(f"Quantising to {weight_type}") as advance:
                requantise(read_header(place), output.part, weight_type, target=output.target, on_progress=advance)
        if schedule is not None or not streamed:  # otherwise its header is the one that was tried
            check_loads(output.part, str(output.target))
    return tuple(notes)


def _notes(config: Config, entry: Architecture) -> tuple[str, ...]:
    """Notes on where llama.cpp will run the model differently from what the config says."""
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation is None or activation in entry.activations:
        return entry.unread(config)
    return (f"hidden_act {activation}: llama.cpp computes {entry.activations[0]}", *entry.unread(config))


def _n_tokens(tokeniser: Sequence[Value]) -> int:
    return next(len(value.value) for value in tokeniser if value.key == "tokenizer.ggml.tokens")


def _sources(source: Source, pool: ThreadPoolExecutor, add_note: Callable[[str], None]) -> Iterator[TensorSource]:
    """Yield the tensors to write, in order; their numbers are only read when needed."""

    def warn(name: str, what: str) -> None:
        add_note(f"{name}: contains {what}; the model will generate noise")

    for name, factors in source.extra.items():
        raw = factors.numpy().tobytes()
        yield TensorSource(name, tuple(factors.shape), int(GGMLQuantizationType.F32), len(raw), [raw])
    for planned in source.planned:
        chunks = quantised(planned, source.checkpoint.read, pool, warn)
        shape = tuple(reversed(planned.shape))
        yield TensorSource(planned.name, shape, int(planned.type), tensor_bytes(planned), chunks)


@contextmanager
def _head(
    folder: Path, metadata: Sequence[MetadataSource], tensors: Sequence[TensorSource], n_factors: int
) -> Iterator[Header]:
    """The header of the file as it would be without a schedule; only its factor tensors have data."""
    with tempfile.TemporaryDirectory(prefix="ropewalk-") as place:
        path = Path(place) / f"{folder.resolve().name}.gguf"
        with path.open("wb") as file:
            write_gguf_head(file, metadata, tensors)
            for tensor in tensors[:n_factors]:
                file.writelines(tensor.chunks)
                file.write(bytes(-tensor.n_bytes % DEFAULT_ALIGNMENT))
            file.truncate(gguf_bytes(metadata, tensors, DEFAULT_ALIGNMENT))
        with named(folder, path):
            yield read_header(path)


def _write(
    place: Path,
    target: Path,
    metadata: Sequence[MetadataSource],
    tensors: Sequence[TensorSource],
    advance: Advance,
) -> None:
    check_space(target, gguf_bytes(metadata, tensors, DEFAULT_ALIGNMENT))
    with place.open("wb") as file:
        write_gguf(file, metadata, tensors, on_progress=advance)
