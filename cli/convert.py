"""`ropewalk convert`: a GGUF file made long by a closed form or a schedule, requantised, or both."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .terminal import Advance, out, progress, size

if TYPE_CHECKING:
    from ..container import Header
    from ..convert import Plan

FLOATS = ("f32", "f16", "bf16")  # bringing quantised weights to these rounds nothing that matters


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.gguf", help="The model to convert.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="Where to write it.")],
    context: Annotated[int | None, typer.Option(metavar="TOKENS", help="The longest context it is to hold.")] = None,
    method: Annotated[
        str | None, typer.Option(metavar="yarn|ntk|pi", help="How the factors are made (yarn if not given).")
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(metavar="S.json", help="A schedule to embed, in place of a method's.")
    ] = None,
    weight_type: Annotated[
        str | None, typer.Option("--type", metavar="q8_0", help="Requantise the weights: f16, q8_0, q4_k_m, …")
    ] = None,
    existing: Annotated[
        str | None,
        typer.Option(
            metavar="compose|replace",
            help="Factors the file carries: multiply onto all of them, or drop all. If not given, the model's own are"
            " kept and a schedule embedded before is dropped.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.gguf if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was done as one JSON object.")] = False,
) -> None:
    """Make a model long: embed rescale factors for a longer context, and requantise it if asked."""
    from ..container import read_header
    from ..convert import convert_model, quantised_types

    header = read_header(source)
    plan = _plan(header, context, method, schedule, existing, weight_type)
    convert_model(
        source,
        target,
        schedule=plan.schedule if plan else None,
        weight_type=weight_type,
        force=force,
        bar=_bar,
    )
    lossy = quantised_types(header) if weight_type is not None and weight_type.lower() not in FLOATS else []
    facts = _gather(read_header(target), header, plan, lossy)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False, indent=1))
    else:
        _show(facts)


def _plan(
    header: Header,
    context: int | None,
    method: str | None,
    schedule: Path | None,
    existing: str | None,
    weight_type: str | None,
) -> Plan | None:
    from ..convert import plan_extension, plan_given
    from ..factors import read_schedule

    if schedule is not None:
        if method is not None:
            raise UserError(f"--method {method}: has no meaning with --schedule, which brings its own factors")
        return plan_given(header, read_schedule(schedule), str(schedule), context, existing)
    if context is not None:
        return plan_extension(header, context, method or "yarn", existing)
    for name, value in (("--method", method), ("--existing", existing)):
        if value is not None:
            raise UserError(f"{name} {value}: expected --context with it")
    if weight_type is None:
        raise UserError("nothing to do: expected --context, --schedule or --type")
    return None


def _bar(label: str) -> AbstractContextManager[Advance]:
    return progress(label, is_bytes=True)


def _gather(written: Header, header: Header, plan: Plan | None, lossy: list[str]) -> dict[str, Any]:
    from ..container import schedule_of, takes_native_factors, what_stock_does

    schedule = schedule_of(written)
    notes = [plan.note if plan else "factors stay as they are in the file, if there are any"]
    if lossy:
        notes.append(f"the weights were quantised already ({', '.join(lossy)}): rounding them again loses a little")
    return {
        "source": str(header.path),
        "target": str(written.path),
        "bytes": written.file_size,
        "architecture": written.arch,
        "original_context": schedule.facts.original_context,
        "context": schedule.context,
        "bands": [band.model_dump() for band in schedule.bands],
        "native_factors": takes_native_factors(written),
        "notes": notes,
        "stock_llama_cpp": what_stock_does(written),
    }


def _show(facts: dict[str, Any]) -> None:
    def say(line: str) -> None:
        out.print(line, markup=False, soft_wrap=True)

    say(f"{facts['target']}: {size(facts['bytes'])}, {facts['architecture']}")
    say(f"trained for {facts['original_context']:,} tokens, holds {facts['context']:,}")
    for band in facts["bands"]:
        factors = band["rescale_factors"]
        start = f", start tokens {band['start_tokens']}" if band["start_tokens"] else ""
        say(
            f"  up to {band['context']:>9,}  λ {min(factors):.4g} to {max(factors):.4g},"
            f" attention × {band['attention_factor']:.4g}{start}  ({band['found']['method']})"
        )
    for note in facts["notes"]:
        say(f"note: {note}")
    say(f"stock llama.cpp: {' '.join(facts['stock_llama_cpp'])}")
