"""The `ropewalk.` metadata of a GGUF file: the one writer and the one reader of an embedded schedule.

    ropewalk.format_version                u32
    ropewalk.facts.{n_rot, freq_base, original_context, native_factors, native_attention_factor}
    ropewalk.band_count                    u32
    ropewalk.band.{i}.{context, rescale_factors, start_tokens, attention_factor, force_start_tokens}
    ropewalk.band.{i}.found.{method, onto, objective, data_digest, seed, losses}

λ are float64 arrays, so that what is read is what was written; what is None or an empty array has no key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gguf import GGUFValueType

from ..factors import Schedule, ScheduleError, check_matches, schedule_from_dict
from .facts import native_schedule
from .header import Header

PREFIX = "ropewalk."

Item = tuple[str, int, "int | None", Any]
"""(key, value type, item type of an array, value)."""


def schedule_entries(schedule: Schedule) -> list[Item]:
    """The metadata that carries `schedule`, in the order to write it."""
    data = schedule.model_dump()
    items = list(_flatten(PREFIX, {"format_version": data["format_version"], "facts": data["facts"]}))
    items.append((f"{PREFIX}band_count", GGUFValueType.UINT32, None, len(schedule.bands)))
    for i, band in enumerate(data["bands"]):
        items.extend(_flatten(f"{PREFIX}band.{i}.", band))
    return items


def _flatten(prefix: str, data: dict[str, Any]) -> Iterator[Item]:
    for name, value in data.items():
        key = prefix + name
        if isinstance(value, dict):
            yield from _flatten(key + ".", value)
        elif isinstance(value, bool):
            yield key, GGUFValueType.BOOL, None, value
        elif isinstance(value, int):
            # seeds may be any 64-bit number; everything else that is whole is a count of tokens or dimensions
            yield key, GGUFValueType.INT64 if name == "seed" else GGUFValueType.UINT32, None, value
        elif isinstance(value, float):
            yield key, GGUFValueType.FLOAT64, None, value
        elif isinstance(value, str):
            yield key, GGUFValueType.STRING, None, value
        elif value:
            yield key, GGUFValueType.ARRAY, GGUFValueType.FLOAT64, list(value)


def embedded_schedule(header: Header) -> Schedule | None:
    """The schedule that a file carries under `ropewalk.`, or None.

    Raises:
        ScheduleError: there is one, but it is not valid; names the file and the key.
    """
    if f"{PREFIX}format_version" not in header.entries:
        return None
    count = header.get(f"{PREFIX}band_count")
    if not isinstance(count, int) or not 1 <= count <= 64:
        raise ScheduleError(f"{header.path}: {PREFIX}band_count: {count!r}, expected 1 to 64")
    data: dict[str, Any] = {"bands": [{} for _ in range(count)]}
    for key, entry in header.entries.items():
        path = key.removeprefix(PREFIX).split(".")
        if not key.startswith(PREFIX) or path == ["band_count"]:
            continue
        value = entry.value if entry.item_type is None else header.array(key)
        if path[0] == "band" and len(path) > 2 and path[1].isdecimal() and int(path[1]) < count:
            place, path = data["bands"][int(path[1])], path[2:]
        else:
            place = data
        for name in path[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ScheduleError(f"{header.path}: {key}: {name!r} is a value, expected a group of keys")
        place[path[-1]] = value
    return schedule_from_dict(data, f"{header.path}: {PREFIX[:-1]} metadata")


def schedule_of(header: Header) -> Schedule:
    """The schedule that a file runs by: its embedded one, or what it does natively.

    Raises:
        UserError: an architecture without RoPE, or an embedded schedule that is invalid or for another model.
    """
    native = native_schedule(header)
    embedded = embedded_schedule(header)
    if embedded is None:
        return native
    check_matches(embedded, native.facts, str(header.path))
    return embedded
