"""`ropewalk summarize`: documents in, one line of JSON out for each as soon as it is done."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .prompt_cache import DEFAULT_SIZE, CacheFolder, CacheSize, open_cache, open_folder

if TYPE_CHECKING:
    from ..runtime import Llama
    from ..runtime.chat.results import Results, StandardOutput
    from ..runtime.chat.summary import Summarizer, Summary
    from .documents import Document

RECORD_VERSION = 1  # raise it when the same settings would give other summaries than before


def summarize(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATHS...", help="Text and Markdown files, JSON Lines (see --field), folders, quoted patterns."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the summaries go, as JSON Lines; - = stdout.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="A GGUF file.", show_default="the bundled SmolLM2")
    ] = None,
    field: Annotated[str | None, typer.Option(help="In JSON Lines: the field that holds the text.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask of each text.", show_default="a few sentences")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="The longest summary, in tokens.")] = 256,
    context: Annotated[int, typer.Option(min=0, help="Context in tokens; 0 = all that the last band holds.")] = 0,
    kv: Annotated[str, typer.Option(help="Cache type: f16, q8_0, q4_0, q8_0:f16 (K:V), or auto.")] = "auto",
    schedule: Annotated[Path | None, typer.Option(help="A rescale schedule (JSON) in place of the model's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="one a core")] = None,
    temp: Annotated[float, typer.Option(min=0.0, help="Temperature; 0 = always the likeliest word.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed, for temperatures above 0.")] = 0,
    prompt_cache: CacheFolder = None,
    prompt_cache_size: CacheSize = DEFAULT_SIZE,
    force: Annotated[bool, typer.Option("--force", help="Start the output over, whatever it holds.")] = False,
) -> None:
    """Summarise documents; run it again to go on where it was stopped.

    What OUT already holds (same text, model, prompt and settings) is skipped, and errors are tried again. A document
    longer than the context is split at paragraphs, and the parts' summaries are summarised together.
    Exit code 1: some documents could not be summarised; their lines say why.
    """
    from ..runtime.chat.summary import PROMPT, SummarySettings
    from .documents import find_files
    from .model import LoadOptions, load_model, model_path

    if prompt is not None and not prompt.strip():
        raise UserError("--prompt: empty, expected what to ask of each text")
    files = find_files(paths, records=field is not None, leave_out=None if str(output) == "-" else output)
    options = LoadOptions(context=context, kv=kv, schedule=schedule, threads=threads)
    settings = SummarySettings(prompt=(prompt or PROMPT).strip(), max_tokens=max_tokens, temperature=temp, seed=seed)
    with _open_output(output, force) as results:
        source = model_path(model)
        job = _Job(files, field, _digest(source, options, settings))
        folder = open_folder(prompt_cache, prompt_cache_size)
        with _stopping(job, results):
            unread = _survey(job, results)
            if unread:
                from ..runtime.chat.summary import Summarizer

                llm = load_model(source, options)
                _work(job, unread, results, llm, Summarizer(llm, settings, open_cache(llm, folder)))
    _say_what_was_done(job, results)
    if job.n_failed:
        raise typer.Exit(1)


@dataclass
class _Job:
    """What is asked, and how far it is."""

    files: list[Path]
    field: str | None
    settings: str
    n_documents: int = 0
    n_before: int = 0
    n_done: int = 0
    n_failed: int = 0


def _open_output(output: Path, force: bool) -> Results | StandardOutput:
    from ..runtime.chat.results import Results, StandardOutput

    return StandardOutput() if str(output) == "-" else Results(output, force=force)


def _digest(source: Path, options: Any, settings: Any) -> str:
    """A name for all that a summary depends on beside its text; threads and the place of the model are not of it."""
    from ..container import model_digest
    from ..factors import read_schedule
    from ..runtime.chat.results import settings_digest

    schedule = read_schedule(options.schedule).model_dump(mode="json") if options.schedule else None
    return settings_digest(
        {
            "version": RECORD_VERSION,
            "model": model_digest(source),
            "context": options.context,
            "kv": options.kv,
            "schedule": schedule,
            **asdict(settings),
        }
    )


def _survey(job: _Job, results: Results | StandardOutput) -> dict[str, int]:
    """Go through all documents once; ids of those still to do, with their bytes."""
    from .documents import read_documents

    done = Counter(results.done)
    unread: dict[str, int] = {}
    for document in read_documents(job.files, job.field):
        job.n_documents += 1
        key = (document.id, document.digest, job.settings)
        if document.error is None and done[key] > 0:
            done[key] -= 1
            job.n_before += 1
        else:
            unread[document.id] = unread.get(document.id, 0) + document.n_bytes
    return unread


def _work(
    job: _Job, unread: dict[str, int], results: Results | StandardOutput, llm: Llama, summarizer: Summarizer
) -> None:
    from .documents import read_documents
    from .terminal import progress

    results.begin(set(unread))
    total, before = sum(unread.values()), 0
    with progress("Summarising", is_bytes=True) as advance:
        for document in read_documents(job.files, job.field):
            if document.error is None and results.take_done((document.id, document.digest, job.settings)):
                continue
            results.append(_record(job, document, llm, summarizer, _share(advance, before, document.n_bytes, total)))
            before += document.n_bytes
            advance(before, total)


def _share(advance: Callable[[int, int], None], before: int, n_bytes: int, total: int) -> Callable[[int, int], None]:
    """What turns a document's progress in tokens into that of all in bytes."""
    return lambda done, tokens: advance(before + n_bytes * done // max(tokens, 1), total)


def _record(
    job: _Job, document: Document, llm: Llama, summarizer: Summarizer, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Summarise one document; what goes wrong with it becomes its record."""
    head = {"id": document.id, "source": document.source, "digest": document.digest, "settings": job.settings}
    error = document.error
    if error is None:
        try:
            summary = summarizer.summarize(document.text, advance)
        except (UserError, RuntimeError, MemoryError) as problem:
            error = str(problem) or type(problem).__name__
        else:
            job.n_done += 1
            _say(_line(document.id, summary))
            return {**head, **_result(summary, llm)}
    job.n_failed += 1
    _say(f"{document.id}: {error}", style="red")
    return {**head, "error": error}


def _result(summary: Summary, llm: Llama) -> dict[str, Any]:
    return {
        "tokens": summary.n_tokens,
        "parts": summary.parts,
        "split": summary.parts > 1,
        "band": {"index": summary.band_index, "context": summary.band.context},
        "kv_type": llm.plan.kv_type,
        "timings": {
            "read_s": round(summary.read_s, 3),
            "write_s": round(summary.write_s, 3),
            "tokens_per_s": round(summary.tokens_per_s, 1),
        },
        "summary": summary.text,
    }


def _line(name: str, summary: Summary) -> str:
    split = f" in {summary.parts} parts" if summary.parts > 1 else ""
    return (
        f"{name}: {summary.n_tokens:,} tokens{split}, band {summary.band_index + 1} (to {summary.band.context:,}),"
        f" read {summary.read_s:.1f} s, wrote {summary.write_s:.1f} s"
    )


def _say(line: str, style: str = "dim") -> None:
    """A passing note, on a terminal only."""
    from .terminal import err

    if err.is_terminal:
        err.print(line, style=style, markup=False)


@contextmanager
def _stopping(job: _Job, results: Results | StandardOutput) -> Iterator[None]:
    """Ctrl-C and SIGTERM end with one line: how far it is, and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        done = job.n_before + job.n_done
        on = "" if str(results.path) == "-" else "; the same command goes on from here"
        print(f"ropewalk: stopped: {done} of {job.n_documents} documents are done{on}", file=sys.stderr)
        raise SystemExit(stop.code if isinstance(stop, SystemExit) else 130) from None


def _say_what_was_done(job: _Job, results: Results | StandardOutput) -> None:
    skipped = f", {job.n_before} were done before" if job.n_before else ""
    if job.n_failed:
        failed = f"{job.n_failed} of {job.n_documents} documents could not be summarised{skipped}"
        print(f"ropewalk: {failed}; {results.path} says why", file=sys.stderr)
    else:
        _say(f"{job.n_done} documents summarised{skipped}: {results.path}")
