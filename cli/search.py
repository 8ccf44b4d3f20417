"""`ropewalk search`: search λ and n̂ for the very file that will run, and judge them on texts held out of the search."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from ..files import MAX_NAME_BYTES
from .terminal import out, printable

if TYPE_CHECKING:
    from ..factors import Schedule
    from ..factors.search import Budget
    from ..runtime.measure import FoundBand, SearchPlan, Verdict

BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)?")
UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


def _evolution(text: str, default: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Options for --algorithm evolution", show_default=default)


def search(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Path to a GGUF model.", show_default="the bundled SmolLM2")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="PATHS", hidden=True)] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Longest context to search for.", show_default="four times the model's"),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(metavar="16384,32768", help="Contexts of the bands to search.", show_default="doubling"),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="PATHS...",
            help="Long texts: files, folders, quoted patterns. A third is held out to judge the result.",
            show_default="Python's documentation",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="S.json", help="Schedule to write (required).")
    ] = None,
    near_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="0,2048",
            help="Near windows to choose from: how far tokens are seen as the model was trained to; 0 for none.",
            show_default="0,512,1024,… up to half the original context",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="S.json",
            help="Schedule found before, to start from; its plain λ are kept for stock llama.cpp, unless YaRN's or"
            " others that are found are better.",
            show_default="none",
        ),
    ] = None,
    algorithm: Annotated[str, typer.Option(metavar="cma|gradient|evolution", help="Search algorithm.")] = "cma",
    objective: Annotated[
        str,
        typer.Option(
            metavar="tail|all|needle",
            help="What to score: tokens past the original context (tail), all tokens, a hidden key's digits (needle),"
            " or a mix like tail+0.5*needle.",
        ),
    ] = "tail",
    budget: Annotated[
        str, typer.Option(metavar="45m|2h|200", help="How long to search: a time, or a number of evaluations.")
    ] = "45m",
    passages: Annotated[
        int | None,
        typer.Option(
            "--passages",
            "--documents",
            min=1,
            help="Passages to search on, per band.",
            show_default="3, if the texts hold as many",
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=1, help="Held-out passages to judge by, per band.", show_default="2, if the texts hold as many"
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=64, help="Tokens at a passage's end that screening reads.")] = 1024,
    screen: Annotated[
        bool, typer.Option(help="Read only the end of passages, if that ranks candidates like full readings.")
    ] = True,
    readjust: Annotated[bool, typer.Option(help="Search the model's own band as well (fine-tuned models).")] = False,
    evaluator: Annotated[
        str, typer.Option(metavar="auto|llama|torch", help="What computes losses; auto = the faster.")
    ] = "auto",
    kv: Annotated[str, typer.Option(help="KV cache type for llama.cpp.")] = "f16",
    engine: Annotated[str, typer.Option(metavar="local|ray", help="Where to evaluate candidates.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Number of processes, or of Ray actors.")] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster.", show_default="one on this machine")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads per worker.", show_default="its share of the cores")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed, for reproducible results.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Plot the loss against evaluations.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as a JSON object.")] = False,
    population: Annotated[int | None, _evolution("Candidates in the first generation.", "64")] = None,
    parents: Annotated[int | None, _evolution("Best candidates that have children.", "32")] = None,
    mutations: Annotated[int | None, _evolution("Children by mutation, per generation.", "16")] = None,
    crossovers: Annotated[int | None, _evolution("Children by crossover, per generation.", "16")] = None,
    generations: Annotated[int | None, _evolution("Generations after the first.", "40")] = None,
    probability: Annotated[
        float | None, _evolution("Probability that a value is mutated or crossed over.", "0.3")
    ] = None,
) -> None:
    """Search for rescale factors for a longer context, on your texts and with the very file that will run.

    The same command resumes a run that was stopped, with the same result.
    To use the result: ropewalk convert MODEL OUT.gguf --schedule S.json
    """
    from ..factors import read_schedule
    from ..runtime.measure import SearchPlan, default_contexts, search_schedule
    from .evaluate import texts_of
    from .lists import numbers_of
    from .model import searched_model
    from .picture import check_picture_place

    if output is None:
        raise UserError("-o: missing, expected a file for the schedule")
    _check_choice("--evaluator", evaluator, ("auto", "llama", "torch"))
    _check_choice("--engine", engine, ("local", "ray"))
    if ray_address is not None and engine != "ray":
        raise UserError("--ray-address: only valid with --engine ray")
    _check_output(output)
    if plot is not None:
        check_picture_place(plot)
    path = searched_model(model)
    contexts = numbers_of("--bands", bands) if bands else default_contexts(path, context or 4 * _context_of(path))
    evolution = {
        "population": population,
        "parents": parents,
        "mutations": mutations,
        "crossovers": crossovers,
        "generations": generations,
        "probability": probability,
    }
    plan = SearchPlan(
        model=path,
        texts=tuple(texts_of(text, more)),
        contexts=contexts,
        folder=search_folder(output),
        settings=_settings(algorithm, seed, budget, screen, evolution),
        objective=objective,
        passages=passages,
        held_passages=held_out,
        window=window,
        kv=kv,
        evaluator=evaluator,  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
        workers=workers,
        threads=threads,
        ray_address=ray_address,
        readjust=readjust,
        near_tokens=None if near_tokens is None else numbers_of("--near-tokens", near_tokens, least=0),
        start=None if start is None else read_schedule(start),
    )
    _run(plan, search_schedule, output, plot, as_json)


def _run(plan: SearchPlan, search_schedule: Any, output: Path, plot: Path | None, as_json: bool) -> None:
    from ..factors import write_schedule
    from .search_table import SearchTable

    try:
        with SearchTable() as table:
            schedule, found = search_schedule(plan, table.take)
    except KeyboardInterrupt:
        typer.echo(f"ropewalk: stopped; the same command resumes from {printable(plan.folder)}", err=True)
        raise SystemExit(130) from None
    write_schedule(schedule, output)
    if plot is not None:
        from .picture import draw_search, save_figure

        save_figure(draw_search(table.curves, f"{plan.model.name}: best loss so far"), plot)
    if as_json:
        print(json.dumps(_facts(schedule, found, plan, output), ensure_ascii=False, indent=1))
    else:
        _show(schedule, found, plan, output, plot)


def search_folder(output: Path) -> Path:
    """Return the folder beside the schedule for what the search has done so far; a name too long for one is cut."""
    name = f"{output.name}.search"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(output.name)).hexdigest()[:8]
        start = os.fsencode(output.name)[: MAX_NAME_BYTES - len(f".{digest}.search")].decode(errors="ignore")
        name = f"{start}.{digest}.search"
    return output.with_name(name)


def _settings(algorithm: str, seed: int, budget: str, screen: bool, evolution: dict[str, Any]) -> Any:
    from ..factors.search import ALGORITHMS, Evolution, Screening, Settings

    _check_choice("--algorithm", algorithm, tuple(ALGORITHMS))
    given = {name: value for name, value in evolution.items() if value is not None}
    if given and algorithm != "evolution":
        raise UserError(f"--{next(iter(given))}: only valid with --algorithm evolution")
    screening = Screening(allowed=screen)
    return Settings(algorithm, seed, parse_budget(budget), screening=screening, evolution=Evolution(**given))


def parse_budget(text: str) -> Budget:
    """Parse a time, as in `45m`, `2h` or `90s`, or a bare number of evaluations.

    Raises:
        UserError: neither.
    """
    from ..factors.search import Budget

    match = BUDGET.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise UserError(f"--budget: {text!r}, expected a time like 45m or 2h, or a number of evaluations")
    amount, unit = float(match[1]), match[2]
    return Budget(seconds=amount * UNITS[unit]) if unit else Budget(evaluations=amount)


def _check_output(path: Path) -> None:
    """Check that the schedule can be written, before a long search."""
    from ..factors import read_schedule
    from ..files import check_place

    check_place(path)
    if path.exists():
        try:
            read_schedule(path)
        except UserError as error:
            raise UserError(f"-o: would replace a file that is not a schedule: {error}") from None


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}: {value!r}, expected one of {', '.join(choices)}")


def _context_of(path: Path) -> int:
    from ..container import read_header, schedule_of

    return schedule_of(read_header(path)).context


def _facts(schedule: Schedule, found: tuple[FoundBand, ...], plan: SearchPlan, output: Path) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "schedule": str(output),
        "model": str(plan.model),
        "objective": plan.objective,
        "bands": [
            {
                **one.outcome.band.model_dump(),
                "beats_yarn": one.outcome.beats_yarn,
                "searched_loss": one.outcome.loss,
                "searched_loss_yarn": one.outcome.yarn,
                "searched_loss_plain": one.outcome.plain,
                "baselines": one.outcome.baselines,
                "fidelity": one.outcome.fidelity,
                "rank_correlation": one.outcome.correlation,
                "documents": one.outcome.passages,
                "evaluations": one.outcome.evaluations,
                "seconds": one.outcome.seconds,
                "history": one.outcome.history,
                "held_out": {**asdict(one.verdict), "is_better": one.verdict.is_better},
            }
            for one in found
        ],
    }


def _show(schedule: Schedule, found: tuple[FoundBand, ...], plan: SearchPlan, output: Path, plot: Path | None) -> None:
    def say(line: str) -> None:
        out.print(printable(line), markup=False, soft_wrap=True)

    say(f"{output}" + (f"; plotted in {plot}" if plot else ""))
    original = schedule.facts.original_context
    for one in found:
        outcome, band = one.outcome, one.outcome.band
        n = f" beyond {band.near_tokens:,} tokens" if band.near_tokens else ""
        n += f", where the {band.still_pairs} fastest pairs stand still" if band.still_pairs else ""
        n += f", n̂ {band.start_tokens}" if band.start_tokens else ""
        factors = f"λ {min(band.moving_factors):.3g} to {max(band.moving_factors):.3g}"
        say(
            f"up to {band.context:,} tokens: {factors}{n}, attention × {band.attention_factor:.3f}"
            f" ({band.found.method}); {outcome.evaluations:.1f} evaluations in {_time(outcome.seconds)}"
        )
        if not outcome.beats_yarn:
            owner = "the model's" if plan.readjust and one is found[0] else "YaRN's"
            say(f"  nothing better was found on the search texts: the band is {owner}")
            continue
        say(f"  search texts: {_change(outcome.loss - outcome.yarn)} against YaRN")
        if band.plain is not None:
            change = _change(outcome.plain - outcome.yarn)
            say(f"  stock llama.cpp, without the near window: {change} (plain λ by {band.plain.found.method})")
        for part in one.verdict.parts:
            say(f"  held-out texts, {_compared(part, original)}")
        conclusion = "better" if one.verdict.is_better else "NOT significantly better than YaRN"
        say(f"  held-out texts, {_compared(one.verdict, original)}: {conclusion}")


def _compared(verdict: Verdict, original: int) -> str:
    """Describe one kind of loss on the held-out texts, in its usual unit."""
    change = f"{_change(verdict.difference)} against YaRN (95 %: {_change(verdict.low)} to {_change(verdict.high)})"
    if verdict.kind == "needle":
        return f"keys' digits: {verdict.loss:.2f} nats, YaRN's {verdict.against:.2f}"
    if verdict.parts:
        return f"{verdict.kind}: {change}"
    where = f" past {original:,}" if verdict.kind == "tail" else ""
    return f"perplexity{where}: {math.exp(verdict.loss):.2f}, {change}"


def _change(difference: float) -> str:
    return f"{math.expm1(difference):+.2%}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
