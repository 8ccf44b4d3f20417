"""Search of a model's schedule: one band after another, each judged on held-out texts.

All intermediate results are saved in one folder (`SearchPlan.folder`): a journal of evaluations for each band, and the
held-out readings. A search that was killed resumes from there and ends with the same schedule.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ...container import check_has_tensors, model_digest, read_header, schedule_of
from ...errors import UserError
from ...factors import Band, Schedule, check_matches, doubling_contexts, last_without_window, plain_band
from ...factors.search import (
    Budget,
    Engine,
    Event,
    InProcess,
    Note,
    Outcome,
    Processes,
    Screening,
    Settings,
    Space,
    band_key,
    carried,
    search,
    usual_near_tokens,
)
from ...files import write_file
from ..llama import Llama
from ..losses import Losses
from ..memory import check_kv_type
from ..threads import default_threads
from .evaluators import EvaluatorRecipe, faster, make_evaluator
from .evaluators.spec import EvaluatorSpec, Kind
from .held_out import Verdict, verdict
from .passages import Passage, Text, digest, make_passages, split_texts

if TYPE_CHECKING:
    from .evaluators.llama import LlamaEvaluator
    from .evaluators.torch import TorchEvaluator

PASSAGES, HELD_PASSAGES = 3, 2  # per band, if the texts hold as many

END_COST = 1.3
"""Cost of reading a token at a passage's end, relative to the average: it attends to more tokens."""


@dataclass(frozen=True)
class SearchPlan:
    """What to search, and how.

    Attributes:
        model: a GGUF file; bands go beyond the last one that it has, on top of its last without a near window.
        texts: some to search on, others to judge by (`split_texts`).
        contexts: of the bands, rising.
        folder: for intermediate results.
        settings: its budget is for all bands together; a time includes the judging.
        objective: what is scored; see `passages`.
        passages, held_passages: number of passages to search on and to judge by, per band; None = 3 and 2, or as many
            as the texts hold, and as the time allows if neither is given.
        window: tokens at a passage's end that screening reads, at most.
        kv: cache type for llama.cpp.
        evaluator: llama, torch, or auto = the one that is faster on this machine.
        engine: local = this process, or several for `workers` above 1; ray = a cluster.
        threads: CPU threads of each worker; None = its share of the cores.
        ray_address: of the cluster; None = one on this machine.
        readjust: search the model's own band as well, at its own context, as for a model that was fine-tuned.
        near_tokens: the near windows to choose from, 0 for none; None = none, and 512 and its doubles up to half the
            original context.
        start: a schedule of this model found before. Its bands for the contexts that are searched are seeds. Their
            plain forms are also read in full, and are the plain forms of bands with a near window, unless YaRN's or
            one that is found is better; without it, YaRN's or one that is found.
    """

    model: Path
    texts: tuple[Text, ...]
    contexts: tuple[int, ...]
    folder: Path
    settings: Settings = field(default_factory=lambda: Settings(screening=Screening(allowed=True)))
    objective: str = "tail"
    passages: int | None = None
    held_passages: int | None = None
    window: int = 1024
    kv: str = "f16"
    evaluator: Literal["auto", "llama", "torch"] = "auto"
    engine: Literal["local", "ray"] = "local"
    workers: int = 1
    threads: int | None = None
    ray_address: str | None = None
    readjust: bool = False
    near_tokens: tuple[int, ...] | None = None
    start: Schedule | None = None


@dataclass(frozen=True)
class FoundBand:
    """One band of the result."""

    outcome: Outcome
    verdict: Verdict


@dataclass(frozen=True)
class Judging:
    """An event: `done` of `total` held-out readings are done."""

    context: int
    done: int
    total: int


@dataclass(frozen=True)
class Searching:
    """An event: the search of the band for `context` starts."""

    context: int
    evaluator: Kind
    speeds: dict[Kind, float]


SearchEvent = Event | Judging | Searching


def search_schedule(
    plan: SearchPlan, on_event: Callable[[SearchEvent], None] = lambda event: None
) -> tuple[Schedule, tuple[FoundBand, ...]]:
    """Search each band in turn, starting from the one before; return the whole schedule, and how each was found.

    Raises:
        UserError: texts too short, a model without RoPE, a journal of another search, a budget too small, …; results
            so far are kept.
    """
    base = _base(plan.model)
    _check(plan, base)
    contexts = [*([base.context] if plan.readjust else []), *plan.contexts]
    plan = replace(plan, texts=_long_enough(plan, contexts[-1], on_event))
    # The longest band first, so that texts that are too short are reported with all that is missing.
    jobs = [_make_job(plan, base, context, contexts) for context in reversed(contexts)][::-1]
    _make_folder(plan.folder)
    bands, found = list(base.bands), []
    start: tuple[Space, Band] | None = None
    correlation: float | None = None
    for job in jobs:
        outcome, kind = _search_band(plan, job, start, correlation, on_event)
        found.append(FoundBand(outcome, _judge(plan, job, outcome, _judge_kind(kind), on_event)))
        if job.space.context > base.context:
            bands.append(outcome.band)
            start, correlation = (job.space, outcome.band), outcome.correlation
        elif outcome.beats_yarn:  # otherwise the model's own stays as it is
            bands[-1] = outcome.band
    return Schedule(facts=base.facts, bands=tuple(bands)), tuple(found)


def _base(model: Path) -> Schedule:
    """The schedule to start from, of a file that is a whole model."""
    header = read_header(model)
    check_has_tensors(header)
    return schedule_of(header)


def default_contexts(model: Path, context: int) -> tuple[int, ...]:
    """Return contexts for bands up to `context`, each twice the one before.

    Raises:
        UserError: the model holds as much already, or has no RoPE.
    """
    base = _base(model)
    if context <= base.context:
        raise UserError(f"context: {context:,}, expected more than the {base.context:,} that the model holds already")
    return tuple(doubling_contexts(base.context, context))


def _check(plan: SearchPlan, base: Schedule) -> None:
    rising = all(a < b for a, b in zip(plan.contexts, plan.contexts[1:], strict=False))
    if not plan.contexts or not rising or plan.contexts[0] <= base.context:
        given = ", ".join(map(str, plan.contexts)) or "none"
        raise UserError(f"contexts: {given}, expected rising numbers above the {base.context:,} that the model holds")
    if check_kv_type(plan.kv) == "auto":
        raise UserError("kv: 'auto', expected a type by name: the losses must not depend on how much memory is free")
    if plan.settings.algorithm == "gradient" and plan.evaluator == "llama":
        raise UserError("evaluator: llama has no gradients, expected torch or auto for the gradient algorithm")
    if plan.start is not None:
        check_matches(plan.start, base.facts, "start")


def _long_enough(plan: SearchPlan, context: int, on_event: Callable[[SearchEvent], None]) -> tuple[Text, ...]:
    """The texts that are long enough for `context`; all of them if none is, for the error message later."""
    with closing(Llama(plan.model, vocab_only=True, n_ctx=1, verbose=False)) as vocab:
        long = [text for text in plan.texts if len(vocab.tokenize(text.text.encode(), add_bos=True)) >= context]
    if len(long) in (0, len(plan.texts)):
        return plan.texts
    on_event(
        Note(f"{len(plan.texts) - len(long)} of {len(plan.texts)} texts are shorter than {context:,} tokens: not used")
    )
    return tuple(long)


def _share(budget: Budget, context: int, contexts: Sequence[int]) -> Budget:
    """A band's share of the budget: evaluations evenly, time in proportion to the cost of a reading."""
    total = sum(n**1.5 for n in contexts)
    return Budget(
        evaluations=None if budget.evaluations is None else budget.evaluations / len(contexts),
        seconds=None if budget.seconds is None else budget.seconds * context**1.5 / total,
    )


@dataclass(frozen=True)
class _BandJob:
    """One band to search: its space, objective and budget, and the passages to search on and to judge by."""

    space: Space
    objective: str
    budget: Budget
    passages: tuple[Passage, ...]
    held: tuple[Passage, ...]


def _make_job(plan: SearchPlan, base: Schedule, context: int, contexts: Sequence[int]) -> _BandJob:
    """Cut the passages for one band.

    Raises:
        UserError: they are too short.
    """
    original, seed = base.facts.original_context, plan.settings.seed
    objective = plan.objective if context > original else "all"

    def cut(texts: Sequence[Text], count: int | None, most: int) -> tuple[Passage, ...]:
        for n in [count] if count else range(most, 1, -1):
            try:
                return make_passages(vocab, texts, context, n, objective, original, seed)
            except UserError:
                if count:
                    raise
        return make_passages(vocab, texts, context, 1, objective, original, seed)

    searched, held = split_texts(plan.texts, seed)
    with closing(Llama(plan.model, vocab_only=True, n_ctx=1, verbose=False)) as vocab:
        return _BandJob(
            space=_space(plan, base, context),
            objective=objective,
            budget=_share(plan.settings.budget, context, contexts),
            passages=cut(searched, plan.passages, PASSAGES),
            held=cut(held, plan.held_passages, HELD_PASSAGES),
        )


def _space(plan: SearchPlan, base: Schedule, context: int) -> Space:
    """The space of one band; one for no more than the model was trained for needs no near window."""
    onto = last_without_window(base)
    choices = usual_near_tokens(base.facts) if plan.near_tokens is None else plan.near_tokens
    return Space(base.facts, onto, context, near_tokens=choices if context > onto.context else (0,))


def _search_band(
    plan: SearchPlan,
    job: _BandJob,
    start: tuple[Space, Band] | None,
    correlation: float | None,
    on_event: Callable[[SearchEvent], None],
) -> tuple[Outcome, Kind]:
    space, passages, window = job.space, job.passages, _window(plan, job.space)
    spec = EvaluatorSpec(
        model=str(plan.model),
        passages=passages,
        base=space.band(space.reference),
        window=window if plan.settings.screening.allowed else 0,
        kv=plan.kv,
        threads=plan.threads or max(1, default_threads() // plan.workers),
    )
    kind, speeds = _choose(plan, spec)
    on_event(Searching(space.context, kind, speeds))
    spec = replace(spec, kind=kind)
    settings = replace(
        plan.settings,
        budget=job.budget,
        screen_cost=round(END_COST * window / len(passages[0].tokens), 3),
        objective=job.objective,
        held_passages=len(job.held),
        fewer_passages=plan.passages is None and plan.held_passages is None,
    )
    seeds = [carried(start[0], start[1], space)] if start else []
    known = _known(plan, space)
    seeds += [space.candidate(known)] if known else []
    journal = plan.folder / f"{space.context}.journal"
    with _engine(plan, spec) as engine:
        plain = plain_band(space.facts, known) if known else None
        outcome = search(engine, space, settings, journal, seeds, on_event, correlation, plain)
    return replace(outcome, band=_with_digest(outcome.band, digest(passages[: outcome.passages]))), kind


def _known(plan: SearchPlan, space: Space) -> Band | None:
    """The band of the plan's earlier schedule for the context of `space`."""
    bands = plan.start.bands if plan.start and space.context > space.onto.context else ()
    return next((band for band in bands if band.context == space.context), None)


def _with_digest(band: Band, data_digest: str) -> Band:
    """`band`, and its plain form, as found on these passages."""
    changes: dict[str, object] = {"found": band.found.model_copy(update={"data_digest": data_digest})}
    if band.plain is not None:
        changes["plain"] = _with_digest(band.plain, data_digest)
    return band.model_copy(update=changes)


def _window(plan: SearchPlan, space: Space) -> int:
    """The window, at most a quarter of the context beyond the band before (of all of it when readjusting)."""
    beyond = space.context - space.onto.context or space.context
    return max(64, min(plan.window, beyond // 4))


def _choose(plan: SearchPlan, spec: EvaluatorSpec) -> tuple[Kind, dict[Kind, float]]:
    """The evaluator to use; the choice of `auto` is saved, so that a resumed search uses the same one."""
    if plan.settings.algorithm == "gradient":
        return "torch", {}
    if plan.evaluator != "auto":
        return plan.evaluator, {}
    saved, model = plan.folder / "evaluator", model_digest(plan.model)
    known = saved.read_text().split() if saved.is_file() else []
    if known in (["llama", model], ["torch", model]):
        return ("torch" if known[0] == "torch" else "llama"), {}
    kind, speeds = faster(spec)
    _write(saved, f"{kind} {model}\n".encode())
    return kind, speeds


@contextmanager
def _engine(plan: SearchPlan, spec: EvaluatorSpec) -> Iterator[Engine]:
    if plan.engine == "ray":
        from ...factors.search.on_ray import Ray

        with Ray(EvaluatorRecipe(spec), plan.workers, plan.ray_address) as cluster:
            yield cluster
    elif plan.workers > 1:
        with Processes(EvaluatorRecipe(spec), plan.workers) as processes:
            yield processes
    else:
        with InProcess(make_evaluator(spec)) as here:
            yield here


def _judge_kind(searched: Kind) -> Kind:
    """The evaluator to judge with: llama.cpp, as it will run the band, unless torch has searched on a GPU."""
    if searched == "torch":
        import torch

        return "torch" if torch.cuda.is_available() else "llama"
    return "llama"


def _judge(
    plan: SearchPlan, job: _BandJob, outcome: Outcome, kind: Kind, on_event: Callable[[SearchEvent], None]
) -> Verdict:
    """Read the held-out passages in the band found and in YaRN's; readings are saved in the plan's folder.

    If the time was too short to search on all passages, at most as many are used to judge as were searched on.
    """
    space, band = job.space, outcome.band
    passages = job.held if outcome.passages == len(job.passages) else job.held[: outcome.passages]
    yarn = space.band(space.seed("yarn"))
    spec = EvaluatorSpec(str(plan.model), passages, yarn, kind, window=0, kv=plan.kv, threads=plan.threads)
    readings = _HeldOutReadings(plan.folder, spec)
    losses: list[tuple[Losses, Losses]] = []
    for i in range(len(passages)):
        ours = readings.losses(band, i)
        on_event(Judging(space.context, 2 * i + 1, 2 * len(passages)))
        theirs = ours if band_key(band) == band_key(yarn) else readings.losses(yarn, i)
        on_event(Judging(space.context, 2 * i + 2, 2 * len(passages)))
        losses.append((ours, theirs))
    readings.close()
    return verdict(losses, passages, job.objective, plan.settings.seed)


class _HeldOutReadings:
    """An evaluator that is created when it is needed, and whose readings are saved in a folder."""

    def __init__(self, folder: Path, spec: EvaluatorSpec) -> None:
        self._folder, self._spec, self._key = folder, spec, spec.key
        self._evaluator: LlamaEvaluator | TorchEvaluator | None = None

    def losses(self, band: Band, passage: int) -> Losses:
        name = hashlib.sha256(repr((self._key, band_key(band), passage)).encode()).hexdigest()[:16]
        path = self._folder / f"held-out-{name}.npy"
        known = _load_losses(path, len(self._spec.passages[passage].targets))
        if known is not None:
            return known
        if self._evaluator is None:
            self._evaluator = make_evaluator(self._spec)
        losses = self._evaluator.losses(band, passage)
        data = io.BytesIO()
        np.save(data, losses)
        _write(path, data.getvalue())
        return losses

    def close(self) -> None:
        if self._evaluator is not None:
            self._evaluator.close()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot save results there: {error.strerror or error}") from None


def _write(path: Path, data: bytes) -> None:
    """Write a small file, completely or not at all."""
    try:
        write_file(path, data)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None


def _load_losses(path: Path, n: int) -> Losses | None:
    """Load a saved reading; None if there is none, or not a complete one."""
    try:
        losses = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    valid = losses.shape == (n,) and losses.dtype == np.float64 and bool(np.isfinite(losses).all())
    return losses if valid else None
