"""The rescale schedule: the ordered bands of one model, as immutable, validated data, and its JSON file.

Pair *i* of the rotary dimensions is rotated by ``pos * freq_base**(-2i/n_rot) / rescale_factors[i]`` (LongRoPE,
arXiv 2402.13753, equation 2); positions below ``start_tokens`` keep the factors the model was trained with.
In a band with a near window of W = ``near_tokens``, a token sees those nearer than W as the model was trained to, and
the factors act on distances beyond it alone: where θ_i is the model's own angle of pair *i* per token, the angle over
a distance of d tokens is

    θ_i d                                      for d < W
    θ_i W + θ_i (d − W) / rescale_factors[i]   for d ≥ W

(leaky ReRoPE, by Jianlin Su, with one factor for all pairs).
Every instance of these types is valid: all checks happen when it is created.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import UserError
from ..files import write_file

FORMAT_VERSION: Final = 2

NEW_IN_VERSION_2 = ("near_tokens", "plain")
"""Keys of a band that files of version 1 do not have."""

START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
"""The numbers of start tokens that LongRoPE searches over (its table 1, extended to 32)."""

MONOTONE_METHODS = frozenset(
    {"native", "pi", "ntk", "dynamic-ntk", "yarn", "near", "longrope", "cma", "gradient", "evolution"}
)
"""Methods whose factors never decrease with the dimension (for longrope and the searches: section 3.2's constraint),
but for the first ones that stand still beyond a near window."""

MAX_CONTEXT = 2**31 - 1  # llama.cpp counts positions in int32
MAX_FILE_BYTES = 64 << 20
MAX_LOSSES = 1 << 17  # of one band's search; a GGUF file's metadata holds no more

SMALLEST_FACTOR = 1e-6
"""The least λ: angles grow with 1/λ, and ggml computes them in float32. A large one does no harm, the pair stands still
(1e30 marks such pairs in Gemma 4)."""

STILL_FACTOR = 1e6
"""λ from which a pair stands still beyond a near window: it turns by no more than a radian within a million tokens.

In a band with a near window, the fastest pairs may do so: the phases of distances of many turns are noise to a model
that was not trained for them, and a constant is worth more (SmolLM2-135M, 65,536 tokens, W = 2,048: 0.054 nats, with
the pairs that turn within 1.5 W)."""

SMALLEST_ATTENTION, LARGEST_ATTENTION = 0.1, 10.0
"""The range of attention factors; the scores of attention change by their square. Known models have 0.7 to 1.6."""

Context = Annotated[int, Field(gt=0, le=MAX_CONTEXT)]
Factor = Annotated[float, Field(ge=SMALLEST_FACTOR, allow_inf_nan=False)]
Factors = Annotated[tuple[Factor, ...], Field(max_length=1 << 16)]
Attention = Annotated[float, Field(ge=SMALLEST_ATTENTION, le=LARGEST_ATTENTION, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=4096)]


class ScheduleError(UserError):
    """A schedule that is malformed, or for another model."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RopeFacts(_Frozen):
    """The facts about a model that its schedule depends on.

    ``native_factors`` are the λ the model was trained with (for example Llama 3's ``rope_freqs``), with its own
    attention factor; an empty tuple stands for all ones.
    """

    n_rot: Annotated[int, Field(gt=0, le=1 << 17, multiple_of=2)]
    freq_base: Annotated[float, Field(gt=1, lt=1e30, allow_inf_nan=False)]
    original_context: Context
    native_factors: Factors = ()
    native_attention_factor: Attention = 1.0

    @model_validator(mode="after")
    def _check_length(self) -> RopeFacts:
        if self.native_factors and len(self.native_factors) != self.n_rot // 2:
            raise ValueError(
                f"native_factors: {len(self.native_factors)} numbers, expected n_rot/2 = {self.n_rot // 2}"
            )
        return self

    @property
    def start_factors(self) -> tuple[float, ...]:
        """The λ of start tokens: those the model was trained with, shape ``(n_rot/2,)``."""
        return self.native_factors or (1.0,) * (self.n_rot // 2)


class Provenance(_Frozen):
    """How a band was found.

    ``onto`` names the method whose factors these were multiplied onto, if the model already had some.
    """

    method: Text = "unknown"
    onto: Text | None = None
    objective: Text | None = None
    data_digest: Text | None = None
    seed: int | None = None
    losses: Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], Field(max_length=MAX_LOSSES)] = ()


class Band(_Frozen):
    """One set of λ, n̂ and attention factor, and the longest context (in tokens) it serves.

    With a near window (``near_tokens`` above 0), ``rescale_factors`` are those of the distances beyond it, and
    ``plain`` is the band for the same context without one, for whatever computes attention in its own way.
    """

    context: Context
    near_tokens: Annotated[int, Field(ge=0, le=MAX_CONTEXT)] = 0
    rescale_factors: Factors
    start_tokens: Annotated[int, Field(ge=0, le=MAX_CONTEXT)] = 0
    attention_factor: Attention = 1.0
    force_start_tokens: bool = False
    found: Provenance = Provenance()
    plain: Band | None = None

    @field_validator("plain", mode="before")
    @classmethod
    def _check_plain(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("plain") is not None:
            raise ValueError("expected no plain band in a plain band")
        return value

    @model_validator(mode="after")
    def _check_window(self) -> Band:
        if self.near_tokens >= self.context:
            raise ValueError(f"near_tokens: {self.near_tokens}, expected less than the context, {self.context}")
        if self.near_tokens and self.start_tokens > self.near_tokens:
            raise ValueError(f"start_tokens: {self.start_tokens}, expected at most near_tokens, {self.near_tokens}")
        if self.plain is not None:
            if not self.near_tokens:
                raise ValueError("plain: there already, expected it in a band with near_tokens alone")
            if self.plain.near_tokens or self.plain.context != self.context:
                raise ValueError(f"plain: expected a band without near_tokens for the same context, {self.context}")
        return self

    @model_validator(mode="after")
    def _check_values(self) -> Band:
        if self.start_tokens not in START_TOKENS and not self.force_start_tokens:
            raise ValueError(
                f"start_tokens: {self.start_tokens}, expected one of {', '.join(map(str, START_TOKENS))}"
                " (or force_start_tokens)"
            )
        if self.start_tokens > self.context:
            raise ValueError(f"start_tokens: {self.start_tokens}, expected at most the context, {self.context}")
        factors = self.rescale_factors
        if self.found.method in MONOTONE_METHODS - {"native"} and self.found.onto is None:
            for i in range(self.still_pairs + 1, len(factors)):
                if factors[i] < factors[i - 1]:
                    raise ValueError(
                        f"rescale_factors.{i}: {factors[i]:g} after {factors[i - 1]:g},"
                        f" expected non-decreasing numbers from {self.found.method}"
                    )
        return self

    @property
    def still_pairs(self) -> int:
        """How many of the fastest pairs stand still beyond the near window; 0 without a window.

        The slowest pair counts as one that moves.
        """
        if not self.near_tokens:
            return 0
        last = len(self.rescale_factors) - 1
        return next((i for i, factor in enumerate(self.rescale_factors[:last]) if factor < STILL_FACTOR), last)

    @property
    def moving_factors(self) -> tuple[float, ...]:
        """λ of the pairs that do not stand still."""
        return self.rescale_factors[self.still_pairs :]


class Schedule(_Frozen):
    """The rescale schedule of one model: its facts, and one or more bands in increasing context."""

    format_version: Literal[2] = 2
    facts: RopeFacts
    bands: Annotated[tuple[Band, ...], Field(min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _check_bands(self) -> Schedule:
        half = self.facts.n_rot // 2
        for i, band in enumerate(self.bands):
            if len(band.rescale_factors) != half:
                raise ValueError(
                    f"bands.{i}.rescale_factors: {len(band.rescale_factors)} numbers, expected n_rot/2 = {half}"
                )
            if i and band.context <= self.bands[i - 1].context:
                raise ValueError(
                    f"bands.{i}.context: {band.context}, expected more than {self.bands[i - 1].context},"
                    " that of the band before it"
                )
            _check_far_factors(band, self.facts, f"bands.{i}")
        return self

    @property
    def context(self) -> int:
        """The context of the last band, in tokens: the longest."""
        return self.bands[-1].context

    def band_index(self, n_tokens: int) -> int:
        """Index of the smallest band that holds `n_tokens`.

        Raises:
            ScheduleError: no band holds that many.
        """
        for i, band in enumerate(self.bands):
            if n_tokens <= band.context:
                return i
        raise ScheduleError(f"{n_tokens} tokens are more than the {self.context} that the model's last band holds")

    def only(self, index: int) -> Schedule:
        """This schedule with only band `index`, which then applies from the first token."""
        return self.model_copy(update={"bands": (self.bands[index],)})


def _check_far_factors(band: Band, facts: RopeFacts, where: str) -> None:
    """Refuse a near window that the model was not trained for, and distances beyond it that are not compressed."""
    if not band.near_tokens:
        return
    if band.near_tokens > facts.original_context:
        raise ValueError(
            f"{where}.near_tokens: {band.near_tokens}, expected at most the original context, {facts.original_context}"
        )
    for pair, (factor, own) in enumerate(zip(band.rescale_factors, facts.start_factors, strict=True)):
        if factor < own * (1 - 1e-6):
            raise ValueError(
                f"{where}.rescale_factors.{pair}: {factor:g}, expected at least {own:g} beyond the near window"
            )
    if band.plain is not None and len(band.plain.rescale_factors) != facts.n_rot // 2:
        raise ValueError(
            f"{where}.plain.rescale_factors: {len(band.plain.rescale_factors)} numbers, expected n_rot/2 ="
            f" {facts.n_rot // 2}"
        )


def native_band(facts: RopeFacts) -> Band:
    """The band with the context and factors that the model was trained with."""
    return Band(
        context=facts.original_context,
        rescale_factors=facts.start_factors,
        attention_factor=facts.native_attention_factor,
        found=Provenance(method="native"),
    )


def check_matches(schedule: Schedule, facts: RopeFacts, where: str) -> None:
    """Refuse a schedule for a model with other rotary dimensions or another base.

    Raises:
        ScheduleError: a fact differs; names `where`, the fact and both values.
    """
    for name in ("n_rot", "freq_base"):
        theirs, ours = getattr(schedule.facts, name), getattr(facts, name)
        if not math.isclose(theirs, ours, rel_tol=1e-6):
            raise ScheduleError(f"{where}: the schedule is for {name} {theirs:g}, the model has {ours:g}")


def schedule_from_dict(data: Any, where: str) -> Schedule:
    """Validate decoded JSON (or GGUF metadata) as a schedule; errors name `where` and the key.

    Of format version 1 it becomes one of version 2, which has all that version 1 has with the same meaning.

    Raises:
        ScheduleError: for the first error found.
    """
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ScheduleError(
            f"{where}: format_version {_short(version)} is newer than this version of ropewalk reads ({FORMAT_VERSION})"
        )
    if version == 1:
        data = _as_version_2(data, where)
    try:
        return Schedule.model_validate(data)
    except ValidationError as error:
        raise ScheduleError(f"{where}: {first_mistake(error)}") from None


def _as_version_2(data: dict[str, Any], where: str) -> dict[str, Any]:
    bands = data.get("bands")
    for i, band in enumerate(bands if isinstance(bands, list) else ()):
        for name in NEW_IN_VERSION_2:
            if isinstance(band, dict) and name in band:
                raise ScheduleError(f"{where}: bands.{i}.{name}: not in format_version 1, expected format_version 2")
    return {**data, "format_version": FORMAT_VERSION}


LONGEST_KEY = 60  # characters of a key in a message


def first_mistake(error: ValidationError) -> str:
    """Return the first thing that these types found wrong with their values, in one line with its key."""
    first = error.errors(include_url=False)[0]
    key = ".".join(_printable(str(part)[:LONGEST_KEY]) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] in ("value_error", "missing") else f", found {_short(first['input'])}"
    return f"{key + ': ' if key else ''}{message}{found}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return "groups in groups"
    return text if len(text) <= 40 else text[:37] + "..."


def _printable(text: str) -> str:
    """Return `text` with control characters and lone surrogates, which no terminal should get, as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def read_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read a schedule's JSON file.

    Raises:
        ScheduleError: the file is missing, unreadable, not JSON, or not a valid schedule.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ScheduleError(f"{path}: more than {MAX_FILE_BYTES >> 20} MB, expected a schedule in JSON")
        data = json.loads(raw)
    except OSError as error:
        raise ScheduleError(f"{path}: cannot read the schedule: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ScheduleError):
            raise
        raise ScheduleError(f"{path}: not a JSON file: {error}") from None
    return schedule_from_dict(data, str(path))


def write_schedule(schedule: Schedule, path: str | os.PathLike[str]) -> None:
    """Write a schedule's JSON file, whole or not at all.

    Raises:
        ScheduleError: `path` cannot be written.
    """
    try:
        write_file(path, (schedule.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise ScheduleError(f"{path}: cannot write the schedule: {error.strerror or error}") from None
