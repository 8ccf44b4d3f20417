"""`ropewalk demo`: extend, read and summarise once, on the bundled model and a real text, in a few readable lines."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import out, progress, size

if TYPE_CHECKING:
    from ..factors import Schedule
    from ..runtime import Llama
    from ..runtime.measure import HiddenKey, KeyReading

KV_TYPE = "q8_0"
SUMMARY_TOKENS = 80
MARGIN = 40  # tokens for the instruction to summarise and the chat template


def demo(
    tokens: Annotated[
        int, typer.Option(min=1, help="Length of the text, in tokens; more than the model was trained for.")
    ] = 15_990,
    seed: Annotated[int, typer.Option(help="Random seed for the pass key.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Plot perplexity against position.")] = None,
) -> None:
    """Extend the bundled model, read a text twice its trained length, find a key hidden in it, and summarise it."""
    from ..container import native_schedule, read_header, schedule_of
    from ..errors import UserError
    from .model import bundled_long, bundled_model
    from .picture import check_picture_place

    if plot is not None:
        check_picture_place(plot)
    started = time.perf_counter()
    original = native_schedule(read_header(bundled_model()))
    model = bundled_long()
    extended = schedule_of(read_header(model))
    trained = original.context
    if not trained < tokens <= extended.context - SUMMARY_TOKENS - MARGIN:
        raise UserError(
            f"--tokens: {tokens}, expected more than {trained} and at most {extended.context - SUMMARY_TOKENS - MARGIN}"
        )
    _say(f"[bold]1  Extend[/]   {bundled_model().stem}, trained for {trained:,} tokens, to {extended.context:,}")
    _show_bands(extended)
    llm, changes = _load(model, extended, tokens)
    hidden = _hide(llm, tokens, seed)
    before, after = _read_twice(llm, hidden, original, extended)
    _show_readings(before, after, hidden, trained, len(hidden.text))
    _summarise(llm, hidden)
    _say(
        f"[bold]In total[/]    {time.perf_counter() - started:.0f} s; {len(hidden.text):,} tokens in a {KV_TYPE} cache"
        f" of {size(llm.cache_bytes)}"
    )
    for line in changes:
        _say(f"            [dim]{line}[/]")
    if plot is not None:
        from .picture import draw_losses, save_figure

        curves = {"unmodified": before.losses, "extended": after.losses}
        save_figure(draw_losses(curves, trained, "A text longer than the model was trained for"), plot)
        _say(f"            perplexity against position plotted in {plot}")
    llm.close()


def _say(line: str) -> None:
    out.print(line, soft_wrap=True)


def _show_bands(schedule: Schedule) -> None:
    from .picture import spark

    for context, bars in spark(schedule):
        _say(f"            {context:>7} tokens  {bars}")
    still = any(band.still_pairs for band in schedule.bands)
    beyond = "; · stands still beyond the near window" if still else ""
    _say(f"            [dim]rescale factor λ of each rotary pair, from the fastest to the slowest{beyond}[/]")


def _load(model: Path, schedule: Schedule, tokens: int) -> tuple[Llama, list[str]]:
    from ..runtime import BandChange, Llama

    needed = tokens + MARGIN + SUMMARY_TOKENS
    n_ctx = schedule.bands[schedule.band_index(needed)].context
    llm = Llama(model, n_ctx=n_ctx, kv=KV_TYPE, verbose=False)
    changes: list[str] = []

    def note(change: BandChange) -> None:
        if change.old.rescale_factors == change.new.rescale_factors:
            return  # the unmodified model, run past the context it was trained for
        changes.append(
            f"{change.n_tokens:,} cached tokens moved from the {change.old.context:,} to the {change.new.context:,}"
            f" band in {change.seconds:.2f} s, without reading them again"
        )

    llm.on_band_change = note
    return llm, changes


def _hide(llm: Llama, tokens: int, seed: int) -> HiddenKey:
    import pydoc_data.topics

    from ..runtime.measure import hide_key

    key = str(random.Random(seed).randrange(10_000, 100_000))
    text = "\n\n".join(pydoc_data.topics.topics.values())
    hidden = hide_key(llm, text, tokens, key)
    _say(
        f"[bold]2  Read[/]     {len(hidden.text):,} tokens of Python's documentation with the pass key {key} hidden"
        " in the middle"
    )
    return hidden


def _read_twice(llm: Llama, hidden: HiddenKey, original: Schedule, extended: Schedule) -> tuple[KeyReading, KeyReading]:
    """Read with the model unmodified and extended; what both share, up to the original context, is read once."""
    from ..factors import Schedule
    from ..runtime.measure import read_key

    trained = original.context
    with _reading(llm, f"Both: the first {trained:,} tokens"):
        llm.eval(hidden.tokens[: trained - 1])
    unscaled = original.bands[-1].model_copy(update={"context": llm.n_ctx()})
    unmodified = Schedule(facts=original.facts, bands=(unscaled,))
    with _reading(llm, "Unmodified: the rest"):
        before = read_key(llm, hidden, unmodified, trained)
    with _reading(llm, "Extended: the rest"):
        after = read_key(llm, hidden, extended, trained)
    return before, after


@contextmanager
def _reading(llm: Llama, label: str) -> Iterator[None]:
    with progress(label) as llm.on_progress:
        yield
    llm.on_progress = None


def _show_readings(before: KeyReading, after: KeyReading, hidden: HiddenKey, trained: int, length: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("            ")
    for name in ("unmodified", "extended"):
        table.add_column(name, justify="right")
    table.add_row(
        f"            perplexity, tokens {trained:,} to {length:,}",
        *(f"{reading.perplexity:.1f}" for reading in (before, after)),
    )
    table.add_row("            loss on the key's digits (nats)", *(f"{r.key_loss:.2f}" for r in (before, after)))
    table.add_row('            "The secret pass key of the vault is …"', *(repr(r.answer) for r in (before, after)))
    table.add_row("            seconds for those tokens", *(f"{r.seconds:.0f}" for r in (before, after)))
    out.print(table)
    found = [hidden.key in reading.answer for reading in (before, after)]
    verdict = {
        (False, True): "the unmodified model has lost the key; the extended one finds it",
        (True, True): "both find the key",
        (False, False): "neither finds the key",
        (True, False): "only the unmodified model finds the key",
    }[found[0], found[1]]
    _say(f"            {verdict}")


def _summarise(llm: Llama, hidden: HiddenKey) -> None:
    from ..runtime.chat import PROMPT, Answer, ChatTemplate, Message, Sampling

    prompt = ChatTemplate(llm).tokens([Message("user", f"{hidden.body}\n\n{PROMPT}")])
    answer = Answer(llm, prompt, Sampling(max_tokens=SUMMARY_TOKENS))
    answer.write()
    _say(
        f"[bold]3  Summarise[/] the same text: {answer.read_tokens:,} of {answer.prompt_tokens:,} tokens were not read"
        f" before; {answer.written_tokens} generated at {answer.write_speed:.0f} tokens/s"
    )
    for line in answer.text.strip().splitlines():
        _say(f"            [italic]{line}[/]")
