"""`ropewalk inspect`: a model file's metadata and bands, the memory it needs, and what stock llama.cpp does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .terminal import out, plain, size

if TYPE_CHECKING:
    from ..container import Header
    from ..factors import Schedule
    from ..runtime.repacking import Comparison

SHOWN_KV_TYPES = ("f16", "q8_0:f16", "q8_0", "q4_0")


def inspect(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Path to a GGUF model.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Plot λ against dimension.")] = None,
    machine: Annotated[bool, typer.Option("--machine", help="Show how this machine computes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as a JSON object.")] = False,
) -> None:
    """Show a model's metadata and bands, the memory it needs, and what stock llama.cpp does with it; or the machine."""
    if file is None and not machine:
        raise UserError("inspect: expected a FILE, or --machine")
    if file is None:
        facts: dict[str, Any] = {"machine": _machine()}
    else:
        from ..container import read_header, schedule_of

        header = read_header(file)
        schedule = schedule_of(header)
        facts = _gather(header, schedule) | ({"machine": _machine()} if machine else {})
        if plot is not None:
            from .picture import check_picture_place, draw_factors, save_figure

            check_picture_place(plot)
            save_figure(draw_factors(schedule, f"{facts['model']['name']}: rescale factors by band"), plot)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False, indent=1))
        return
    if file is not None:
        _show(facts, schedule)
        if plot is not None:
            out.print(f"\nλ plotted in {plain(plot)}", soft_wrap=True)
    if machine:
        if file is not None:
            out.print()
        _show_machine(facts["machine"])


def _machine() -> dict[str, Any]:
    from dataclasses import asdict

    from ..runtime.machine import this_machine

    machine = this_machine()
    return asdict(machine) | {"repacking": [_as_facts(known) for known in machine.repacking]}


def _show_machine(facts: dict[str, Any]) -> None:
    precision = "exact" if facts["exact"] else "rounding where that is faster and loses little"
    kernels = f"{facts['instructions']}, {precision}" if facts["instructions"] else f"none: {facts['missing']}"
    buffers = "" if facts["extra_buffers"] else ", without its extra weight buffers, which crash here"
    quota = "" if facts["quota"] is None else f", whose group may use {facts['quota']:g} of them"
    for name, value in (
        ("llama-cpp-python", facts["llama_cpp"] + buffers),
        ("native kernels", kernels),
        ("long prompts", f"computed by {facts['computes']}"),
        *(("repacked weights", text) for text in _repacking(facts)),
        ("threads", f"{facts['threads']} by default; {facts['cpus']} logical CPUs for this process{quota}"),
    ):
        out.print(f"{name:<18}{plain(value)}", soft_wrap=True)


def _repacking(facts: dict[str, Any]) -> list[str]:
    """What is known about llama.cpp's repacked weights, a line for each type and number of threads."""
    if facts["may_repack"] is not None:
        return ["as llama.cpp does it" if facts["may_repack"] else "none: llama.cpp may not repack any"]
    return [
        f"{known['kind'].lower()}, {_threads(known['n_threads'], known['n_threads_batch'])}: {_products(known)}"
        for known in facts["repacking"]
    ]


def _threads(writing: int, reading: int) -> str:
    both = str(writing) if writing == reading else f"{writing} and {reading}"
    return f"{both} thread{'s' if both != '1' else ''}"


def _products(known: dict[str, Any]) -> str:
    """Whose kernels multiply weights of a type, and why."""
    if known["failed"]:
        return f"llama.cpp's kernels for repacked weights; measuring failed ({known['failed']})"
    if not known["repacked"]:
        return "our kernels; llama.cpp does not repack these here"
    speed = f"{known['reading']:.1f} × (reading) and {known['writing']:.1f} × (writing)"
    if known["ours"]:
        return f"our kernels, at {speed} the speed of llama.cpp's for repacked weights"
    return f"llama.cpp's kernels for repacked weights; ours have {speed} their speed"


def _gather(header: Header, schedule: Schedule) -> dict[str, Any]:
    from collections import Counter

    from ..container import check_has_tensors, embedded_schedule, model_parts, type_name, what_stock_does
    from ..factors import doubling_contexts

    check_has_tensors(header)
    arch = header.arch
    weights: Counter[str] = Counter()
    parts = model_parts(header)
    for tensor in (tensor for part in parts for tensor in part.tensors):
        weights[type_name(tensor.type).lower()] += tensor.n_bytes
    first, last = schedule.bands[0].context, schedule.context
    contexts = sorted({first, *(doubling_contexts(first, last) if last > first else [])})
    return {
        "file": str(header.path),
        "model": {
            "name": header.get("general.name", header.path.stem),
            "architecture": arch,
            "file_bytes": sum(part.file_size for part in parts),
            "weights": dict(weights.most_common()),
            "layers": header.get(f"{arch}.block_count"),
            "context": schedule.context,
            **schedule.facts.model_dump(),
        },
        "schedule": "embedded" if embedded_schedule(header) else "native",
        "bands": [band.model_dump() for band in schedule.bands],
        "memory": [_memory_row(header, n_ctx, kv, len(schedule.bands)) for n_ctx in contexts for kv in SHOWN_KV_TYPES],
        "products": _known_products(header),
        "evaluation": _evaluation(header, schedule),
        "stock_llama_cpp": what_stock_does(header),
    }


def _evaluation(header: Header, schedule: Schedule) -> dict[str, Any] | None:
    """The evaluation that the file carries, and whether it is that of the schedule in it."""
    from ..container import certificate_of

    certificate = certificate_of(header)
    if certificate is None:
        return None
    return certificate.model_dump() | {"holds": certificate.holds_for(schedule)}


def _known_products(header: Header) -> dict[str, Any] | None:
    from ..runtime.repacking import known_comparison

    known = known_comparison(header)
    return None if known is None else _as_facts(known)


def _as_facts(known: Comparison) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(known) | {"ours": known.ours}


def _memory_row(header: Header, n_ctx: int, kv: str, bands: int) -> dict[str, Any]:
    from ..runtime import plan_memory

    plan = plan_memory(header, n_ctx, kv, bands=bands, flash_attn=True, fast_prefill=True)  # as the commands run it
    return {
        "context": n_ctx,
        "kv_type": kv,
        "cache_bytes": plan.cache_bytes,
        "compute_bytes": plan.compute_bytes,
        "total_bytes": plan.total_bytes,
        "fits": plan.fits,
    }


def _show(facts: dict[str, Any], schedule: Schedule) -> None:
    model = facts["model"]
    weights = ", ".join(f"{name} {size(n)}" for name, n in list(model["weights"].items())[:3])
    out.print(
        f"[bold]{plain(model['name'])}[/]  {plain(model['architecture'])}, {model['layers']} layers,"
        f" {size(model['file_bytes'])} ({weights})",
        soft_wrap=True,
    )
    out.print(
        f"RoPE: {model['n_rot']} dimensions, base {model['freq_base']:g}; trained for"
        f" {model['original_context']:,} tokens, serves {model['context']:,}",
        soft_wrap=True,
    )
    if facts["products"] is not None:
        out.print(f"Products: {plain(_products(facts['products']))}", soft_wrap=True)
    _show_bands(schedule, facts["schedule"])
    _show_memory(facts["memory"])
    if facts["evaluation"] is not None:
        _show_evaluation(facts["evaluation"])
    out.print("\n[bold]Stock llama.cpp:[/] " + plain(" ".join(facts["stock_llama_cpp"])), soft_wrap=not out.is_terminal)


def _show_bands(schedule: Schedule, source: str) -> None:
    from rich.table import Table

    from .picture import spark

    table = Table(box=None, pad_edge=False, header_style="dim", title=None)
    for name in ("band up to", "λ by dimension, fast → slow"):
        table.add_column(name, justify="right" if name == "band up to" else "left", no_wrap=True)
    windows = any(band.near_tokens for band in schedule.bands)
    for name in ("λ", *(["near"] if windows else []), "n̂", "attention", "method"):
        table.add_column(name, justify="right", no_wrap=True)
    for band, (context, bars) in zip(schedule.bands, spark(schedule), strict=True):
        low, high = min(band.moving_factors), max(band.moving_factors)
        span = f"{low:.4g}" if low == high else f"{low:.3g}–{high:.3g}"
        method = band.found.method + (f" onto {band.found.onto}" if band.found.onto else "")
        near = [f"{band.near_tokens:,}" if band.near_tokens else ""] if windows else []
        start, attention = str(band.start_tokens), f"{band.attention_factor:.4g}"
        table.add_row(context, bars, span, *near, start, attention, plain(method))
    out.print(f"\n[bold]Bands[/] ({source} schedule)")
    out.print(table)
    if windows:
        out.print("[dim]near: tokens nearer than this are seen as the model was trained to; λ is of those beyond[/]")
        for band in schedule.bands:
            if band.still_pairs:
                what = f"{band.context:,}: the {band.still_pairs} fastest pairs stand still beyond it (·)"
                out.print(f"[dim]up to {what}; λ is of the others[/]", soft_wrap=True)


def _show_evaluation(facts: dict[str, Any]) -> None:
    from rich.table import Table

    holds = "" if facts["holds"] else "; [red]of another schedule than the one in the file now[/]"
    out.print(
        f"\n[bold]Evaluation[/] ({plain(facts['suite'])} {facts['suite_version']}, by ropewalk"
        f" {plain(facts['ropewalk'])}: {len(facts['tasks'])} tasks, {facts['samples']} questions each, seed"
        f" {facts['seed']}, texts {plain(facts['texts_digest'])}, cache {plain(facts['kv_type'])}){holds}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("length", "accuracy", "95 %", "loss", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, length in enumerate(facts["lengths"]):
        accuracy, loss = ([facts[f"{name}{end}"][i] for end in ("", "_low", "_high")] for name in ("accuracy", "loss"))
        table.add_row(
            f"{length:,}",
            f"{accuracy[0]:.0%}",
            f"{accuracy[1]:.0%} to {accuracy[2]:.0%}",
            f"{loss[0]:.2f}",
            f"{loss[1]:.2f} to {loss[2]:.2f}",
        )
    out.print(table)
    lengths = [facts["effective_by_accuracy"], facts["effective_by_likelihood"]]
    by_accuracy, by_likelihood = ("none" if length is None else f"{length:,}" for length in lengths)
    out.print(f"effective length: {by_accuracy} by accuracy, {by_likelihood} by likelihood", soft_wrap=True)


def _show_memory(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    contexts = sorted({row["context"] for row in rows})
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("context", justify="right", no_wrap=True)
    for kv in SHOWN_KV_TYPES:
        table.add_column(kv, justify="right", no_wrap=True)
    for n_ctx in contexts:
        cells = [row for row in rows if row["context"] == n_ctx]
        texts = [f"{size(row['total_bytes'])} / {size(row['cache_bytes'])}" for row in cells]
        table.add_row(
            f"{n_ctx:,}", *(text if row["fits"] else f"[red]{text} !" for text, row in zip(texts, cells, strict=True))
        )
    out.print("\n[bold]Memory[/] in total / of which KV cache, by cache type K:V")
    out.print(table)
    if not all(row["fits"] for row in rows):
        out.print("[red]![/] more than is free on this machine now")
