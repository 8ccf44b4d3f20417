"""The `ropewalk` command: its subcommands, and how each of them exits.

Exit codes: 0 done; 1 done, but some documents failed; 2 a user error, in one line; 130 Ctrl-C; 143 SIGTERM.
What is slow to import is imported only when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
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
    help="Long context for local language models: extend a GGUF file, search its factors, chat, summarise.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Convert": {"convert": convert, "inspect": inspect},
    "Run": {"chat": chat, "summarize": summarize, "demo": demo},
    "Measure": {"search": search, "eval": evaluate},
}
for group, commands in GROUPS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=group)(command)

UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[2]  # click's, wherever typer keeps its click


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
    raise SystemExit(128 + signum)  # unwinds, so that half-written files are removed


def fail(message: str, code: int = 2) -> NoReturn:
    line = "".join(char for char in " ".join(message.split()) if char.isprintable())  # names in it may be anyone's
    print(f"ropewalk: {line}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command line, and exit with the right code however it ends."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        result = app(standalone_mode=False)
        sys.stdout.flush()
    except UsageError as error:
        fail(error.format_message())
    except UserError as error:
        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 130)
    except BrokenPipeError:
        # The reader has gone (`ropewalk … | head`): print nothing more, not even when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    raise SystemExit(result if isinstance(result, int) else 0)
