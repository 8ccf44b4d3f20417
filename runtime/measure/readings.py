"""How well a model reads long texts in one band: perplexity by position, and whether it finds a hidden key.

Both come from one reading: the key is in the text whose tokens are scored, and is asked for at its end. A reading is
small, so that many of them, over methods, contexts and texts, can be saved as lines of JSON.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...container import read_header, trained_schedule
from ...errors import UserError
from ...factors import METHODS, Band, Schedule, extend, plain_band
from ..llama import Llama
from ..losses import Losses
from .held_out import BLOCK, draw_blocks, interval
from .keyed_lines import KeyedLines, LineKind
from .passages import DEPTHS, Text, cut
from .passkey import HiddenKey, plant_key, read_key

VERSION = 1  # increase it when a reading of the same passage would give different numbers than before

MAX_LOSS = 1e6  # nats; no model's logits are that far apart

BIN = 64
"""Number of tokens whose losses are saved as one mean."""


@dataclass(frozen=True)
class KeyPassage:
    """A passage with a pass key hidden in it, `depth` (0 to 1) of the way through."""

    name: str
    depth: float
    hidden: HiddenKey

    @property
    def tokens(self) -> list[int]:
        return self.hidden.tokens


@dataclass(frozen=True)
class Reading:
    """A model's reading of a passage.

    Attributes:
        losses: mean loss (nats) of each bin of `BIN` tokens of the text from its second on; the last may be smaller.
        n_scored: number of tokens of the text that were scored.
        key_loss: mean loss (nats) on the key's digits.
        key_found: whether the model's answer is the key.
        said: that answer.
    """

    losses: tuple[float, ...]
    n_scored: int
    key_loss: float
    key_found: bool
    said: str
    seconds: float

    def mean(self, start: int = 0, stop: int | None = None) -> float:
        """Mean loss of the text's tokens at positions from `start` to `stop`, widened to whole bins."""
        losses, shares = self.bins(start, stop)
        return float(losses @ shares)

    def bins(self, start: int = 0, stop: int | None = None) -> tuple[Losses, Losses]:
        """The losses of that range's bins, and their weights: each bin's share of the tokens."""
        sizes = np.full(len(self.losses), float(BIN))
        sizes[-1] = self.n_scored - BIN * (len(sizes) - 1)
        first = min(start // BIN, len(sizes) - 1)
        within = slice(first, None if stop is None else max(first + 1, -(-stop // BIN)))
        return np.array(self.losses[within]), sizes[within] / sizes[within].sum()


@dataclass(frozen=True)
class Difference:
    """The loss (nats per token) in one band minus that in another on the same passages, with its 95 % interval."""

    difference: float
    low: float
    high: float


def compared(ours: Sequence[Reading], theirs: Sequence[Reading], start: int = 0) -> Difference:
    """Compare the losses at positions from `start` on, by a bootstrap over blocks of neighbours within each passage."""
    pairs = [(a.bins(start), b.bins(start)) for a, b in zip(ours, theirs, strict=True)]
    differences, shares = [a - b for (a, _), (b, _) in pairs], [shares for (_, shares), _ in pairs]
    low, high = interval(draw_blocks(differences, shares, block=BLOCK // BIN))
    means = [d @ w for d, w in zip(differences, shares, strict=True)]
    return Difference(float(np.mean(means)), low, high)


def key_passages(llm: Llama, texts: Sequence[Text], context: int, count: int, seed: int = 0) -> list[KeyPassage]:
    """Cut `count` passages of `context` tokens, with keys at each of `DEPTHS` in turn.

    Raises:
        UserError: the texts are too short; says how much is missing.
    """
    rng = random.Random(seed)
    n_bos = len(llm.tokenize(b"", add_bos=True))
    passages: list[KeyPassage] = []
    for name, tokens in cut(llm, texts, context - n_bos, count):
        depth = DEPTHS[len(passages) % len(DEPTHS)]
        hidden = plant_key(llm, tokens, str(rng.randrange(10_000, 100_000)), depth)
        passages.append(KeyPassage(name, depth, hidden))
    return passages


def band_by_method(method: str, context: int, native: Schedule, own: Schedule | None) -> Band:
    """Return the band in which `method` reads `context` tokens.

    That is none, schedule, plain (the schedule without its near windows), or the name of a closed form.

    `native` is what the model was trained with; closed forms do not change it up to its own context.

    Raises:
        UserError: no such method, no schedule, or a schedule that is too short.
    """
    if method in ("schedule", "plain"):
        if own is None:
            raise UserError(f"method {method}: the model has no schedule and none was given")
        band = own.bands[own.band_index(context)]
        return band if method == "schedule" else plain_band(native.facts, band)
    if method != "none" and method not in METHODS:
        raise UserError(f"method: {method!r}, expected none, schedule, plain, {', '.join(METHODS)}")
    if method == "none" or context <= native.context:
        band = native.bands[native.band_index(min(context, native.context))]
        return band.model_copy(update={"context": max(context, band.context)})
    return extend(native, context, method, contexts=[context]).bands[-1]


def reader(path: Path, n_ctx: int, kv: str = "auto", threads: int | None = None, exact: bool | None = True) -> Llama:
    """Load a model to read passages of up to `n_ctx` tokens, in any band.

    Raises:
        UserError: as `Llama`.
    """
    native = trained_schedule(read_header(path))
    band = native.bands[-1].model_copy(update={"context": max(n_ctx, native.context)})
    return Llama(
        path,
        schedule=Schedule(facts=native.facts, bands=(band,)),
        n_ctx=n_ctx,
        kv=kv,
        flash_attn=True,
        exact=exact,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )


def read_passage(llm: Llama, passage: KeyPassage, band: Band) -> Reading:
    """Read a passage from its first token on in `band`, score its text, and ask for the key.

    Raises:
        UserError: the passage does not fit.
    """
    hidden, tokens = passage.hidden, passage.tokens
    band = band.model_copy(update={"context": max(band.context, len(tokens))})
    start = max(1, len(llm.tokenize(b"", add_bos=True)))
    llm.reset()
    found = read_key(llm, hidden, Schedule(facts=llm.schedule.facts, bands=(band,)), start)
    text = found.losses[: len(hidden.text) - start]
    return Reading(
        losses=tuple(float(text[at : at + BIN].mean()) for at in range(0, len(text), BIN)),
        n_scored=len(text),
        key_loss=found.key_loss,
        key_found=found.answer.startswith(hidden.key),
        said=found.answer,
        seconds=found.seconds,
    )


class Readings(KeyedLines[Reading]):
    """Readings saved in a JSON Lines file (None = not saved); one whose losses are not finite is refused."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path, LineKind("a reading of ropewalk eval", "about", "reading", _reading, _encoded))


def _encoded(reading: Reading) -> dict[str, Any]:
    if not _is_finite(reading):
        raise UserError("the model's losses are not finite numbers: its weights or its schedule are broken")
    return asdict(reading)


def _is_finite(reading: Reading) -> bool:
    return math.isfinite(reading.seconds) and all(abs(loss) < MAX_LOSS for loss in (*reading.losses, reading.key_loss))


def reading_key(model: str, kv_type: str, band: Band, passage: KeyPassage) -> str:
    """A digest of all that a reading depends on; `model` is the file's digest."""
    facts = band.model_dump_json(exclude={"found", "context", "force_start_tokens", "plain"})
    return hashlib.sha256(repr((VERSION, BIN, model, kv_type, facts, passage.tokens)).encode()).hexdigest()[:24]


def _reading(data: dict[str, Any]) -> Reading:
    """Create a reading from decoded JSON; a TypeError or ValueError if that is not one."""
    losses = tuple(float(loss) for loss in data.pop("losses"))
    reading = Reading(losses=losses, **data)
    kinds = tuple(map(type, (reading.n_scored, reading.key_found, reading.said)))
    n_bins = -(-reading.n_scored // BIN) if kinds == (int, bool, str) else 0
    if len(losses) != n_bins or not n_bins or not _is_finite(reading):
        raise ValueError("not the numbers of a reading")
    return reading
