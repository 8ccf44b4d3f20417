"""The `ropewalk.` metadata of a GGUF file, in which an embedded schedule is written and read.

    ropewalk.format_version                u32
    ropewalk.facts.{n_rot, freq_base, original_context, native_factors, native_attention_factor}
    ropewalk.band_count                    u32
    ropewalk.band.{i}.{context, near_tokens, rescale_factors, start_tokens, attention_factor, force_start_tokens}
    ropewalk.band.{i}.found.{method, onto, objective, data_digest, seed, losses}
    ropewalk.band.{i}.plain.…              the same keys, for the band without its near window; only where it has one

λ and all other fractions are float64, so that a schedule is read back exactly as it was written; None and empty arrays
have no key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..factors import (
    FORMAT_VERSION,
    MAX_LOSSES,
    Schedule,
    ScheduleError,
    check_matches,
    native_band,
    schedule_from_dict,
)
from .facts import native_schedule
from .header import Header
from .kinds import check_has_tensors
from .values import ARRAY, BOOL, EVALUATION, F64, I64, STRING, U32, Value

PREFIX = "ropewalk."
MAX_BANDS = 64


def schedule_values(schedule: Schedule) -> list[Value]:
    """Return the metadata that holds `schedule`, in the order in which it is written.

    Raises:
        ScheduleError: a seed has more than 64 bits, for which GGUF has no type.
    """
    data = schedule.model_dump()
    values = list(_flatten(PREFIX, {"format_version": data["format_version"], "facts": data["facts"]}))
    values.append(Value(f"{PREFIX}band_count", U32, len(schedule.bands)))
    for i, band in enumerate(data["bands"]):
        values.extend(_flatten(f"{PREFIX}band.{i}.", band))
    return values


def _flatten(prefix: str, data: dict[str, Any]) -> Iterator[Value]:
    for name, value in data.items():
        key = prefix + name
        if isinstance(value, dict):
            yield from _flatten(key + ".", value)
        elif isinstance(value, bool):
            yield Value(key, BOOL, value)
        elif isinstance(value, int):
            # A seed may be any 64-bit number; all other integers count tokens, dimensions or bands.
            if not -(2**63) <= value < 2**63:
                raise ScheduleError(f"{key}: {value}, expected a number of at most 64 bits")
            yield Value(key, I64 if name == "seed" else U32, value)
        elif isinstance(value, float):
            yield Value(key, F64, value)
        elif isinstance(value, str):
            yield Value(key, STRING, value)
        elif value:
            yield Value(key, ARRAY, list(value), F64)


def embedded_schedule(header: Header) -> Schedule | None:
    """The schedule that is embedded in a file under `ropewalk.`, or None.

    Raises:
        ScheduleError: there is one, but it is invalid; the message names the file and the key.
    """
    keys = [key for key in header.entries if key.startswith(PREFIX) and not key.startswith(EVALUATION)]
    if not keys:
        return None
    if f"{PREFIX}format_version" not in keys:
        raise ScheduleError(f"{header.path}: {PREFIX}format_version: missing, expected {FORMAT_VERSION}")
    count = header.get(f"{PREFIX}band_count")
    if not isinstance(count, int) or not 1 <= count <= MAX_BANDS:
        raise ScheduleError(f"{header.path}: {PREFIX}band_count: {count!r}, expected 1 to {MAX_BANDS}")
    bands: list[dict[str, Any]] = [{} for _ in range(count)]
    data: dict[str, Any] = {"bands": bands}
    for key in keys:
        names = key.removeprefix(PREFIX).split(".")
        if names == ["band_count"]:
            continue
        group = data
        if names[0] == "band":
            if len(names) < 3 or names[1] not in map(str, range(count)):
                raise ScheduleError(f"{header.path}: {key}: expected bands 0 to {count - 1}")
            group, names = bands[int(names[1])], names[2:]
        for name in names[:-1]:
            group = group.setdefault(name, {})
            if not isinstance(group, dict):
                raise ScheduleError(f"{header.path}: {key}: {name} is a value, expected a group of keys")
        group[names[-1]] = _value(header, key)
    return schedule_from_dict(data, f"{header.path}: {PREFIX[:-1]} metadata")


def _value(header: Header, key: str) -> Any:
    entry = header.entries[key]
    if entry.item_type is None:
        return header.get(key)
    if entry.count > MAX_LOSSES:  # the longest of the arrays
        raise ScheduleError(f"{header.path}: {key}: {entry.count} items, expected at most {MAX_LOSSES}")
    return header.array(key)


def schedule_of(header: Header) -> Schedule:
    """The schedule that a file runs with: its embedded one, or else its native one.

    Raises:
        UserError: the architecture has no RoPE, or the embedded schedule is invalid or for another model.
    """
    native = native_schedule(header)
    embedded = embedded_schedule(header)
    if embedded is None:
        return native
    check_matches(embedded, native.facts, str(header.path))
    return embedded


def trained_schedule(header: Header) -> Schedule:
    """The schedule that a model was trained with: as `schedule_of`, without what was embedded in the file later.

    Raises:
        UserError: as for `schedule_of`, or the file has only a vocabulary.
    """
    check_has_tensors(header)
    schedule = schedule_of(header)
    if embedded_schedule(header) is None:
        return schedule
    return schedule.model_copy(update={"bands": (native_band(schedule.facts),)})
