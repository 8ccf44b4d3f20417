"""A copy of a GGUF file with a schedule embedded in it: everything else is copied byte for byte.

The schedule goes under `ropewalk.` for every architecture. Where stock llama.cpp can read rescale factors, it also gets
them natively: the first band's as the short factors and the last band's as the long ones, in their plain form, as it
has no near window. They are absolute, so any scaling that the file had before (its keys, Llama 3's `rope_freqs`) is
removed; the first band includes its factors.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType

from ..container import (
    FREQS,
    LONG,
    PREFIX,
    SHORT,
    GGUFError,
    Header,
    Value,
    check_has_tensors,
    check_is_model,
    plain_context,
    read_header,
    rope_facts,
    schedule_values,
    takes_native_factors,
)
from ..container.values import F32, STRING, U32, encode
from ..container.writer import Advance, Chunks, MetadataSource, TensorSource, copied, gguf_bytes, write_gguf
from ..errors import UserError
from ..factors import Band, Schedule, check_matches, plain_band
from .output import check_space, output_file

FOLDED_KEYS = (
    "rope.scale_linear",
    "rope.scaling.factor",  # with longrope, llama.cpp would divide by it on top of the factors
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
)
"""Keys (after the architecture's name) whose effect is included in the first band's factors."""


def embed_schedule(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    schedule: Schedule,
    *,
    force: bool = False,
    on_progress: Advance | None = None,
) -> None:
    """Write the model in `source` to `target` with `schedule` embedded; a schedule in `source` is replaced.

    Raises:
        UserError: `source` is not a complete GGUF file or has no RoPE, the schedule is for another model, or the
            output cannot be written (see `output_file`); `target` is then unchanged.
    """
    header = read_header(source)
    check_source(header)
    check_matches(schedule, rope_facts(header), str(source))
    with output_file(target, source=header.path, force=force) as output:
        write_embedded(header, schedule, output.part, output.target, on_progress)


def check_source(header: Header) -> None:
    """Refuse a file that is not a whole model.

    Raises:
        UserError: the file is one of several, a vocabulary, or something else than a model.
    """
    check_is_model(header)
    check_has_tensors(header)
    if header.number("split.count", 0) > 1:
        raise UserError(
            f"{header.path}: is one of {header.number('split.count'):.0f} parts of a model;"
            " merge them first: llama-gguf-split --merge"
        )


def write_embedded(
    header: Header,
    schedule: Schedule,
    place: Path,
    target: Path,
    on_progress: Advance | None = None,
    data: Mapping[str, Chunks] | None = None,
) -> None:
    """Write the model of `header`, with `schedule` embedded, to `place`; `target` is its name in messages.

    `data` gives the tensors' bytes by name, if they are not to be copied from the header's file.

    Raises:
        UserError: the source cannot be read, or the disk has too little space.
    """
    try:
        file = header.path.open("rb", buffering=0)
    except OSError as error:
        raise GGUFError(f"{header.path}: cannot read the model: {error.strerror or error}") from None
    with file:
        metadata = list(_metadata(header, schedule, file))
        tensors = list(_tensors(header, schedule, file, data))
        check_space(target, gguf_bytes(metadata, tensors, header.alignment))
        with place.open("rb+" if place.exists() else "wb") as part:
            write_gguf(part, metadata, tensors, alignment=header.alignment, on_progress=on_progress)


def _metadata(header: Header, schedule: Schedule, file: BinaryIO) -> Iterator[MetadataSource]:
    """The source's metadata in its order, our values in place of those that they replace, and then the rest of ours."""
    ours = {value.key: value for value in _model_values(header, schedule)}
    folded = {f"{header.arch}.{name}" for name in FOLDED_KEYS} if takes_native_factors(header) else set()
    for key, entry in header.entries.items():
        if key in ours:
            yield encoded(ours.pop(key))
        elif key not in folded and not key.startswith(PREFIX):
            n_bytes = entry.end - entry.start
            yield MetadataSource(key, entry.type, n_bytes, copied(header.path, file, entry.start, n_bytes))
    for value in (*ours.values(), *schedule_values(schedule)):
        yield encoded(value)


def _model_values(header: Header, schedule: Schedule) -> Iterator[Value]:
    """The model's own keys that a schedule changes."""
    arch, scaling = header.arch, f"{header.arch}.rope.scaling."
    last = plain_band(schedule.facts, schedule.bands[-1])
    yield Value(f"{arch}.context_length", U32, schedule.context)
    if takes_native_factors(header):
        yield Value(f"{scaling}type", STRING, "longrope")
        yield Value(f"{scaling}original_context_length", U32, schedule.bands[0].context)
        yield Value(f"{scaling}attn_factor", F32, last.attention_factor)
    elif header.get(f"{scaling}type") == "yarn":
        # YaRN's ramp depends on this key; without it, on the context length, which has just been changed.
        yield Value(f"{scaling}original_context_length", U32, plain_context(header))


def _tensors(
    header: Header, schedule: Schedule, file: BinaryIO, data: Mapping[str, Chunks] | None
) -> Iterator[TensorSource]:
    native = takes_native_factors(header)
    for tensor in header.tensors:
        if not (native and tensor.name in (FREQS, LONG, SHORT)):
            start = header.data_start + tensor.offset
            chunks = copied(header.path, file, start, tensor.n_bytes) if data is None else data[tensor.name]
            yield TensorSource(tensor.name, tensor.shape, tensor.type, tensor.n_bytes, chunks)
    if native:
        yield _factor_tensor(LONG, plain_band(schedule.facts, schedule.bands[-1]))
        yield _factor_tensor(SHORT, plain_band(schedule.facts, schedule.bands[0]))


def _factor_tensor(name: str, band: Band) -> TensorSource:
    with np.errstate(over="ignore"):
        factors = np.array(band.rescale_factors).astype("<f4")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise UserError(f"{name}: the factors of the band of {band.context} tokens do not fit in float32")
    return TensorSource(name, factors.shape, int(GGMLQuantizationType.F32), factors.nbytes, [factors.tobytes()])


def encoded(value: Value, where: str = "the schedule") -> MetadataSource:
    """Encode a value, which comes from `where`, for writing.

    Raises:
        UserError: it does not fit in its type, or is text that is not Unicode.
    """
    try:
        raw = encode(value)
    except (struct.error, OverflowError, UnicodeError) as error:
        raise UserError(f"{where}: {value.key}: {value.value!r:.60}, which GGUF cannot hold: {error}") from None
    return MetadataSource(value.key, value.type, len(raw), [raw])
