"""`ropewalk eval --suite ruler`: questions about long texts, by task, length, depth and method."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .lists import names_of, numbers_of
from .terminal import note, out, printable, progress

if TYPE_CHECKING:
    from ..factors import Band, Schedule
    from ..runtime.measure import Text
    from ..runtime.measure.suites import Report, Run, Setting
    from ..runtime.measure.suites.asking import Advance

METHODS = "none,pi,ntk,yarn,plain,schedule"
QUICK_METHODS = "none,yarn,plain,schedule"
LENGTHS = (4096, 8192, 16384, 32768)
QUICK_LONGEST = 12288  # tokens; twice as many take three times as long
SAMPLES, QUICK_SAMPLES, SHARE = 50, 4, 10
MANY_TOKENS = 2_000_000  # an hour or so for a small model on a few cores
CACHES, QUICK_CACHES = "q8_0,q8_0:f16,q4_0", "q8_0,q4_0"


@dataclass(frozen=True)
class SuiteOptions:
    """The options that only a suite has, as they were given; None = not given."""

    suite: str
    quick: bool
    tasks: str | None
    samples: int | None
    share: int | None
    chat: bool | None
    caches: str | None
    certify: bool


@dataclass(frozen=True)
class CommonOptions:
    """The options that a suite shares with other evaluations, as they were given; None = not given."""

    contexts: str | None
    methods: str | None
    schedule: Path | None
    kv: str
    threads: int | None
    seed: int
    output: Path | None
    plot: Path | None
    as_json: bool


def evaluate_suite(model: str | None, texts: list[Text], options: SuiteOptions, common: CommonOptions) -> None:
    """Ask all questions, and show what the answers are worth.

    Raises:
        UserError: options that do not fit together or the model; see `run_suite`.
    """
    from ..container import read_header, schedule_of, trained_schedule
    from ..factors import check_matches, read_schedule
    from ..runtime.measure.suites import SUITE, Journal, run_suite, tokens_to_read
    from .model import model_path
    from .picture import check_picture_place

    if options.suite != SUITE:
        raise UserError(f"--suite: {options.suite!r}, expected {SUITE}")
    path = model_path(model)
    header = read_header(path)
    native = trained_schedule(header)
    own = read_schedule(common.schedule) if common.schedule else schedule_of(header)
    check_matches(own, native.facts, str(common.schedule or path))
    if common.plot is not None:
        check_picture_place(common.plot)
    run = _run(path, tuple(texts), options, common, native, own)
    if options.certify:
        _check_certifiable(model, path, run, own)
    n_tokens = tokens_to_read(run.plan)
    if n_tokens > MANY_TOKENS:
        note(
            f"about {n_tokens / 1e6:.0f} million tokens to read;"
            " fewer --tasks, --contexts, --methods or --samples, or --quick, take less time"
        )
    with Journal(common.output) as journal:
        report, setting = run_suite(run, journal, _progress)
    if common.as_json:
        print(json.dumps(_facts(report, setting, run, own), ensure_ascii=False, indent=1))
    else:
        from .suite_table import show

        show(report, setting, run)
    if common.plot is not None:
        from .picture import save_figure
        from .picture_suite import draw_suite

        save_figure(draw_suite(report, f"{path.name}: RULER by depth and length"), common.plot)
        if not common.as_json:
            out.print(f"plotted in {printable(common.plot)}", markup=False, soft_wrap=True)
    if options.certify:
        _certify(path, report, setting, run, own, quiet=common.as_json)


# --- what to ask


def _run(
    path: Path, texts: tuple[Text, ...], options: SuiteOptions, common: CommonOptions, native: Schedule, own: Schedule
) -> Run:
    from ..runtime.measure.suites import QUICK, TASKS, Run, SuitePlan, named_tasks

    tasks = names_of(options.tasks) if options.tasks else QUICK if options.quick else tuple(TASKS)
    lengths = numbers_of("--contexts", common.contexts) if common.contexts else _lengths(native, own, options.quick)
    samples = options.samples or (QUICK_SAMPLES if options.quick else SAMPLES)
    bands = _bands(lengths, _methods(common.methods, options.quick, own), native, own)
    plan = SuitePlan(named_tasks(tasks), bands, samples, options.share or SHARE, common.seed)
    return Run(path, texts, plan, options.chat, common.kv, _caches(path, options), common.threads)


def _caches(path: Path, options: SuiteOptions) -> tuple[str, ...]:
    """The cache types to compare; of those that were not asked for by name, the ones that suit the model."""
    from ..container import read_header
    from ..runtime.measure.suites import CACHE_TOKENS
    from ..runtime.memory import choose_kv

    if options.caches == "none":
        return ()
    header, kinds = read_header(path), []
    for kv in names_of(options.caches or (QUICK_CACHES if options.quick else CACHES)):
        try:
            choose_kv(header, CACHE_TOKENS, kv, flash_attn=True, fast_prefill=True)
        except UserError as error:
            if options.caches:
                raise
            note(f"{error}; not compared")
        else:
            kinds.append(kv)
    return tuple(kinds)


def _lengths(native: Schedule, own: Schedule, quick: bool) -> tuple[int, ...]:
    """The lengths to measure unless others are asked for: the trained one among them, if it is not too long."""
    longest = max(own.context, native.context)
    if quick:
        trained = min(native.context, QUICK_LONGEST // 3 * 2)
        return tuple(sorted({trained // 2, trained, min(trained * 3 // 2, longest)}))
    trained = min(native.context, LENGTHS[-1])
    if longest <= LENGTHS[0]:
        return (longest // 2, longest)
    return tuple(sorted({trained, *(length for length in LENGTHS if length <= longest)}))


def _methods(given: str | None, quick: bool, own: Schedule) -> tuple[str, ...]:
    methods = names_of(given or (QUICK_METHODS if quick else METHODS))
    if "plain" in methods and not any(band.near_tokens for band in own.bands):
        rest = tuple(method for method in methods if method != "plain")
        if not rest:
            raise UserError("--methods: plain alone, and no band of the schedule has a near window")
        if given:
            note("method plain: no band of the schedule has a near window; left out")
        return rest
    return methods


def _bands(
    lengths: tuple[int, ...], methods: tuple[str, ...], native: Schedule, own: Schedule
) -> dict[int, dict[str, Band]]:
    from ..runtime.measure import band_by_method

    return {length: {name: band_by_method(name, length, native, own) for name in methods} for length in lengths}


@contextmanager
def _progress(label: str) -> Iterator[Advance]:
    with progress(label) as advance:
        yield lambda done, total: advance(round(done), round(total))


# --- what came out


def _facts(report: Report, setting: Setting, run: Run, own: Schedule) -> dict[str, Any]:
    from ..container import schedule_digest
    from ..runtime.measure.suites import SUITE, VERSION

    return {
        "suite": SUITE,
        "suite_version": VERSION,
        "ropewalk": _version(),
        "model": str(run.model),
        "original_context": report.original,
        "schedule_digest": schedule_digest(own),
        "texts": [text.name for text in run.texts],
        **asdict(setting),
        "seed": run.plan.seed,
        "samples": run.plan.samples,
        "share": run.plan.share,
        "lengths": [asdict(row) for row in report.rows],
        "cells": [asdict(cell) for cell in report.cells()],
        "depths": [asdict(part) for method in report.methods for part in report.depths(method)],
        "effective_length": [asdict(effective) for effective in report.effective()],
        "short_texts": [asdict(short) for short in report.short],
        "caches": [asdict(cache) for cache in report.caches],
        "answers": [asdict(answer) for answer in report.answers],
    }


def _version() -> str:
    from importlib.metadata import version

    return version("ropewalk")


# --- into the file


def _check_certifiable(model: str | None, path: Path, run: Run, own: Schedule) -> None:
    from ..container import read_header, schedule_of
    from ..convert import check_certifiable

    if model is None:
        raise UserError("--certify: expected a MODEL to write the result into")
    if schedule_of(read_header(path)) != own:
        raise UserError(
            "--certify: the result would be that of --schedule, not of the schedule in MODEL; embed it first"
        )
    if any("schedule" not in bands for bands in run.plan.bands.values()):
        raise UserError("--certify: expected schedule among the --methods")
    check_certifiable(path)


def _certify(path: Path, report: Report, setting: Setting, run: Run, own: Schedule, quiet: bool) -> None:
    from ..container import Certificate, schedule_digest
    from ..convert import certify
    from ..runtime.measure.suites import SUITE, VERSION

    rows = [row for row in report.rows if row.method == "schedule"]
    cells = {(cell.task, cell.length): cell for cell in report.cells() if cell.method == "schedule"}
    by_task = [cells[task, length] for task in report.tasks for length in report.lengths]
    effective = next((found for found in report.effective() if found.method == "schedule"), None)
    certificate = Certificate(
        suite=SUITE,
        suite_version=VERSION,
        ropewalk=_version(),
        texts_digest=setting.texts_digest,
        schedule_digest=schedule_digest(own),
        kv_type=setting.kv_type,
        seed=run.plan.seed,
        samples=run.plan.samples,
        share=run.plan.share,
        chat=setting.chat,
        original_context=report.original,
        effective_by_accuracy=effective.by_accuracy if effective else None,
        effective_by_likelihood=effective.by_likelihood if effective else None,
        lengths=tuple(report.lengths),
        tasks=tuple(report.tasks),
        accuracy=tuple(row.accuracy.mean for row in rows),
        accuracy_low=tuple(row.accuracy.low for row in rows),
        accuracy_high=tuple(row.accuracy.high for row in rows),
        loss=tuple(row.loss.mean for row in rows),
        loss_low=tuple(row.loss.low for row in rows),
        loss_high=tuple(row.loss.high for row in rows),
        task_accuracy=tuple(cell.accuracy.mean for cell in by_task),
        task_loss=tuple(cell.loss.mean for cell in by_task),
    )
    with progress("Writing the result", is_bytes=True) as advance:
        certify(path, certificate, on_progress=advance)
    if not quiet:
        out.print(f"written into {printable(path)}; ropewalk inspect shows it", markup=False, soft_wrap=True)
