"""The `ropewalk` command: what commands there are, and how every one of them ends.

Exit codes: 0 done; 1 done, but some documents failed; 2 the user's mistake, in one line; 130 Ctrl-C; 143 SIGTERM.
Each command's module is imported when it is run, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from ..errors import UserError
from .chat import chat
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .inspect import inspect
from .search import search
from .summarize import summarize

app = typer.Typer(
    name="ropewalk",
    help="Long context for local language models: extend a GGUF, search its factors, chat, summarise.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (convert, inspect, search, chat, summarize, demo):
    app.command()(command)
app.command("eval")(evaluate)

UsageMistake: type[typer.BadParameter] = typer.BadParameter.__mro__[2]  # click's, wherever typer keeps its click


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ropewalk {version('ropewalk')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)  # unwinds, so that whatever is half-written is removed


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"ropewalk: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command line and turn every ending into its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        result = app(standalone_mode=False)
        sys.stdout.flush()
    except UsageMistake as error:
        fail(error.format_message())
    except UserError as error:
        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 130)
    except BrokenPipeError:
        # The reader has left (`ropewalk … | head`): there is nothing more to say, at the interpreter's end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    raise SystemExit(result if isinstance(result, int) else 0)
