"""The `ropewalk` command: its subcommands, and how each of them exits.

Exit codes: 0 done; 1 done, but some documents failed; 2 a user error, in one line; 130 Ctrl-C; 143 SIGTERM.
What is slow to import is imported only when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import typer
from rich.console import Console

from ..errors import UserError
from .chat import chat
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .inspect import inspect
from .search import search
from .summarize import summarize
from .terminal import out, printable

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

NO_MEMORY = re.compile("failed to map segment|cannot map zero-fill pages|[Cc]annot allocate memory")
"""How the dynamic loader says that there is not enough."""


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
    with suppress(OSError):  # standard error may be a full disk
        print(f"ropewalk: {printable(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(code)


def _open_streams() -> None:
    """Put something in place of standard streams that were closed: else the next file that is opened becomes one.

    What is written to a closed standard output fails, as it does elsewhere; standard error is dropped.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, mode), number)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names that are not UTF-8


def _drop_output() -> None:
    """Let what is still to be printed go nowhere, also when the interpreter exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        os.dup2(nowhere, 2)


def _is_of_output(error: OSError) -> bool:
    """Whether it is standard output that cannot be written to; buffers do not say so."""
    if error.filename is not None:
        return False
    try:
        sys.stdout.flush()
        os.write(1, b"\n")
    except OSError as again:
        return again.errno == error.errno
    return False


def _is_of_memory(error: Exception) -> bool:
    """Whether a library could not be loaded, or a process not be started, for lack of memory."""
    return getattr(error, "errno", None) == errno.ENOMEM or NO_MEMORY.search(str(error)) is not None


def _broken_pipe(_: Console) -> NoReturn:
    _drop_output()  # the reader has gone (`ropewalk … | head`)
    raise SystemExit(141)


def main() -> None:
    """Run the command line, and exit with the right code however it ends."""
    signal.signal(signal.SIGTERM, _terminated)
    _open_streams()
    Console.on_broken_pipe = _broken_pipe  # type: ignore[assignment, method-assign]  # rich's own exits with 1
    try:
        result = app(standalone_mode=False)
        sys.stdout.flush()
    except UsageError as problem:
        fail(problem.format_message())
    except UserError as problem:
        fail(str(problem))
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 130)
    except BrokenPipeError:
        _broken_pipe(out)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer makes an exit with 1 of it
            _broken_pipe(out)
        raise
    except (ImportError, RuntimeError, OSError) as error:
        if _is_of_memory(error):
            fail(f"not enough memory to go on: {error}")
        if not isinstance(error, OSError) or not _is_of_output(error):
            raise
        _drop_output()
        fail(f"standard output: cannot write: {error.strerror or error}")
    except MemoryError:
        fail("not enough memory for this; a shorter context or a smaller cache type takes less")
    raise SystemExit(result if isinstance(result, int) else 0)
