"""`ropewalk eval`: how well a model reads long texts, by method: perplexity by position, and hidden keys found."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .lists import names_of, numbers_of
from .terminal import Advance, note, out, print_table, printable, progress

if TYPE_CHECKING:
    from ..factors import Band, Schedule
    from ..runtime.measure import Difference, KeyPassage, Reading, Text

METHODS = "none,pi,ntk,yarn,schedule"
PASSAGES = 5
QUARTERS = 4
SUITE_PANEL = "With --suite ruler"
MAX_EXPONENT = 700.0  # the largest that `math.exp` has a number for, about


def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Path to a GGUF model.", show_default="the bundled SmolLM2")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="PATHS", hidden=True)] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="PATHS...",
            help="Texts to read: files, folders, quoted patterns.",
            show_default="Python's documentation",
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            metavar="4096,8192,…", help="Contexts to read in.", show_default="half the original, then doubled"
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="none,pi,ntk,yarn,near,schedule", help="Methods to compare.", show_default="all but near"),
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(metavar="S.json", help="Rescale schedule (JSON) to use instead of the model's.")
    ] = None,
    passages: Annotated[
        int | None,
        typer.Option(
            "--passages",
            "--pages",
            min=1,
            help="Passages per context, each with a key at a different depth.",
            show_default=str(PASSAGES),
        ),
    ] = None,
    kv: Annotated[str, typer.Option(help="KV cache type: f16, q8_0, q4_0, q8_0:f16 (K:V), or auto.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU threads.", show_default="one per core")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the keys.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="R.jsonl", help="Save each reading to this file, and resume from it."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Plot perplexity against position, and the keys' losses.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as a JSON object.")] = False,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="ruler",
            help="Ask the questions of a suite instead.",
            show_default=False,
            rich_help_panel=SUITE_PANEL,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few tasks and lengths, in some ten minutes.", rich_help_panel=SUITE_PANEL)
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="vt,cwe,…", help="Tasks to ask.", show_default="all 14", rich_help_panel=SUITE_PANEL),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Questions of each task at each length.", show_default="50", rich_help_panel=SUITE_PANEL
        ),
    ] = None,
    share: Annotated[
        int | None,
        typer.Option(
            min=1, help="Questions about the same text, at most.", show_default="10", rich_help_panel=SUITE_PANEL
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Whether prompts go through the chat template.",
            show_default="if the model has one",
            rich_help_panel=SUITE_PANEL,
        ),
    ] = None,
    caches: Annotated[
        str | None,
        typer.Option(
            metavar="q8_0,…",
            help="Cache types to compare with f16, or none.",
            show_default="q8_0,q8_0:f16,q4_0",
            rich_help_panel=SUITE_PANEL,
        ),
    ] = None,
    certify: Annotated[
        bool,
        typer.Option("--certify", help="Write the result into MODEL, for inspect.", rich_help_panel=SUITE_PANEL),
    ] = False,
) -> None:
    """Measure how well a model reads texts longer than it was trained for, by method.

    Each passage is read with each method's rescale factors, which gives its
    perplexity by position, and whether a pass key hidden in it is found.
    With -o, the same command resumes a run that was stopped.

    With --suite ruler, the model is asked RULER's questions about long texts.
    """
    of_suite = {
        "--quick": quick,
        "--tasks": tasks,
        "--samples": samples,
        "--share": share,
        "--chat": chat,
        "--caches": caches,
        "--certify": certify,
    }
    if suite is not None:
        if passages is not None:
            raise UserError("--passages: is not for --suite, expected --samples")
        from .evaluate_suite import CommonOptions, SuiteOptions, evaluate_suite

        options = SuiteOptions(suite, quick, tasks, samples, share, chat, caches, certify)
        common = CommonOptions(contexts, methods, schedule, kv, threads, seed, output, plot, as_json)
        return evaluate_suite(model, texts_of(text, more), options, common)
    for name, value in of_suite.items():
        if value not in (None, False):
            raise UserError(f"{name}: expected --suite ruler with it")
    from ..container import read_header, schedule_of, trained_schedule
    from ..factors import check_matches, read_schedule
    from .model import model_path
    from .picture import check_picture_place

    path = model_path(model)
    header = read_header(path)
    native, own = trained_schedule(header), read_schedule(schedule) if schedule else schedule_of(header)
    check_matches(own, native.facts, str(schedule or path))
    if plot is not None:
        check_picture_place(plot)
    plan = _Plan(
        native, own, _contexts(contexts, native, own), names_of(methods or METHODS), passages or PASSAGES, seed
    )
    plan.check()
    found = _read_all(path, plan, texts_of(text, more), kv, threads, output)
    if as_json:
        print(json.dumps(_facts(found, plan, path), ensure_ascii=False, indent=1))
    else:
        _show(found, native.context)
    if plot is not None:
        from .picture import save_figure
        from .picture_evaluation import draw_evaluation

        save_figure(draw_evaluation(found, native.context, f"{path.name}: perplexity and hidden keys"), plot)
        if not as_json:
            out.print(f"plotted in {printable(plot)}", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Plan:
    """What to read: bands by context and method."""

    native: Schedule
    own: Schedule
    contexts: tuple[int, ...]
    methods: tuple[str, ...]
    passages: int
    seed: int

    def band(self, context: int, method: str) -> Band:
        from ..runtime.measure import band_by_method

        return band_by_method(method, context, self.native, self.own)

    def check(self) -> None:
        for context in self.contexts:
            for method in self.methods:
                self.band(context, method)


Found = dict[tuple[int, str], list[tuple["KeyPassage", "Reading"]]]
"""Readings by context and method."""


def _contexts(contexts: str | None, native: Schedule, own: Schedule) -> tuple[int, ...]:
    if contexts is None:
        context, doubled = native.context // 2, []
        while context <= max(own.context, 2 * native.context):
            doubled.append(context)
            context *= 2
        return tuple(doubled)
    return numbers_of("--contexts", contexts)


def texts_of(named: list[str] | None, more: list[str] | None) -> list[Text]:
    """Read the texts that --text and the arguments after it name; by default, Python's documentation.

    One that cannot be read is left out with a note.

    Raises:
        UserError: none of them can be read.
    """
    from ..runtime.measure import Text
    from .documents import DocumentError, find_files, read_noted

    if not named and more:
        raise UserError(f"{more[0]}: expected --text before the texts")
    if not named:
        import pydoc_data.topics

        return [Text("Python's documentation", "\n\n".join(pydoc_data.topics.topics.values()))]
    found = find_files([*named, *(more or [])], records=False)
    texts, notes = [], list(found.notes)
    problem = ""
    for source in found.sources:
        try:
            if source.error is not None:
                raise DocumentError(source.error)
            text, noted = read_noted(source.path)
        except DocumentError as error:
            problem = f"{source.path}: {error}"
            notes.append(f"{problem}; left out")
        else:
            texts.append(Text(source.path.name, text))
            notes += [f"{source.path}: {noted}"] if noted else []
    if not texts:
        raise UserError(problem)
    for line in notes:
        note(line)
    return texts


def _read_all(path: Path, plan: _Plan, texts: list[Text], kv: str, threads: int | None, output: Path | None) -> Found:
    """Read every passage by every method, in the order of contexts; what `output` holds already is not read again."""
    from ..container import model_digest
    from ..runtime.measure import Readings, key_passages, read_passage, reader, reading_key

    found: Found = {}
    digest = model_digest(path)
    total, done = sum(plan.contexts) * len(plan.methods) * plan.passages, 0
    with closing(Readings(output)) as kept, closing(reader(path, max(plan.contexts), kv, threads)) as llm:
        work = [
            (n, passage) for n in plan.contexts for passage in key_passages(llm, texts, n, plan.passages, plan.seed)
        ]
        with progress("Reading") as advance:
            for context, passage in work:
                for method in plan.methods:
                    llm.on_progress = _share(advance, done, total)
                    band = plan.band(context, method)
                    key = reading_key(digest, llm.kv_type, band, passage)
                    reading = kept.find(key) or kept.add(
                        key, _about(context, method, passage), read_passage(llm, passage, band)
                    )
                    found.setdefault((context, method), []).append((passage, reading))
                    done += context
                    advance(done, total)
    return found


def _share(advance: Advance, done: int, total: int) -> Advance:
    return lambda read, of: advance(done + read, total)


def _about(context: int, method: str, passage: KeyPassage) -> dict[str, Any]:
    return {"context": context, "method": method, "page": passage.name, "depth": passage.depth}


def _against_yarn(found: Found, context: int, method: str, original: int) -> Difference | None:
    """Compare a method with YaRN on the same passages, past the original context if they are that long."""
    from ..runtime.measure import compared

    if method == "yarn" or (context, "yarn") not in found:
        return None
    ours, theirs = ([reading for _, reading in found[context, name]] for name in (method, "yarn"))
    return compared(ours, theirs, original if context > original else 0)


def _facts(found: Found, plan: _Plan, path: Path) -> dict[str, Any]:
    original = plan.native.context
    against = {key: _against_yarn(found, *key, original) for key in found}
    return {
        "model": str(path),
        "original_context": original,
        "pages": plan.passages,
        "rows": [
            {
                "context": context,
                "method": method,
                "perplexity": _perplexity(readings),
                "by_quarter": [_perplexity(readings, *part) for part in _quarters(context)],
                "past_original": _perplexity(readings, original) if context > original else None,
                "against_yarn": asdict(difference) if (difference := against[context, method]) else None,
                "keys": [
                    {"depth": passage.depth, "found": r.key_found, "loss": r.key_loss, "said": r.said}
                    for passage, r in readings
                ],
                "seconds": sum(reading.seconds for _, reading in readings),
            }
            for (context, method), readings in found.items()
        ],
    }


def _quarters(context: int) -> list[tuple[int, int]]:
    return [(context * i // QUARTERS, context * (i + 1) // QUARTERS) for i in range(QUARTERS)]


def _perplexity(readings: list[tuple[KeyPassage, Reading]], start: int = 0, stop: int | None = None) -> float:
    """Perplexity of all passages' tokens in that range; each passage counts the same."""
    loss = math.fsum(reading.mean(start, stop) for _, reading in readings) / len(readings)
    return math.exp(min(loss, MAX_EXPONENT))


def _show(found: Found, original: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("context", "method", "perplexity", "by quarter", f"past {original:,}", "keys found", "loss on digits"):
        table.add_column(name, justify="left" if name in ("method", "by quarter") else "right")
    last = None
    for (context, method), readings in found.items():
        hits = sum(reading.key_found for _, reading in readings)
        table.add_row(
            f"{context:,}" if context != last else "",
            method,
            f"{_perplexity(readings):.2f}",
            " / ".join(f"{_perplexity(readings, *part):.1f}" for part in _quarters(context)),
            f"{_perplexity(readings, original):.2f}" if context > original else "",
            f"{hits} of {len(readings)}",
            f"{math.fsum(reading.key_loss for _, reading in readings) / len(readings):.2f}",
        )
        last = context
    print_table(table)
    for context, method in found:
        difference = _against_yarn(found, context, method, original)
        if method == "schedule" and difference and context > original:
            change, low, high = (
                f"{math.expm1(x):+.2%}" for x in (difference.difference, difference.low, difference.high)
            )
            out.print(
                f"{context:,}: the schedule's perplexity past {original:,} is {change} against YaRN's"
                f" (95 %: {low} to {high})",
                soft_wrap=True,
            )
