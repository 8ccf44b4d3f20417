"""Convert a model from one GGUF file to another: requantised, with a schedule, or both, in one output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from ..container import read_header, rope_facts
from ..container.writer import Advance
from ..errors import UserError
from ..factors import Schedule, check_matches
from .embed import check_source, write_embedded
from .output import output_file
from .requantise import check_weight_type, requantise

Bar = Callable[[str], AbstractContextManager[Advance]]
"""Given the name of a stage, shows its progress in bytes."""


@contextmanager
def no_bar(_: str) -> Iterator[Advance]:
    yield lambda done, total: None


def convert_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    schedule: Schedule | None = None,
    weight_type: str | None = None,
    force: bool = False,
    bar: Bar = no_bar,
) -> None:
    """Write the model in `source` to `target`, with `schedule` embedded and its weights as `weight_type`.

    Without a `schedule`, all factors that the file has are kept unchanged.

    Raises:
        UserError: `source` is not a complete GGUF file or has no RoPE, the schedule is for another model, the type is
            unknown or impossible for this model, or the output cannot be written; `target` is then unchanged.
    """
    header = read_header(source)
    check_source(header)
    facts = rope_facts(header)
    if schedule is not None:
        check_matches(schedule, facts, str(source))
    elif weight_type is None:
        raise UserError("nothing to do: give a schedule, a weight type, or both")
    weight_type = check_weight_type(weight_type) if weight_type is not None else None
    with output_file(target, source=header.path, force=force) as output:
        if weight_type is not None:
            place, copies = (output.part, 1) if schedule is None else (output.scratch, 2)
            with bar(f"Requantising to {weight_type}") as advance:
                requantise(header, place, weight_type, target=output.target, copies=copies, on_progress=advance)
            header = read_header(place)
        if schedule is not None:
            with bar("Writing") as advance:
                write_embedded(header, schedule, output.part, output.target, advance)
