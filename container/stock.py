"""How stock llama.cpp runs a file: which factors it reads, and which parts of the schedule it cannot follow."""

from __future__ import annotations

from ..factors import Band, Schedule, plain_band
from .architectures import KNOWN_ARCHITECTURES, LLAMA_CPP_PYTHON, takes_native_factors
from .facts import native_schedule
from .header import Header
from .schedule_keys import schedule_of


def what_stock_does(header: Header) -> list[str]:
    """Return sentences on how stock llama.cpp, and programs built on it, will run this file."""
    if header.arch not in KNOWN_ARCHITECTURES:
        return [f"does not know the architecture {header.arch!r} (as of llama-cpp-python {LLAMA_CPP_PYTHON})."]
    schedule, native = schedule_of(header), native_schedule(header)
    if schedule == native and len(schedule.bands) == 1:
        return [f"runs it as it is, up to {schedule.context:,} tokens."]
    first, last = (plain_band(schedule.facts, schedule.bands[i]) for i in (0, -1))
    if not takes_native_factors(header):
        scaled = native.bands[-1]
        if native.context >= schedule.context and set(scaled.rescale_factors) != {1.0}:
            return [
                f"cannot take rescale factors for this {header.arch!r} model: it runs the file with the scaling of its"
                f" metadata, up to {native.context:,} tokens, whose factors differ by up to"
                f" {_difference(scaled, last):.0%}. Run it with ropewalk."
            ]
        return [
            f"cannot take rescale factors for this {header.arch!r} model: it runs the file as if it were not extended,"
            f" which holds for {schedule.bands[0].context:,} tokens. Run it with ropewalk."
        ]
    if len(schedule.bands) == 1:
        return [f"runs it with its only band, up to {last.context:,} tokens.", *_without_window(schedule)]
    lines = [
        f"with a context of at most {native.bands[0].context:,} tokens it uses the first band, with a longer one the"
        f" last (up to {last.context:,}), from the first token on, and never changes."
    ]
    if len(schedule.bands) > 2:
        between = len(schedule.bands) - 2
        lines.append("The band between them is not used." if between == 1 else f"The {between} between are not used.")
    if first.attention_factor != last.attention_factor:
        lines.append(
            f"The last band's attention factor, {last.attention_factor:.4g}, is used for short contexts too,"
            f" where {first.attention_factor:.4g} would be right."
        )
    if first.start_tokens or last.start_tokens:
        lines.append(f"Start tokens ({last.start_tokens}) are rescaled like all others.")
    return [*lines, *_without_window(schedule)]


def _without_window(schedule: Schedule) -> list[str]:
    """Say what the last band loses without its near window, if it has one: in nats, where a search has measured it."""
    band = schedule.bands[-1]
    if not band.near_tokens:
        return []
    plain = plain_band(schedule.facts, band)
    line = f"It has no near window ({band.near_tokens:,} tokens): it reads with plain λ ({plain.found.method})"
    losses = _losses_with_and_without(band, plain)
    return [line + ("." if losses is None else f", at a loss of {losses[1]:.4g} where the window has {losses[0]:.4g}.")]


def _losses_with_and_without(band: Band, plain: Band) -> tuple[float, float] | None:
    """Losses of a band and of its plain form on the same passages, as far as they are known.

    A search keeps its band's loss and, after it, YaRN's.
    """
    if len(band.found.losses) < 2:
        return None
    if plain.found.method == "yarn":
        return band.found.losses[0], band.found.losses[1]
    if plain.found.losses and plain.found.data_digest == band.found.data_digest:
        return band.found.losses[0], plain.found.losses[0]
    return None


def _difference(native: Band, other: Band) -> float:
    """Return by how much the angle of a pair differs at most, relative to the other's, attention factors included."""
    pairs = zip(native.rescale_factors, other.rescale_factors, strict=True)
    factors = max(abs(b / a - 1) for a, b in pairs)
    return max(factors, abs(native.attention_factor / other.attention_factor - 1))
