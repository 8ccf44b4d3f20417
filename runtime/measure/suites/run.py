"""A whole run of the suite on one model: questions, short texts and cache types, all of it in one journal."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....container import read_header, trained_schedule, uncertified_digest
from ....errors import UserError
from ....factors import Band, Schedule, native_band
from ..held_out import BLOCK, draw_blocks, interval
from ..passages import Text, cut
from ..readings import BIN, reader
from .asking import Advance, Bands, SuitePlan, ask_all, band_key
from .caches import CacheLoss, cache_losses
from .haystacks import Essays
from .journal import Journal
from .pen import Pen
from .report import Report, ShortText
from .scoring import Estimate

if TYPE_CHECKING:
    from ...llama import Llama

SHORT_TOKENS, SHORT_PASSAGES = 2048, 4
"""How long the short texts are, at most, and how many there are."""

CACHE_TOKENS = 4096
"""How long the text is on which cache types are compared, at most."""

VERSION = 1
"""Increase it when the same short text would give other losses than before."""


@dataclass(frozen=True)
class Run:
    """All settings of a run.

    Attributes:
        chat: whether prompts go through the chat template; None = if the model has one.
        kv: the cache type of the questions; `caches` are those that are compared with f16 beside them.
    """

    model: Path
    texts: tuple[Text, ...]
    plan: SuitePlan
    chat: bool | None = None
    kv: str = "auto"
    caches: tuple[str, ...] = ()
    threads: int | None = None


@dataclass(frozen=True)
class Setting:
    """What the results depend on, beside the plan."""

    chat: bool
    kv_type: str
    computed_by: str
    texts_digest: str


Progress = Callable[[str], AbstractContextManager[Advance]]
"""Shows the progress of work that is named."""


def run_suite(run: Run, journal: Journal, progress: Progress) -> tuple[Report, Setting]:
    """Ask everything that the journal does not know.

    Raises:
        UserError: as `Llama`; or lengths that are too short for a task, texts that are too short for a length.
    """
    original = trained_schedule(read_header(run.model)).context
    digest = uncertified_digest(run.model)
    with closing(reader(run.model, max(run.plan.lengths), run.kv, run.threads, exact=None)) as llm:
        pen = Pen(llm, run.chat)
        setting = Setting(pen.chat, llm.kv_type, llm.computed_by, texts_digest(run.texts))
        plan = replace(run.plan, bands=_served(llm, run.plan.bands))
        # Before hours are spent on questions: are the texts long enough for the rest?
        passages = _short_passages(llm, run, min(original, SHORT_TOKENS))
        tokens = _one_text(llm, run.texts, min(original, CACHE_TOKENS)) if run.caches else []
        with progress("Asking") as advance:
            answers = tuple(ask_all(llm, Essays(pen, run.texts), pen, plan, journal, digest, advance))
        with progress("Short texts") as advance:
            short = _short_texts(llm, plan, passages, journal, digest, advance)
    with progress("Cache types") as advance:
        caches = _caches(run, tokens, journal, digest, advance) if run.caches else ()
    return Report(answers, original, tuple(short), tuple(caches)), setting


def _served(llm: Llama, bands: Bands) -> Bands:
    """The same bands, without near windows if this model's attention cannot have any; the log says so then."""

    def served(band: Band) -> Band:
        if not band.near_tokens:
            return band
        llm.reset()
        llm.set_schedule(Schedule(facts=llm.schedule.facts, bands=(band,)))
        return llm.schedule.bands[0]

    return {length: {method: served(band) for method, band in found.items()} for length, found in bands.items()}


def texts_digest(texts: Sequence[Text]) -> str:
    """A digest of texts and their order; their names do not matter."""
    return hashlib.sha256(repr([text.text for text in texts]).encode()).hexdigest()[:16]


def _short_passages(llm: Llama, run: Run, n_tokens: int) -> list[list[int]]:
    """The short texts, of `n_tokens` tokens each; none where no length is beyond the trained one."""
    if max(run.plan.lengths) <= trained_schedule(read_header(run.model)).context:
        return []
    bos = llm.tokenize(b"", add_bos=True)
    return [[*bos, *tokens] for _, tokens in cut(llm, run.texts, n_tokens - len(bos), SHORT_PASSAGES)]


def _short_texts(
    llm: Llama, plan: SuitePlan, passages: list[list[int]], journal: Journal, model: str, advance: Advance
) -> list[ShortText]:
    """Each method's band for the longest length against the native band, on short texts."""
    if not passages:
        return []
    longest = max(plan.lengths)
    bands = {method: band for method, band in plan.bands[longest].items() if method != "none"}
    own = native_band(llm.schedule.facts)
    losses: dict[str, list[list[float]]] = {}
    total, done = (len(bands) + 1) * len(passages), 0
    for method, band in {"none": own, **bands}.items():
        for i, tokens in enumerate(passages):
            key = _short_key(llm, model, band, tokens)
            about = {"method": method, "short text": i}
            known = journal.find(key) or journal.add(key, about, {"losses": _bins(llm, band, tokens)})
            losses.setdefault(method, []).append(_checked(known, f"{journal.path}: {key}"))
            done += 1
            advance(done, total)
    return [ShortText(method, longest, _difference(losses[method], losses["none"])) for method in bands]


def _short_key(llm: Llama, model: str, band: Band, tokens: list[int]) -> str:
    parts = (VERSION, BIN, model, llm.kv_type, llm.computed_by, band_key(band), tokens)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _bins(llm: Llama, band: Band, tokens: list[int]) -> list[float]:
    """Mean losses of `BIN` neighbouring tokens each, as many as there are whole ones."""
    llm.reset()
    llm.set_schedule(Schedule(facts=llm.schedule.facts, bands=(band,)))
    losses = llm.token_losses(tokens)
    whole = len(losses) // BIN * BIN
    return [float(mean) for mean in losses[:whole].reshape(-1, BIN).mean(axis=1)]


def _checked(known: dict[str, Any], where: str) -> list[float]:
    try:
        losses = [float(loss) for loss in known["losses"]]
        if not losses or not all(map(math.isfinite, losses)):
            raise ValueError("not the losses of a text")
        return losses
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: is not a reading of a short text") from None


def _difference(ours: list[list[float]], theirs: list[list[float]]) -> Estimate:
    differences = [np.array(a) - np.array(b) for a, b in zip(ours, theirs, strict=True)]
    weights = [np.full(len(found), 1 / len(found)) for found in differences]
    low, high = interval(draw_blocks(differences, weights, block=BLOCK // BIN))
    return Estimate(float(np.mean([found.mean() for found in differences])), low, high)


def _one_text(llm: Llama, texts: Sequence[Text], n_tokens: int) -> list[int]:
    bos = llm.tokenize(b"", add_bos=True)
    ((_, tokens),) = cut(llm, texts, n_tokens - len(bos), 1)
    return [*bos, *tokens]


def _caches(run: Run, tokens: list[int], journal: Journal, model: str, advance: Advance) -> list[CacheLoss]:
    native = trained_schedule(read_header(run.model)).bands[0]

    def load(kv: str) -> Llama:
        return reader(run.model, len(tokens), kv, run.threads, exact=None)

    return cache_losses(load, tokens, native, run.caches, journal, model, advance)
