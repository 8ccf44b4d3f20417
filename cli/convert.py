"""`ropewalk convert`: a checkpoint or a GGUF file, made long by a closed form or a schedule, requantised, or both."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .terminal import Advance, out, progress, size

if TYPE_CHECKING:
    from ..container import Header
    from ..convert import Plan
    from ..factors import Schedule

FLOATS = ("f32", "f16", "bf16")  # bringing quantised weights to these rounds nothing that matters


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file, a Hugging Face checkpoint's folder, or its name there: org/name@revision.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="Where to write it.")],
    context: Annotated[int | None, typer.Option(metavar="TOKENS", help="The longest context it is to hold.")] = None,
    method: Annotated[
        str | None, typer.Option(metavar="yarn|ntk|pi", help="How the factors are made (yarn if not given).")
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(metavar="S.json", help="A schedule to embed, in place of a method's.")
    ] = None,
    weight_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="q8_0",
            help="Weights as f16, q8_0, q4_k_m, …; if not given, a checkpoint's in 16 bits, a file's as they are.",
        ),
    ] = None,
    existing: Annotated[
        str | None,
        typer.Option(
            metavar="compose|replace",
            help="Factors the file carries: multiply onto all of them, or drop all. If not given, the model's own are"
            " kept and a schedule embedded before is dropped.",
        ),
    ] = None,
    split_max_size: Annotated[
        str | None, typer.Option(metavar="2G", help="Several files of at most so many bytes of weights each.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.gguf if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was done as one JSON object.")] = False,
) -> None:
    """Make a model long: embed rescale factors for a longer context, and requantise it if asked.

    A checkpoint becomes a GGUF file, with or without that.
    """
    from ..convert import in_parts, is_checkpoint, parse_size

    wishes = FactorOptions(context, method, schedule, existing)
    way = _from_checkpoint if is_checkpoint(source) else _from_file
    if split_max_size is None:
        said = way(source, target, wishes, weight_type, force)
        names: tuple[Path, ...] = (target,)
    else:
        all_said: list[ConversionNotes] = []
        names = in_parts(
            lambda whole: all_said.append(way(source, whole, wishes, weight_type, True)),
            target,
            parse_size(split_max_size),
            force=force,
            bar=_bar,
        )
        said = all_said[0]
    facts = _gather(source, names, said)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False, indent=1))
    else:
        _show(facts)


@dataclass(frozen=True)
class ConversionNotes:
    """What a conversion did about the factors, and what else is to be known."""

    plan: Plan | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FactorOptions:
    """What is to become of the factors, as the command line has it."""

    context: int | None
    method: str | None
    schedule: Path | None
    existing: str | None

    def plan(self, header: Header) -> Plan | None:
        """The plan for a model; None where the model's factors are to stay as they are."""
        from ..convert import plan_extension, plan_given
        from ..factors import read_schedule

        if self.schedule is not None:
            if self.method is not None:
                raise UserError(f"--method {self.method}: has no meaning with --schedule, which brings its own factors")
            given = read_schedule(self.schedule)
            return plan_given(header, given, str(self.schedule), self.context, self.existing)
        if self.context is not None:
            return plan_extension(header, self.context, self.method or "yarn", self.existing)
        for name, value in (("--method", self.method), ("--existing", self.existing)):
            if value is not None:
                raise UserError(f"{name} {value}: expected --context with it")
        return None


def _from_file(
    source: str, target: Path, wishes: FactorOptions, weight_type: str | None, force: bool
) -> ConversionNotes:
    """Convert a GGUF file."""
    from ..container import read_header
    from ..convert import convert_model, quantised_types

    header = read_header(source)
    plan = wishes.plan(header)
    if plan is None and weight_type is None:
        raise UserError("nothing to do: expected --context, --schedule or --type")
    schedule = plan.schedule if plan else None
    convert_model(source, target, schedule=schedule, weight_type=weight_type, force=force, bar=_bar)
    lossy = quantised_types(header) if weight_type is not None and weight_type.lower() not in FLOATS else []
    if not lossy:
        return ConversionNotes(plan)
    return ConversionNotes(
        plan, (f"the weights were quantised already ({', '.join(lossy)}): rounding them again loses a little",)
    )


def _from_checkpoint(
    source: str, target: Path, wishes: FactorOptions, weight_type: str | None, force: bool
) -> ConversionNotes:
    """Convert a checkpoint, fetched first if it is a name on the hub."""
    from ..convert import checkpoint_folder, convert_checkpoint

    plans: list[Plan | None] = []

    def choose(header: Header) -> Schedule | None:
        plans.append(wishes.plan(header))
        return plans[0].schedule if plans[0] else None

    folder = checkpoint_folder(source)
    name = None if Path(source).is_dir() else source.partition("@")[0].rpartition("/")[2]
    notes = convert_checkpoint(folder, target, weight_type=weight_type, choose=choose, name=name, force=force, bar=_bar)
    return ConversionNotes(plans[0], notes)


def _bar(label: str) -> AbstractContextManager[Advance]:
    return progress(label, is_bytes=True)


def _gather(source: str, names: tuple[Path, ...], said: ConversionNotes) -> dict[str, Any]:
    from ..container import read_header, schedule_of, takes_native_factors, what_stock_does

    written = read_header(names[0])
    schedule = schedule_of(written)
    plain = len(schedule.bands) == 1 and set(schedule.bands[0].rescale_factors) == {1.0}
    kept = "not extended: --context makes it hold more" if plain else "the model's own factors are kept"
    return {
        "source": source,
        "target": str(names[0]),
        "files": [str(name) for name in names],
        "bytes": sum(name.stat().st_size for name in names),
        "architecture": written.arch,
        "original_context": schedule.facts.original_context,
        "context": schedule.context,
        "bands": [band.model_dump() for band in schedule.bands],
        "native_factors": takes_native_factors(written),
        "notes": [said.plan.note if said.plan else kept, *said.notes],
        "stock_llama_cpp": what_stock_does(written),
    }


def _show(facts: dict[str, Any]) -> None:
    def say(line: str) -> None:
        out.print(line, markup=False, soft_wrap=True)

    more = f" and {len(facts['files']) - 1} more" if len(facts["files"]) > 1 else ""
    say(f"{facts['target']}{more}: {size(facts['bytes'])}, {facts['architecture']}")
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
