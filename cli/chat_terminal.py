"""The conversation at the terminal: a prompt with history and completion, streamed answers, slash commands.

Ctrl-C stops the current command or answer, never the program; an error is one line, and the conversation continues.
Answers go to standard output; everything else is dim and goes to standard error.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..runtime.chat import Answer, ContextFull, Conversation, Sampling
from .chat_prompt import Command, prompt_session, saved_names, saved_place, typed_path, without_echo
from .documents import DocumentError, read_document
from .reading_bar import ReadingBar
from .terminal import err, size

if TYPE_CHECKING:
    from ..runtime import BandChange

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters, with which an answer could take over the terminal."""


def run(conversation: Conversation, sampling: Sampling) -> None:
    """Chat until Ctrl-D or /exit."""
    Chat(conversation, sampling).converse()


class Leave(Exception):
    """The user wants to leave the chat."""


class Chat:
    """One conversation at one terminal."""

    def __init__(self, conversation: Conversation, sampling: Sampling) -> None:
        self.llm, self.conversation, self.sampling = conversation.llm, conversation, sampling
        self.saved_as = ""
        self.last: Answer | None = None
        self._interruptible = False
        self._changes: list[BandChange] = []
        self.llm.on_band_change = self._changes.append

    def converse(self) -> None:
        prompt = prompt_session(self.status, COMMANDS)
        say(self._greeting())
        with self._ctrl_c():
            while True:
                try:
                    line = prompt.prompt()
                except KeyboardInterrupt:
                    continue  # clears the line
                except EOFError:
                    return
                try:
                    self._respond(line)
                except Leave:
                    return

    def _respond(self, line: str) -> None:
        """Handle one line of input; an error is reported in one line."""
        problem = ""
        try:
            with without_echo():
                try:
                    self._interruptible = True
                    self.handle(line)
                finally:
                    self._interruptible = False
        except KeyboardInterrupt:
            problem = "stopped"
        except ContextFull as error:
            problem = f"{error}; /reset starts over"
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            problem = str(error) or type(error).__name__
        if problem:
            complain(problem)

    @contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        """While the block runs, Ctrl-C interrupts only the handling of a line."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self._interruptible:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def handle(self, line: str) -> None:
        """Run one line of input: a command or a question."""
        text = line.strip()
        if not line.startswith("/"):
            if text:
                self.ask(text)
            return
        name, _, argument = text.partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            raise UserError(f"{name}: no such command; /help lists them")
        command.run(self, argument.strip())

    def ask(self, question: str) -> None:
        stream: Any = sys.stdout
        stream.reconfigure(errors="replace")

        def show(text: str) -> None:
            bar.close()
            stream.write(CONTROL.sub("", text))
            stream.flush()

        with ReadingBar(self.llm, "Reading") as bar:
            answer = self.conversation.ask(question, self.sampling, show)
        if answer.text.strip():
            print(file=stream, flush=True)
            self.last = answer
        self._say_changes()
        if answer.ending == "interrupted":
            say("stopped" if answer.text.strip() else "stopped before the first word: the question was dropped")
        elif answer.ending == "length":
            say(f"stopped at --max-tokens {self.sampling.max_tokens}")
        elif answer.ending == "context":
            say(f"the context of {self.llm.n_ctx():,} tokens is full: /reset starts over")

    def read(self, argument: str) -> None:
        path = typed_path(argument, "/file")
        try:
            text = read_document(path)
        except DocumentError as error:
            raise UserError(f"{path}: {error}") from None
        started, before = time.perf_counter(), self._used()
        try:
            with ReadingBar(self.llm, f"Reading {path.name}"):
                n_read = self.conversation.read(path.name, text)
        except KeyboardInterrupt:
            say(f"stopped: {path.name} is not part of the conversation")
            return
        seconds = time.perf_counter() - started
        self._say_changes()
        n_tokens = self._used() - before
        if n_read < n_tokens / 2:
            details = f"{n_tokens:,} tokens, {n_tokens - n_read:,} of them read before, in {seconds:.1f} s"
        else:
            details = f"{n_read:,} tokens in {seconds:.1f} s ({n_read / seconds:.0f} tokens/s)"
        say(f"read {path.name}: {details}; now ask about it")

    def save(self, argument: str) -> None:
        name = argument or self.saved_as
        if not name:
            raise UserError("/save: expected a name or a path, as in /save monday")
        if not (self.conversation.transcript.messages or self.conversation.transcript.pending):
            raise UserError("/save: nothing has been said yet")
        folder = saved_place(name)
        self.conversation.save(folder)
        self.saved_as = name
        say(f"saved in {folder}")

    def load(self, argument: str) -> None:
        if not argument:
            names = saved_names()
            say("saved: " + ", ".join(names) if names else "nothing is saved yet; use /save NAME")
            return
        self.conversation.load(saved_place(argument))
        self.saved_as = argument
        transcript = self.conversation.transcript
        self.last = None
        say(f"loaded: {len(transcript.messages)} messages, {transcript.n_tokens:,} tokens, nothing to read again")
        for message in transcript.messages[-2:]:
            lines = message.content.strip().splitlines() or [""]
            say(f"{'> ' if message.role == 'user' else '  '}{_shorten(lines[-1 if message.role == 'user' else 0])}")

    def reset(self, argument: str) -> None:
        self.conversation.reset()
        self._changes.clear()
        self.last = None
        say("forgotten; the system message stays" if self.conversation.transcript.system else "forgotten")

    def system(self, argument: str) -> None:
        if not argument:
            now = self.conversation.transcript.system
            say(f"system message: {now}" if now else 'no system message; /system TEXT sets one, /system "" removes it')
            return
        self.conversation.set_system("" if argument in ('""', "''") else argument)
        used = self.conversation.transcript.n_tokens
        say("system message set" + (f"; the next question reads all {used:,} tokens again" if used else ""))

    def stats(self, argument: str) -> None:
        llm, plan, last = self.llm, self.llm.plan, self.last
        bands = " · ".join(f"{band.context:,}" for band in llm.schedule.bands)
        rows = [
            ("model", Path(llm.model_path).name),
            ("context", f"{self._used():,} of {llm.n_ctx():,} tokens used"),
            ("band", f"{self._band() + 1} of {len(llm.schedule.bands)} (to {bands} tokens)"),
            ("cache", f"{plan.kv_type}, {size(plan.cache_bytes)}"),
            (
                "memory",
                f"{size(plan.weights_bytes)} weights + {size(plan.cache_bytes)} cache"
                f" + {size(plan.compute_bytes)} compute = {size(plan.total_bytes)}",
            ),
        ]
        if last is not None:
            rows += [
                ("read", f"{last.read_tokens:,} tokens in {last.read_s:.2f} s ({last.read_speed:.0f} tokens/s)"),
                ("wrote", f"{last.written_tokens:,} tokens in {last.write_s:.2f} s ({last.write_speed:.0f} tokens/s)"),
            ]
        for name, value in rows:
            say(f"{name:<8} {value}")

    def help(self, argument: str) -> None:
        for name, command in COMMANDS.items():
            say(f"{name + ' ' + command.argument:<18} {command.help}")
        say("Enter sends; Alt-Enter (or Esc, then Enter) starts a new line, and pasted lines stay together.")
        say("Ctrl-C stops an answer or clears the line, Ctrl-D leaves. A line starting with a space is not a command.")

    def leave(self, argument: str) -> None:
        raise Leave

    def status(self) -> str:
        """The line under the prompt."""
        llm, plan = self.llm, self.llm.plan
        parts = [
            f"{self._used():,}/{llm.n_ctx():,} tokens",
            f"band {self._band() + 1}/{len(llm.schedule.bands)}",
            f"{plan.kv_type} cache {size(plan.cache_bytes)}",
        ]
        if self.last is not None and self.last.write_speed:
            parts.append(f"{self.last.write_speed:.0f} tokens/s")
        return " " + " · ".join(parts)

    def _used(self) -> int:
        return self.conversation.transcript.n_tokens

    def _band(self) -> int:
        return self.llm.schedule.band_index(max(self._used(), 1))

    def _greeting(self) -> str:
        llm = self.llm
        facts = f"{Path(llm.model_path).stem} · {llm.n_ctx():,} tokens · {llm.plan.kv_type} cache"
        return f"{facts}\n/help lists the commands, Ctrl-D leaves"

    def _say_changes(self) -> None:
        for change in self._changes:
            how = "read again" if change.reread else "re-rotated"
            say(
                f"band {change.old_index + 1}→{change.new_index + 1}: up to {change.new.context:,} tokens;"
                f" {how} {change.n_tokens:,} tokens in {change.seconds:.1f} s"
            )
        self._changes.clear()


COMMANDS = {
    "/file": Command("PATH", "let the model read a document; ask about it afterwards", Chat.read, "paths"),
    "/save": Command("NAME", "save the conversation, under a name or in a folder (a path with /)", Chat.save, "saved"),
    "/load": Command("NAME", "resume a saved conversation; without a name, list them", Chat.load, "saved"),
    "/reset": Command("", "forget the conversation so far", Chat.reset),
    "/system": Command("TEXT", "set the system message; without text, show it", Chat.system),
    "/stats": Command("", "show tokens, band, cache, memory and speed", Chat.stats),
    "/help": Command("", "show this list", Chat.help),
    "/exit": Command("", "leave the chat", Chat.leave),
}


def say(text: str) -> None:
    sys.stdout.flush()
    err.print(CONTROL.sub("", text), style="dim", markup=False, soft_wrap=True)


def complain(text: str) -> None:
    sys.stdout.flush()
    err.print(CONTROL.sub("", " ".join(text.split())), style="red", markup=False, soft_wrap=True)


def _shorten(text: str, length: int = 76) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
