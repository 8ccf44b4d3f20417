"""Plan the schedule that a model gets, and decide what happens to the factors that it already has.

Those may be its own (what it was trained with: Llama 3's `rope_freqs`, YaRN, linear or LongRoPE scaling) or a schedule
that was embedded before. The plan's note says in one line what was decided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..container import Header, embedded_schedule, plain_context, schedule_of
from ..errors import UserError
from ..factors import MAX_CONTEXT, RopeFacts, Schedule, check_matches, extend, native_band, schedule_from_dict

COMPOSE, REPLACE = "compose", "replace"
EXISTING = (COMPOSE, REPLACE)


@dataclass(frozen=True)
class Plan:
    """The schedule to embed; `note` says what happens to the factors that the file had."""

    schedule: Schedule
    note: str


def plan_extension(
    header: Header, context: int, method: str, existing: str | None = None, near_tokens: int | None = None
) -> Plan:
    """Extend the model of `header` to `context` tokens by a closed form; `near_tokens` as for `extend`.

    `existing` selects what the new bands are multiplied onto:
        None: what the model was trained with; a schedule embedded before is dropped.
        "compose": all factors in the file; an embedded schedule keeps its bands and gets more.
        "replace": plain RoPE; the model's own factors are dropped, too.

    Raises:
        UserError: the method is unknown, the context is not longer than the one to start from, or the near window is
            longer than the original context.
    """
    if existing not in (None, *EXISTING):
        raise UserError(f"existing: {existing!r}, expected {' or '.join(EXISTING)}")
    if context > MAX_CONTEXT:
        raise UserError(f"context: {context}, expected at most {MAX_CONTEXT}")
    base, note = _start(header, existing)
    return Plan(extend(base, context, method, near_tokens=near_tokens), note)


def plan_given(
    header: Header, schedule: Schedule, where: str, context: int | None = None, existing: str | None = None
) -> Plan:
    """Use a given schedule, which comes from `where`, up to `context` tokens if that is given.

    Its factors are complete, so there is nothing to multiply. A schedule that treats the model as plain would lose the
    factors that the model was trained with, so it is only accepted with `existing` "replace".

    Raises:
        UserError: it is for another model, does not reach `context`, or reaches less than the model does without it.
    """
    if existing not in (None, REPLACE):
        raise UserError(
            f"existing: {existing!r}, expected {REPLACE} or nothing with a schedule, whose factors are complete"
        )
    carried = schedule_of(header)
    check_matches(schedule, carried.facts, where)
    original = carried.facts.original_context
    if not _same_start(schedule.facts, carried.facts) and existing != REPLACE:
        raise UserError(
            f"{where}: facts.native_factors are not what {header.path} was trained with"
            f" ({_range(carried.facts.start_factors)}), which would be lost; expected a schedule with them, or"
            " existing: replace"
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
    factors = _describe_factors(header)
    if not factors:
        return Plan(schedule, "the model carried no factors")
    kept = _added_schedule(header) is None and _same_start(schedule.facts, carried.facts)
    return Plan(schedule, f"{factors} is {'part of' if kept else 'replaced by'} {where}")


def _same_start(one: RopeFacts, other: RopeFacts) -> bool:
    """Whether two models were trained with the same factors, to float32 precision."""
    pairs = zip(
        (one.native_attention_factor, *one.start_factors),
        (other.native_attention_factor, *other.start_factors),
        strict=True,
    )
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in pairs)


def _start(header: Header, existing: str | None) -> tuple[Schedule, str]:
    """Return the schedule to which new bands are added, and the note."""
    embedded, factors = _added_schedule(header), _describe_factors(header)
    carried = schedule_of(header)
    if not factors:
        return carried, "the model carried no factors"
    if existing == COMPOSE or (existing is None and embedded is None):
        return carried, f"{factors} is kept, and the new bands are multiplied onto it"
    facts = carried.facts
    if existing is None:
        trained = _as_trained(carried)
        own = f" ({_range(facts.start_factors)})" if facts.native_factors else ""
        return trained, f"{factors} is dropped; the new bands start again from the model as it was trained{own}"
    original = _plain_context(header, carried, factors)
    plain = RopeFacts(n_rot=facts.n_rot, freq_base=facts.freq_base, original_context=original)
    note = f"{factors} is dropped; the new bands start from plain RoPE"
    return Schedule(facts=plain, bands=(native_band(plain),)), note


def _plain_context(header: Header, carried: Schedule, factors: str) -> int:
    """The context that the model supports without any factors; `factors` describes those in messages.

    Raises:
        UserError: the model has factors of its own, and the file does not say for what context it was trained without
            them.
    """
    facts, key = carried.facts, f"{header.arch}.rope.scaling.original_context_length"
    if not facts.native_factors and facts.native_attention_factor == 1:
        return facts.original_context
    if _added_schedule(header) is not None or not header.get(key):
        raise UserError(
            f"{header.path}: existing: {factors} cannot be replaced, as the file does not say for what context the"
            f" model was trained without it ({key}); expected compose"
        )
    return plain_context(header)


def _as_trained(embedded: Schedule) -> Schedule:
    """The model's own bands, from a schedule that was embedded in it."""
    own = tuple(band for band in embedded.bands if band.found.method == "native")
    return Schedule(facts=embedded.facts, bands=own or (native_band(embedded.facts),))


def _added_schedule(header: Header) -> Schedule | None:
    """The schedule that was embedded in a file, unless it is the scaling that the model was trained with."""
    embedded = embedded_schedule(header)
    trained = embedded is None or {band.found.method for band in embedded.bands} == {"native"}
    return None if trained else embedded


def _describe_factors(header: Header) -> str:
    """Describe the factors that a file carries; empty if there are none."""
    embedded = _added_schedule(header)
    if embedded is not None:
        return f"the schedule in the file ({_methods(embedded)}, {embedded.context:,} tokens)"
    native = schedule_of(header)
    plain = not native.facts.native_factors and native.facts.native_attention_factor == 1 and len(native.bands) == 1
    return "" if plain else f"the model's own scaling ({_range(native.bands[-1].rescale_factors)})"


def _methods(schedule: Schedule) -> str:
    return " + ".join(dict.fromkeys(band.found.method for band in schedule.bands))


def _range(factors: tuple[float, ...]) -> str:
    low, high = min(factors), max(factors)
    return f"λ {low:.4g}" if low == high else f"λ {low:.4g} to {high:.4g}"


def _cut(schedule: Schedule, context: int, where: str) -> Schedule:
    """The bands that `context` tokens need, the last of them shortened to `context`."""
    data = schedule.model_dump()
    data["bands"] = data["bands"][: schedule.band_index(context) + 1]
    last = data["bands"][-1]
    for band in (last, last["plain"]):
        if band is not None:
            band["context"] = context
    return schedule_from_dict(data, where)
