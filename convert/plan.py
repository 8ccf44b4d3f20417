"""Which schedule a model is to get, and what becomes of the factors it carries already.

Those may be its own (what it was trained with: Llama 3's `rope_freqs`, YaRN, linear or LongRoPE scaling) or a schedule
that was embedded before. Whatever is chosen, the plan says it in one line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..container import Header, embedded_schedule, native_schedule, plain_context, schedule_of
from ..errors import UserError
from ..factors import RopeFacts, Schedule, check_matches, extend, native_band, schedule_from_dict
from ..factors.schedule import MAX_CONTEXT

COMPOSE, REPLACE = "compose", "replace"
EXISTING = (COMPOSE, REPLACE)


@dataclass(frozen=True)
class Plan:
    """The schedule to embed; `note` says what became of the factors that the file carried."""

    schedule: Schedule
    note: str


def plan_extension(header: Header, context: int, method: str, existing: str | None = None) -> Plan:
    """Extend the model that `header` heads to `context` tokens by a closed form.

    What the new bands multiply onto, by `existing`:
        None: what the model was trained with; a schedule embedded before is dropped.
        "compose": all that the file carries; an embedded schedule keeps its bands and gets more.
        "replace": plain RoPE; the model's own factors are dropped, too.

    Raises:
        UserError: an unknown method, or a context that is not above what there is to start from.
    """
    if existing not in (None, *EXISTING):
        raise UserError(f"existing: {existing!r}, expected {' or '.join(EXISTING)}")
    if context > MAX_CONTEXT:
        raise UserError(f"context: {context}, expected at most {MAX_CONTEXT}")
    base, note = _start(header, existing)
    return Plan(extend(base, context, method), note)


def plan_given(
    header: Header, schedule: Schedule, where: str, context: int | None = None, existing: str | None = None
) -> Plan:
    """Use a schedule from elsewhere (`where`), up to `context` tokens if that is given.

    Its factors are whole, so there is nothing to multiply; but one made as if the model were plain would lose the
    factors that it was trained with, and is taken with `existing` "replace" only.

    Raises:
        UserError: it is for another model, does not reach `context`, or reaches less than the model does as it is.
    """
    if existing not in (None, REPLACE):
        raise UserError(
            f"existing: {existing!r}, expected {REPLACE} or nothing with a schedule, whose factors are whole"
        )
    carried = schedule_of(header)
    check_matches(schedule, carried.facts, where)
    original = carried.facts.original_context
    if not _same_start(schedule.facts, carried.facts) and existing != REPLACE:
        raise UserError(
            f"{where}: facts.native_factors are not what {header.path} was trained with"
            f" ({_range(carried.facts.start_factors)}), which would be lost; expected them in it, or existing: replace"
        )
    if context is not None:
        if context < original:
            raise UserError(f"context: {context}, expected at least the {original} tokens the model was trained for")
        if context > schedule.context:
            raise UserError(f"context: {context}, but {where} reaches {schedule.context} tokens")
        schedule = _cut(schedule, context, where)
    if schedule.context < original:
        raise UserError(
            f"{where}: reaches {schedule.context} tokens, expected at least the {original} the model was trained for"
        )
    what = _what(header)
    if not what:
        return Plan(schedule, "the model carried no factors")
    kept = embedded_schedule(header) is None and _same_start(schedule.facts, carried.facts)
    return Plan(schedule, f"{what} is {'part of' if kept else 'replaced by'} {where}")


def _same_start(one: RopeFacts, other: RopeFacts) -> bool:
    """Whether two models were trained with the same factors, as far as float32 tells."""
    pairs = zip(
        (one.native_attention_factor, *one.start_factors),
        (other.native_attention_factor, *other.start_factors),
        strict=True,
    )
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in pairs)


def _start(header: Header, existing: str | None) -> tuple[Schedule, str]:
    """The schedule that new bands go onto, and the note."""
    embedded, what = embedded_schedule(header), _what(header)
    carried = schedule_of(header)
    if not what:
        return carried, "the model carried no factors"
    if existing == COMPOSE or (existing is None and embedded is None):
        return carried, f"{what} is kept, and the new bands are multiplied onto it"
    facts = carried.facts
    if existing is None:
        trained = _as_trained(carried)
        own = f" ({_range(facts.start_factors)})" if facts.native_factors else ""
        return trained, f"{what} is dropped; the new bands start again from the model as it was trained{own}"
    original = _plain_context(header, carried, what)
    plain = RopeFacts(n_rot=facts.n_rot, freq_base=facts.freq_base, original_context=original)
    return Schedule(facts=plain, bands=(native_band(plain),)), f"{what} is dropped; the new bands start from plain RoPE"


def _plain_context(header: Header, carried: Schedule, what: str) -> int:
    """The context that the model holds without any factors.

    Raises:
        UserError: the model's own factors are more than a schedule embedded before, and the file does not say what it
            was trained for without them.
    """
    facts, key = carried.facts, f"{header.arch}.rope.scaling.original_context_length"
    if not facts.native_factors and facts.native_attention_factor == 1:
        return facts.original_context
    if embedded_schedule(header) is not None or not header.get(key):
        raise UserError(
            f"{header.path}: existing: {what} cannot be replaced, as the file does not say for what context the model"
            f" was trained without ({key}); expected compose"
        )
    return plain_context(header)


def _as_trained(embedded: Schedule) -> Schedule:
    """The bands that are the model's own, from a schedule that was embedded in it."""
    own = tuple(band for band in embedded.bands if band.found.method == "native")
    return Schedule(facts=embedded.facts, bands=own or (native_band(embedded.facts),))


def _what(header: Header) -> str:
    """What factors a file carries, in words; empty if none."""
    embedded = embedded_schedule(header)
    if embedded is not None:
        return f"the schedule in the file ({_methods(embedded)}, {embedded.context:,} tokens)"
    native = native_schedule(header)
    plain = not native.facts.native_factors and native.facts.native_attention_factor == 1 and len(native.bands) == 1
    return "" if plain else f"the model's own scaling ({_range(native.bands[-1].rescale_factors)})"


def _methods(schedule: Schedule) -> str:
    return " + ".join(dict.fromkeys(band.found.method for band in schedule.bands))


def _range(factors: tuple[float, ...]) -> str:
    low, high = min(factors), max(factors)
    return f"λ {low:.4g}" if low == high else f"λ {low:.4g} to {high:.4g}"


def _cut(schedule: Schedule, context: int, where: str) -> Schedule:
    """The bands that `context` tokens need, the last of them serving no more than that."""
    data = schedule.model_dump()
    data["bands"] = data["bands"][: schedule.band_index(context) + 1]
    data["bands"][-1]["context"] = context
    return schedule_from_dict(data, where)
