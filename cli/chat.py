"""`ropewalk chat`: a conversation at the terminal, or one question and its answer."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .chat_settings import MAX_SEED, MAX_TOP_K, read_stop
from .model_names import complete_models, is_gguf
from .prompt_cache import DEFAULT_SIZE, CacheFolder, CacheSize, open_cache, open_folder

if TYPE_CHECKING:
    from ..runtime import Llama
    from ..runtime.chat import Answer
    from .chat_terminal import Chat
    from .model import LoadOptions

KV_NAMES = ("auto", "f16", "q8_0", "q8_0:f16", "q4_0")


def _complete_kv(incomplete: str) -> list[str]:
    return [name for name in KV_NAMES if name.startswith(incomplete)]


def _complete_saved(incomplete: str) -> list[str]:
    from .chat_places import saved_names

    return [name for name in saved_names() if name.startswith(incomplete)]


def chat(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL QUESTION",
            help="A GGUF file, a pattern, or the name of a downloaded model; and a question to answer at once.",
            show_default="the bundled SmolLM2",
            autocompletion=complete_models,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="The model, if not the first word.", autocompletion=complete_models
        ),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", metavar="FILE...", help="Documents to read first: files, folders or patterns."),
    ] = None,
    resume: Annotated[bool, typer.Option("--continue", "-c", help="Continue the latest conversation.")] = False,
    load: Annotated[
        str | None, typer.Option(metavar="NAME", help="Continue a saved conversation.", autocompletion=_complete_saved)
    ] = None,
    context: Annotated[
        int, typer.Option(min=0, help="Context size in tokens; 0 = as much as the last band holds.")
    ] = 0,
    kv: Annotated[
        str | None,
        typer.Option(
            help="KV cache type: f16, q8_0, q4_0, q8_0:f16 (K:V), or auto, the most exact that fits.",
            show_default="q8_0 for more than 8,192 tokens",
            autocompletion=_complete_kv,
        ),
    ] = None,
    system: Annotated[str, typer.Option(help="System message: how the model should answer.")] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of tokens in an answer.", show_default="the rest of the context"),
    ] = None,
    temp: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 = greedy.")] = 0.2,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Keep the most likely tokens with this probability in all.")
    ] = 0.95,
    top_k: Annotated[
        int, typer.Option(min=0, max=MAX_TOP_K, help="Keep so many of the most likely tokens; 0 = all.")
    ] = 40,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Drop tokens less likely than this share of the most likely one.")
    ] = 0.05,
    repeat_penalty: Annotated[float, typer.Option(min=0.01, max=100.0, help="Penalty for repetition; 1 = none.")] = 1.1,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help=r"A text that ends an answer (\n is a newline); repeatable."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Random seed, for reproducible answers.")
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(help="Rescale schedule (JSON) to use instead of the model's.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU threads.", show_default="one per core")
    ] = None,
    prompt_cache: CacheFolder = None,
    prompt_cache_size: CacheSize = DEFAULT_SIZE,
    markdown: Annotated[bool, typer.Option(help="Render Markdown and wrap at words, in a terminal.")] = True,
    autosave: Annotated[bool, typer.Option(help="Keep the conversation, for --continue.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="With a question: print the answer as a JSON object.")
    ] = False,
) -> None:
    """Chat with a model, and let it read whole documents.

    In the chat, /file PATH reads a document and /help lists all commands; /exit or Ctrl-D leaves.
    A question on the command line or from a pipe is answered at once: only the answer goes to standard output.
    """
    piped = sys.stdin is None or not sys.stdin.isatty()
    name, question, names = _parts(words or [], model, file or [])
    if as_json and not (piped or question):
        raise UserError("--json: expected a question, as in: ropewalk chat MODEL QUESTION --json")
    for number in (temp, top_p, min_p, repeat_penalty):
        if not math.isfinite(number):
            raise UserError(f"{number}: expected a finite number")
    from .chat_places import named_documents

    files = named_documents(names)
    if piped:
        question = _with_input(question)
    place = _place(resume, load)

    from .model import LoadOptions, full_context, load_fast, load_model, model_path

    path = model_path(name or (_model_of(place) if place else None))
    options = LoadOptions(context=context, kv=kv or "auto", schedule=schedule, threads=threads)
    folder = open_folder(prompt_cache, prompt_cache_size)

    from ..runtime.chat import Conversation, Sampling
    from .chat_autosave import Autosave
    from .chat_terminal import Chat
    from .terminal import err, plain

    def start(options: LoadOptions) -> Chat:
        with err.status(f"Loading {plain(path.name)}") if err.is_terminal else nullcontext():
            llm = load_model(path, options) if kv else load_fast(path, options)
            conversation = Conversation(llm, system, open_cache(llm, folder))
            if place is not None:
                conversation.load(place)
                if system:
                    conversation.set_system(system)
        return Chat(conversation, sampling, autosaves, markdown=markdown)

    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temp,
        seed=seed,
        repeat_penalty=repeat_penalty,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        stops=tuple(read_stop(text) for text in stop or ()),
    )
    # What scripts ask through pipes is kept only where they continue a conversation.
    autosaves = Autosave(active=autosave and (place is not None or not piped))
    if not question:
        start(options).converse(files, place, load or "")
        return
    if max_tokens is None or files or folder or place is not None:
        terminal = start(options)
    else:
        terminal = _start_small(start, path, options, question, system, max_tokens)
    if place is not None:
        terminal.adopt(place, load or "")
    _answer_once(terminal, files, question, as_json, full_context(path, options))


def _start_small(
    start: Callable[[LoadOptions], Chat], path: Path, options: LoadOptions, question: str, system: str, max_tokens: int
) -> Chat:
    """Load the model with a cache that holds this question and its answer: a long one takes time and memory."""
    from ..container import read_header
    from ..runtime.chat import most_tokens

    needed = most_tokens(read_header(path), question, system) + max_tokens
    terminal = start(replace(options, needed=needed))
    if terminal.conversation.prompt_tokens(question) + max_tokens <= needed:
        return terminal
    terminal.llm.close()
    return start(options)


def _parts(words: list[str], model: str | None, files: list[str]) -> tuple[str | None, str, list[str]]:
    """Return the model's name, the question, and the documents' names, as the words and options give them.

    After `-f *.txt` the shell has made words of all files but the first.
    """
    if files:
        texts = [word for word in words if Path(word).is_file() and not is_gguf(Path(word))]
        words, files = [word for word in words if word not in texts], [*files, *texts]
    if model is None and words and not _is_question(words[0]):
        model, *words = words
    if len(words) == 1 and Path(words[0]).is_file():
        raise UserError(f"{words[0]}: a file, expected a question; -f {words[0]} lets the model read it")
    return model, " ".join(words).strip(), files


def _is_question(word: str) -> bool:
    """Whether the first word is a question in quotes and not a model's name."""
    return any(char.isspace() for char in word.strip()) and not Path(word).expanduser().exists()


def _place(resume: bool, load: str | None) -> Path | None:
    """Return where the conversation to continue is kept, if one is asked for."""
    if load is not None:
        from .chat_places import place_to_load

        return place_to_load(load)
    if resume:
        from .chat_autosave import latest

        return latest()
    return None


def _model_of(place: Path) -> str | None:
    """Return the model that a conversation was held with, if it is still there."""
    from ..runtime.chat import read_saved
    from .terminal import err, plain

    model = read_saved(place).model
    if model and Path(model).is_file():
        return model
    if model and err.is_terminal:
        err.print(f"{plain(model)} is gone; the bundled model continues the conversation", style="dim")
    return None


def _with_input(question: str) -> str:
    """Return the question from a pipe; with one on the command line, that one, after what was piped."""
    from .documents import DocumentError, as_text

    raw = b"" if sys.stdin is None else sys.stdin.buffer.read()
    if question and not raw.strip():
        return question
    try:
        text = as_text(raw).strip()
    except DocumentError as error:
        raise UserError(f"standard input: {error}; expected a question") from None
    return f"{text}\n\n{question}".strip()


def _answer_once(terminal: Chat, files: list[Path], question: str, as_json: bool, context: int) -> None:
    """Print the answer as it is generated, or at the end as JSON."""
    for path in files:
        terminal.give(path)
    ask = terminal.ask_silently if as_json else terminal.show
    answer = ask(question)
    terminal.keep(at_the_end=True, quietly=True)
    if answer.ending == "interrupted":
        raise KeyboardInterrupt
    if as_json:
        print(json.dumps(_facts(answer, terminal.llm, context), ensure_ascii=False), flush=True)


def _facts(answer: Answer, llm: Llama, context: int) -> dict[str, Any]:
    return {
        "answer": answer.text.strip(),
        "ending": answer.ending,
        "tokens": {
            "prompt": answer.prompt_tokens,
            "read": answer.read_tokens,
            "answer": answer.written_tokens,
            "context": context,
        },
        "band": {"index": llm.band_index, "context": llm.band.context},
        "kv_type": llm.plan.kv_type,
        "timings": {
            "read_s": round(answer.read_s, 3),
            "write_s": round(answer.write_s, 3),
            "read_tokens_per_s": round(answer.read_speed, 1),
            "tokens_per_s": round(answer.write_speed, 1),
        },
    }
