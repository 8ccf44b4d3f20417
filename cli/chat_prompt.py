"""The input line of a chat: editing, history, completion and type-ahead.

Enter sends, Alt-Enter starts a new line, and pasted lines stay together. prompt_toolkit takes long to import: this
module is imported only where somebody types.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.styles import Style

from .chat_autosave import autosaved
from .chat_command import Command
from .chat_places import saved_names
from .chat_settings import SETTINGS

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

STYLE = Style.from_dict({"bottom-toolbar": "noreverse ansibrightblack", "prompt": "bold"})


def prompt_session(status: Callable[[], str], commands: Mapping[str, Command]) -> PromptSession[str]:
    """Create the prompt, with `status` in the line below it."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # the same, typed ahead while the terminal still translated Enter to a newline
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        "> ",
        output=_terminal_output(),
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=_history(),
        completer=_Completer(commands),
        complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
        bottom_toolbar=status,
        style=STYLE,
    )


def _terminal_output() -> Output | None:
    """Where the prompt is shown: on standard error, where standard output goes to a file or another program."""
    return None if sys.stdout.isatty() else create_output(stdout=sys.stderr)


def choice(question: str, default: str) -> str:
    """Ask for one letter, and return it; `default` where nothing is typed, or Ctrl-D pressed."""
    asked: PromptSession[str] = PromptSession(
        f"{question} ", style=STYLE, output=_terminal_output(), reserve_space_for_menu=0
    )
    try:
        return asked.prompt().strip()[:1].lower() or default
    except EOFError:
        return default


@contextmanager
def without_echo() -> Iterator[None]:
    """While the block runs, keep what is typed for the next prompt instead of showing it in the middle of an answer."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    try:
        termios.tcsetattr(fd, termios.TCSADRAIN, quiet)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class _Completer(Completer):
    """Completes command names, then their arguments: paths, or names of saved conversations."""

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text.partition(" ")
        if not space:
            for candidate, command in self._commands.items():
                if candidate.startswith(name):
                    yield Completion(candidate, -len(name), display_meta=command.help)
            return
        kind = self._commands[name].completes if name in self._commands else ""
        if kind == "settings":
            yield from _complete_setting(argument)
        if kind == "saved":
            kept = [place.name for place in autosaved()] if name == "/load" else []
            for saved in [*saved_names(), *kept]:
                if saved.startswith(argument):
                    yield Completion(saved, -len(argument))
        if kind == "paths" or (kind == "saved" and "/" in argument):
            yield from self._paths.get_completions(Document(argument), complete_event)


def _complete_setting(argument: str) -> Iterator[Completion]:
    name, space, value = argument.partition(" ")
    if not space:
        for candidate, setting in SETTINGS.items():
            if candidate.startswith(name):
                yield Completion(candidate, -len(name), display_meta=setting.help)
    elif name in SETTINGS:
        for text in SETTINGS[name].examples:
            if text.startswith(value):
                yield Completion(text, -len(value))


def _history() -> History:
    folder = Path(platformdirs.user_state_dir("ropewalk"))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "chat_history").touch(mode=0o600)
    except OSError:
        return InMemoryHistory()  # nowhere to keep it: not worth a message
    return FileHistory(str(folder / "chat_history"))
