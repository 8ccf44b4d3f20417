"""`ropewalk convert`: a checkpoint or GGUF file to a GGUF file, extended by a closed form or schedule, requantised."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .terminal import Advance, out, printable, progress, size

if TYPE_CHECKING:
    from ..container import Header
    from ..convert import Plan
    from ..factors import Schedule

FLOATS = ("f32", "f16", "bf16")  # converting quantised weights to these rounds nothing that matters


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file, a folder with a Hugging Face checkpoint, or its name on the Hub: org/name@revision.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="GGUF file to write.")],
    context: Annotated[int | None, typer.Option(metavar="TOKENS", help="Context to extend the model to.")] = None,
    method: Annotated[
        str | None, typer.Option(metavar="yarn|ntk|pi|near", help="How to compute the rescale factors (default: yarn).")
    ] = None,
    near_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="For --method near: the distance up to which tokens are seen as the model was trained to"
            " (default: half the original context).",
        ),
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(metavar="S.json", help="Rescale schedule (JSON) to embed, instead of --method.")
    ] = None,
    weight_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="q8_0",
            help="Type of the weights: f16, q8_0, q4_k_m, … (default: 16 bits for a checkpoint, else unchanged).",
        ),
    ] = None,
    existing: Annotated[
        str | None,
        typer.Option(
            metavar="compose|replace",
            help="What to do with factors that the model already has: compose multiplies the new ones onto all of them,"
            " replace drops them all. By default its own are kept and an embedded schedule is dropped.",
        ),
    ] = None,
    split_max_size: Annotated[
        str | None,
        typer.Option(metavar="2G", help="Split the output into files with at most this many bytes of weights each."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.gguf if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as a JSON object.")] = False,
) -> None:
    """Extend a model to a longer context by embedding rescale factors, requantise it, or both.

    A Hugging Face checkpoint is converted to a GGUF file, extended or not.
    """
    from ..convert import in_parts, is_checkpoint, parse_size

    options = FactorOptions(context, method, near_tokens, schedule, existing)
    convert_source = _from_checkpoint if is_checkpoint(source) else _from_file
    if split_max_size is None:
        notes = convert_source(source, target, options, weight_type, force)
        names: tuple[Path, ...] = (target,)
    else:
        all_notes: list[ConversionNotes] = []
        names = in_parts(
            lambda whole: all_notes.append(convert_source(source, whole, options, weight_type, True)),
            target,
            parse_size(split_max_size),
            force=force,
            bar=_bar,
        )
        notes = all_notes[0]
    facts = _gather(source, names, notes)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False, indent=1))
    else:
        _show(facts)


@dataclass(frozen=True)
class ConversionNotes:
    """What a conversion did with the factors, notes for the user, and why llama.cpp does not load it, if so."""

    plan: Plan | None
    notes: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class FactorOptions:
    """The command-line options about rescale factors."""

    context: int | None
    method: str | None
    near_tokens: int | None
    schedule: Path | None
    existing: str | None

    def plan(self, header: Header) -> Plan | None:
        """The plan for a model; None if its factors stay as they are.

        Raises:
            UserError: options that do not go together, or do not suit the model.
        """
        from ..convert import plan_extension, plan_given
        from ..factors import read_schedule

        if self.near_tokens is not None and self.method != "near":
            raise UserError(f"--near-tokens {self.near_tokens}: expected --method near with it")
        if self.schedule is not None:
            if self.method is not None:
                raise UserError(f"--method {self.method}: not allowed with --schedule, which has its own factors")
            given = read_schedule(self.schedule)
            return plan_given(header, given, str(self.schedule), self.context, self.existing)
        if self.context is not None:
            return plan_extension(header, self.context, self.method or "yarn", self.existing, self.near_tokens)
        for name, value in (("--method", self.method), ("--existing", self.existing)):
            if value is not None:
                raise UserError(f"{name} {value}: expected --context with it")
        return None


def _from_file(
    source: str, target: Path, options: FactorOptions, weight_type: str | None, force: bool
) -> ConversionNotes:
    """Convert a GGUF file."""
    from ..container import read_header
    from ..convert import convert_model, load_problem, quantised_types

    header = read_header(source)
    plan = options.plan(header)
    if plan is None and weight_type is None:
        raise UserError("nothing to do: expected --context, --schedule or --type")
    schedule = plan.schedule if plan else None
    convert_model(source, target, schedule=schedule, weight_type=weight_type, force=force, bar=_bar)
    lossy = quantised_types(header) if weight_type is not None and weight_type.lower() not in FLOATS else []
    notes = []
    if lossy:
        kinds = ", ".join(lossy)
        notes.append(f"the weights were quantised already ({kinds}): rounding them again loses some precision")
    return ConversionNotes(plan, tuple(notes), load_problem(target, source))


def _from_checkpoint(
    source: str, target: Path, options: FactorOptions, weight_type: str | None, force: bool
) -> ConversionNotes:
    """Convert a checkpoint; one that is a name on the Hub is downloaded first."""
    from ..convert import checkpoint_folder, convert_checkpoint

    plans: list[Plan | None] = []

    def choose(header: Header) -> Schedule | None:
        plans.append(options.plan(header))
        return plans[0].schedule if plans[0] else None

    folder = checkpoint_folder(source)
    name = None if Path(source).is_dir() else source.partition("@")[0].rpartition("/")[2]
    notes = convert_checkpoint(folder, target, weight_type=weight_type, choose=choose, name=name, force=force, bar=_bar)
    return ConversionNotes(plans[0], notes)


def _bar(label: str) -> AbstractContextManager[Advance]:
    return progress(label, is_bytes=True)


def _gather(source: str, names: tuple[Path, ...], conversion: ConversionNotes) -> dict[str, Any]:
    from ..container import read_header, schedule_of, takes_native_factors, what_stock_does

    written = read_header(names[0])
    schedule = schedule_of(written)
    plain = len(schedule.bands) == 1 and set(schedule.bands[0].rescale_factors) == {1.0}
    kept = "not extended; use --context to extend it" if plain else "the model's own factors are kept"
    stock = what_stock_does(written)
    if conversion.problem is not None:
        stock = [f"does not load it (llama-cpp-python {version('llama-cpp-python')}): {conversion.problem}"]
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
        "notes": [conversion.plan.note if conversion.plan else kept, *conversion.notes],
        "stock_llama_cpp": stock,
    }


def _show(facts: dict[str, Any]) -> None:
    from ..factors import Band

    def say(line: str) -> None:
        out.print(printable(line), markup=False, soft_wrap=True)

    more = f" and {len(facts['files']) - 1} more" if len(facts["files"]) > 1 else ""
    say(f"{facts['target']}{more}: {size(facts['bytes'])}, {facts['architecture']}")
    say(f"trained for {facts['original_context']:,} tokens, holds {facts['context']:,}")
    for band in map(Band.model_validate, facts["bands"]):
        factors = band.moving_factors
        start = f", start tokens {band.start_tokens}" if band.start_tokens else ""
        near = f" beyond {band.near_tokens:,} tokens" if band.near_tokens else ""
        near += f", where the {band.still_pairs} fastest pairs stand still" if band.still_pairs else ""
        say(
            f"  up to {band.context:>9,}  λ {min(factors):.4g} to {max(factors):.4g}{near},"
            f" attention × {band.attention_factor:.4g}{start}  ({band.found.method})"
        )
    for note in facts["notes"]:
        say(f"note: {note}")
    say(f"stock llama.cpp: {' '.join(facts['stock_llama_cpp'])}")
