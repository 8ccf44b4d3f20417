"""`ropewalk chat`: a conversation at the terminal, or one question from a pipe and its answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .prompt_cache import DEFAULT_SIZE, CacheFolder, CacheSize, open_cache, open_folder
from .reading_bar import ReadingBar

if TYPE_CHECKING:
    from ..runtime import Llama
    from ..runtime.chat import Answer, Conversation, Sampling


def chat(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Path to a GGUF model.", show_default="the bundled SmolLM2")
    ] = None,
    context: Annotated[
        int, typer.Option(min=0, help="Context size in tokens; 0 = as much as the last band holds.")
    ] = 0,
    kv: Annotated[str, typer.Option(help="KV cache type: f16, q8_0, q4_0, q8_0:f16 (K:V), or auto.")] = "auto",
    system: Annotated[str, typer.Option(help="System message: how the model should answer.")] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of tokens in an answer.", show_default="the rest of the context"),
    ] = None,
    temp: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 = greedy.")] = 0.2,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Random seed, for reproducible answers.")
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(help="Rescale schedule (JSON) to use instead of the model's.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU threads.", show_default="one per core")
    ] = None,
    prompt_cache: CacheFolder = None,
    prompt_cache_size: CacheSize = DEFAULT_SIZE,
    as_json: Annotated[
        bool, typer.Option("--json", help="With piped input: print the answer as a JSON object.")
    ] = False,
) -> None:
    """Chat with a model, and let it read whole documents.

    In the chat, /file PATH reads a document and /help lists all commands.
    Piped input is one question: only the answer goes to standard output.
    """
    from .model import LoadOptions, load_model, model_path

    piped = not sys.stdin.isatty()
    if as_json and not piped:
        raise UserError("--json: expected a question from a pipe, as in: echo QUESTION | ropewalk chat --json")
    question = _piped_question() if piped else ""
    path = model_path(model)
    options = LoadOptions(context=context, kv=kv, schedule=schedule, threads=threads)
    folder = open_folder(prompt_cache, prompt_cache_size)

    from ..runtime.chat import Conversation, Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temp, seed=seed)
    if piped:
        llm = load_model(path, options)
        conversation = Conversation(llm, system, open_cache(llm, folder))
        _answer_once(conversation, question, sampling, as_json)
    else:
        from .chat_terminal import run
        from .terminal import err

        with err.status(f"Loading {path.name}"):
            llm = load_model(path, options)
            cache = open_cache(llm, folder)
        run(Conversation(llm, system, cache), sampling)


def _piped_question() -> str:
    from .documents import DocumentError, as_text

    try:
        return as_text(sys.stdin.buffer.read()).strip()
    except DocumentError as error:
        raise UserError(f"standard input: {error}; expected a question") from None


def _answer_once(conversation: Conversation, question: str, sampling: Sampling, as_json: bool) -> None:
    """Print the answer as it is generated, or at the end as JSON."""
    llm = conversation.llm
    stream: Any = sys.stdout  # taken now, since a progress bar replaces sys.stdout
    stream.reconfigure(errors="replace")

    def show(text: str) -> None:
        bar.close()
        if not as_json:
            print(text, end="", file=stream, flush=True)

    with ReadingBar(llm, "Reading") as bar:
        answer = conversation.ask(question, sampling, show)
    if answer.ending == "interrupted":
        raise KeyboardInterrupt
    print(json.dumps(_facts(answer, llm), ensure_ascii=False) if as_json else "", file=stream, flush=True)


def _facts(answer: Answer, llm: Llama) -> dict[str, Any]:
    return {
        "answer": answer.text.strip(),
        "ending": answer.ending,
        "tokens": {
            "prompt": answer.prompt_tokens,
            "read": answer.read_tokens,
            "answer": answer.written_tokens,
            "context": llm.n_ctx(),
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
