"""`ropewalk summarize`: documents in, and one line of JSON out for each as soon as it is done."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .model import LoadOptions, load_model, model_path
from .prompt_cache import DEFAULT_SIZE, CacheFolder, CacheSize, open_cache, open_folder

if TYPE_CHECKING:
    from ..runtime import Llama
    from ..runtime.chat import Results, StandardOutput, Summarizer, Summary
    from ..runtime.chat.results import Key
    from .documents import Document, Source

RECORD_VERSION = 2  # increase it when the same settings would give different summaries than before


def summarize(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATHS...", help="Text or Markdown files, JSON Lines (see --field), folders, quoted patterns."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON Lines file to write; - = standard output.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Path to a GGUF model.", show_default="the bundled SmolLM2")
    ] = None,
    field: Annotated[str | None, typer.Option(help="Field that holds the text, in JSON Lines.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask about each text.", show_default="a summary in a few sentences")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="Maximum number of tokens in a summary.")] = 256,
    context: Annotated[
        int, typer.Option(min=0, help="Context size in tokens; 0 = as much as the last band holds.")
    ] = 0,
    kv: Annotated[str, typer.Option(help="KV cache type: f16, q8_0, q4_0, q8_0:f16 (K:V), or auto.")] = "auto",
    schedule: Annotated[
        Path | None, typer.Option(help="Rescale schedule (JSON) to use instead of the model's.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU threads.", show_default="one per core")
    ] = None,
    temp: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 = greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Random seed, for temperatures above 0.")] = 0,
    prompt_cache: CacheFolder = None,
    prompt_cache_size: CacheSize = DEFAULT_SIZE,
    encoding: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Encoding of files without a byte order mark.", show_default="UTF-8, or cp1252"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start over: replace the output if it exists.")] = False,
) -> None:
    """Summarise documents to JSON Lines; the same command resumes a run that was stopped.

    Documents that the output already holds (same text, model, prompt and
    settings) are skipped; those that failed are tried again, and the summary of
    one that has changed is replaced.
    A document longer than the context is split at paragraphs, and the parts'
    summaries are summarised together.
    Exit code 1: some documents could not be summarised; their lines say why.
    """
    from ..runtime.chat import PROMPT, SummarySettings
    from .documents import check_encoding, find_files
    from .terminal import note

    if prompt is not None and not prompt.strip():
        raise UserError("--prompt: empty, expected what to ask about each text")
    check_encoding(encoding)
    found = find_files(paths, records=field is not None, leave_out=None if str(output) == "-" else output)
    options = LoadOptions(context=context, kv=kv, schedule=schedule, threads=threads)
    settings = SummarySettings(prompt=(prompt or PROMPT).strip(), max_tokens=max_tokens, temperature=temp, seed=seed)
    with _open_output(output, force) as results:
        source = model_path(model)
        options, digest = _digest(source, options, settings, cached=prompt_cache is not None, encoding=encoding)
        job = _Job(found.sources, field, encoding, digest)
        folder = open_folder(prompt_cache, prompt_cache_size)
        with _stopping(job, results):
            unread = _survey(job, results)
            if unread:
                from ..runtime.chat import Summarizer

                llm = load_model(source, options)
                _work(job, unread, results, llm, Summarizer(llm, settings, open_cache(llm, folder)))
            results.drop(job.stale())
    for line in found.notes:
        note(line)
    _report(job, results)
    if job.n_failed:
        raise typer.Exit(1)


@dataclass
class _Job:
    """The task, and how much of it is done."""

    sources: list[Source]
    field: str | None
    encoding: str | None
    settings: str
    n_documents: int = 0
    n_before: int = 0
    n_done: int = 0
    n_failed: int = 0
    n_noted: int = 0
    summarised: set[tuple[str, str]] = dataclass_field(default_factory=set)
    former: dict[tuple[str, str], list[Key]] = dataclass_field(default_factory=dict)

    def stale(self) -> set[Key]:
        """The records of former texts of documents, by id and path, that have a summary of their present text."""
        return {key for place in self.summarised for key in self.former.get(place, [])}


def _open_output(output: Path, force: bool) -> Results | StandardOutput:
    from ..runtime.chat import Results, StandardOutput

    return StandardOutput() if str(output) == "-" else Results(output, force=force)


def _digest(
    source: Path, options: LoadOptions, settings: Any, *, cached: bool, encoding: str | None
) -> tuple[LoadOptions, str]:
    """Return the options with what is chosen by the machine's state, and a digest of all that a summary depends on.

    Besides the text, that is the model's content, not its path. Threads are part of it, as they share the work out in
    blocks that round differently (other summaries for four of six texts, with one thread and with two), and a prompt
    cache, as then text and question are read apart (five of six).
    """
    from ..container import model_digest
    from ..factors import read_schedule
    from ..runtime.chat import settings_digest
    from ..runtime.threads import default_threads

    schedule = read_schedule(options.schedule).model_dump(mode="json") if options.schedule else None
    digest = model_digest(source)
    options = replace(options, kv=_kv_type(source, options), threads=options.threads or default_threads())
    return options, settings_digest(
        {
            "version": RECORD_VERSION,
            "model": digest,
            "context": options.context,
            "kv": options.kv,
            "schedule": schedule,
            "threads": options.threads,
            "prompt_cache": cached,
            "encoding": encoding,
            **asdict(settings),
        }
    )


def _kv_type(source: Path, options: LoadOptions) -> str:
    """The cache type that "auto" stands for on this machine, now."""
    if options.kv != "auto":
        return options.kv
    from ..container import read_header, schedule_of
    from ..factors import read_schedule
    from ..runtime import choose_kv

    header = read_header(source)
    schedule = read_schedule(options.schedule) if options.schedule else schedule_of(header)
    n_ctx = options.context or schedule.context
    if n_ctx > schedule.context:
        return options.kv  # loading says that this is too long
    return choose_kv(header, n_ctx, "auto", flash_attn=True, bands=len(schedule.bands)).kv_type


def _survey(job: _Job, results: Results | StandardOutput) -> dict[str, int]:
    """Go through all documents once; return the ids of those still to do, with their bytes."""
    from .documents import read_documents

    done = Counter(results.done)
    unread: dict[str, int] = {}
    present: set[Key] = set()
    for document in read_documents(job.sources, job.field, job.encoding):
        job.n_documents += 1
        key = (document.id, document.digest, job.settings)
        present.add(key)
        if document.error is None and done[key] > 0:
            done[key] -= 1
            job.n_before += 1
            job.summarised.add((document.id, document.path))
        else:
            unread[document.id] = unread.get(document.id, 0) + document.n_bytes
    for key, path in results.paths.items():
        if key not in present and key[2] == job.settings:
            job.former.setdefault((key[0], str(path)), []).append(key)
    return unread


def _work(
    job: _Job, unread: dict[str, int], results: Results | StandardOutput, llm: Llama, summarizer: Summarizer
) -> None:
    from .documents import read_documents
    from .terminal import progress

    results.begin(set(unread))
    total, before = sum(unread.values()), 0
    with progress("Summarising", is_bytes=True) as advance:
        for document in read_documents(job.sources, job.field, job.encoding):
            if document.error is None and results.take_done((document.id, document.digest, job.settings)):
                continue
            results.append(_record(job, document, llm, summarizer, _share(advance, before, document.n_bytes, total)))
            before += document.n_bytes
            advance(before, total)


def _share(advance: Callable[[int, int], None], before: int, n_bytes: int, total: int) -> Callable[[int, int], None]:
    """A callback that turns a document's progress in tokens into the progress of all documents in bytes."""
    return lambda done, tokens: advance(before + n_bytes * done // max(tokens, 1), total)


def _record(
    job: _Job, document: Document, llm: Llama, summarizer: Summarizer, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Summarise one document and return its record; an error goes into the record."""
    head = {"id": document.id, "source": document.source, "digest": document.digest, "settings": job.settings}
    head |= {"path": document.path} | ({"note": document.note} if document.note else {})
    job.n_noted += document.note is not None
    error = document.error
    if error is None:
        try:
            summary = summarizer.summarize(document.text, advance)
        except (UserError, RuntimeError, MemoryError) as problem:
            error = str(problem) or type(problem).__name__
        else:
            job.n_done += 1
            job.summarised.add((document.id, document.path))
            _say(_line(document, summary))
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
        "finish_reason": summary.finish_reason,
        "timings": {
            "read_s": round(summary.read_s, 3),
            "write_s": round(summary.write_s, 3),
            "tokens_per_s": round(summary.tokens_per_s, 1),
        },
        "summary": summary.text,
    }


def _line(document: Document, summary: Summary) -> str:
    noted = f"; {document.note}" if document.note else ""
    cut = ", cut at the limit" if summary.finish_reason == "length" else ""
    split = f" in {summary.parts} parts" if summary.parts > 1 else ""
    return (
        f"{document.id}: {summary.n_tokens:,} tokens{split},"
        f" band {summary.band_index + 1} (to {summary.band.context:,}),"
        f" read {summary.read_s:.1f} s, wrote {summary.write_s:.1f} s{cut}{noted}"
    )


def _say(line: str, style: str = "dim") -> None:
    """Print a note, on a terminal only."""
    from .terminal import err, printable

    if err.is_terminal:
        err.print(printable(line), style=style, markup=False)


@contextmanager
def _stopping(job: _Job, results: Results | StandardOutput) -> Iterator[None]:
    """Make Ctrl-C and SIGTERM end with one line: how many documents are done, and how to resume."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        done = job.n_before + job.n_done
        hint = "" if str(results.path) == "-" else "; the same command resumes from here"
        print(f"ropewalk: stopped: {done} of {job.n_documents} documents are done{hint}", file=sys.stderr)
        raise SystemExit(stop.code if isinstance(stop, SystemExit) else 130) from None


def _report(job: _Job, results: Results | StandardOutput) -> None:
    from .terminal import note

    skipped = f", {job.n_before} were done before" if job.n_before else ""
    place = "standard output" if str(results.path) == "-" else results.path
    if job.n_noted:
        note(f'{job.n_noted} of {job.n_documents} documents were not plain UTF-8: see "note" in {place}')
    if job.n_failed:
        failed = f"{job.n_failed} of {job.n_documents} documents could not be summarised{skipped}"
        note(f"{failed}; {place} says why", style="red")
    else:
        note(f"{job.n_done} documents summarised{skipped}: {place}")
