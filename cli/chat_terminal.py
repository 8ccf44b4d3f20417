"""The conversation at the terminal: a prompt with history and completion, streamed answers, slash commands.

Ctrl-C stops the current command or answer, never the program; an error is one line, and the conversation continues.
Answers go to standard output; everything else is dim and goes to standard error.
"""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..runtime.chat import Answer, ContextFull, Conversation, Sampling, read_saved
from .chat_autosave import RECORD, Autosave, autosaved, autosaved_folder
from .chat_command import Command
from .chat_markdown import ShownAnswer
from .chat_places import place_to_load, saved_names, saved_place, typed_files
from .chat_settings import set_setting, shown_settings
from .chat_words import complain, counted_turns, first_question, say, say_rows, shorten
from .documents import DocumentError, read_document
from .reading_bar import ReadingBar
from .terminal import size

if TYPE_CHECKING:
    from ..runtime import BandChange

LEAVING = ("exit", "quit", "bye", "goodbye", "q", ":q", ":q!", ":wq", "logout", "exit()", "quit()")
"""What people type to leave, without the slash."""

HOW_TO_LEAVE = "Ctrl-D or /exit leaves"
MAX_LISTED = 10


class Leave(Exception):
    """The user wants to leave the chat."""


class Chat:
    """One conversation at one terminal."""

    def __init__(
        self, conversation: Conversation, sampling: Sampling, autosave: Autosave, *, markdown: bool = True
    ) -> None:
        self.llm, self.conversation, self.sampling = conversation.llm, conversation, sampling
        self.autosave, self.markdown = autosave, markdown
        self.saved_as = ""
        self._saved_stamp = 0  # modification time of what was saved or loaded under that name
        self._edited: str | None = None  # the question to be edited at the next prompt
        self.last: Answer | None = None
        self._interruptible = False
        self._changes: list[BandChange] = []
        self.llm.on_band_change = self._changes.append

    def converse(self, files: Sequence[Path] = (), place: Path | None = None, name: str = "") -> None:
        """Chat until Ctrl-D or /exit; with the documents `files`, and in the conversation loaded from `place`."""
        from .chat_prompt import prompt_session

        prompt = prompt_session(self.status, COMMANDS)
        say(self._greeting())
        if place is not None:
            self.adopt(place, name)
            self.say_resumed()
        with self._ctrl_c():
            for path in files:
                self._respond(lambda path=path: self.read_file(path))  # type: ignore[misc]
            while True:
                edited, self._edited = self._edited, None
                try:
                    line = prompt.prompt(default=edited or "")
                except KeyboardInterrupt:  # clears the line
                    if not prompt.default_buffer.text and edited is None:
                        say(HOW_TO_LEAVE)
                    continue
                except EOFError:
                    break
                try:
                    self._respond(lambda line=line, edited=edited: self.handle(line, edited))  # type: ignore[misc]
                except Leave:
                    break
        self.keep(at_the_end=True)

    def _respond(self, work: Callable[[], None]) -> None:
        """Handle one line of input, and keep what came of it; an error is reported in one line."""
        from .chat_prompt import without_echo

        try:
            with without_echo():
                problem = self._problem_of(work)
                if isinstance(problem, ContextFull) and self.conversation.could_hold(problem.n_tokens):
                    complain(f"{problem}; /reset starts over")
                    needed = problem.n_tokens
                    problem = self._problem_of(lambda: self._offer_room(work, needed))
        finally:
            self.keep()
        if problem is not None:
            text = "stopped" if isinstance(problem, KeyboardInterrupt) else str(problem) or type(problem).__name__
            complain(text + ("; /reset starts over" if isinstance(problem, ContextFull) else ""))

    def _problem_of(self, work: Callable[[], None]) -> BaseException | None:
        try:
            try:
                self._interruptible = True
                work()
            finally:
                self._interruptible = False
        except (KeyboardInterrupt, UserError, OSError, RuntimeError, MemoryError) as error:
            return error
        return None

    def _offer_room(self, work: Callable[[], None], needed: int) -> None:
        """Offer to drop or summarise the oldest turns, and do `work` again if that was wanted."""
        wanted = _choice("[d]rop or [s]ummarise the oldest turns? [d/s/N]", "n")
        if wanted in ("d", "s"):
            self._make_room(needed, summarise=wanted == "s")
            work()

    def keep(self, *, at_the_end: bool = False, quietly: bool = False) -> None:
        """Keep the conversation as it is now; with the model's cache if this is the end."""
        try:
            self.autosave.keep(self.conversation, with_cache=at_the_end)
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            self.autosave.active = False
            complain(f"the conversation is not kept: {error}")
        if at_the_end and not quietly and self.autosave.active and self.autosave.place is not None:
            say("kept: ropewalk chat --continue resumes it")

    @contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        """While the block runs, Ctrl-C interrupts only the handling of a line, and closing the window ends the chat."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self._interruptible:
                raise KeyboardInterrupt

        def hang_up(number: int, frame: FrameType | None) -> None:
            raise SystemExit(128 + number)  # the window was closed: what was generated so far is kept

        before = signal.signal(signal.SIGINT, interrupt), signal.signal(signal.SIGHUP, hang_up)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before[0])
            signal.signal(signal.SIGHUP, before[1])

    def handle(self, line: str, edited: str | None = None) -> None:
        """Run one line of input: a command, a question, or the `edited` question in its new form."""
        text = line.strip()
        if not line.startswith("/"):
            if text.lower() in LEAVING and _choice("Leave the chat? [Y/n]", "y") != "n":
                raise Leave  # otherwise it is a question
            if text:
                self.ask(text, again=edited is not None)
            return
        name, *rest = text.split(maxsplit=1)
        command = COMMANDS.get(name) or COMMANDS.get(ALIASES.get(name, ""))
        if command is None:
            close = get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
            meant = f", did you mean {close[0]}?" if close else ""
            raise UserError(f"{name}: no such command{meant or ';'} /help lists them")
        command.run(self, rest[0].strip() if rest else "")

    def ask(self, question: str, *, again: bool = False) -> None:
        self._say_ending(self.show(question, again=again))

    def ask_silently(self, question: str) -> Answer:
        with ReadingBar(self.llm, "Reading"):
            return self.conversation.ask(question, self.sampling)

    def show(self, question: str | None, *, again: bool = False, sampling: Sampling | None = None) -> Answer:
        """Show the answer to a question while it is generated; with `again`, in place of the last one.

        Without a `question`, it is the last one again.
        """
        stream: Any = sys.stdout  # taken now, since a progress bar replaces sys.stdout
        stream.reconfigure(errors="replace")
        sampling = sampling or self.sampling

        def show(text: str) -> None:
            bar.close()
            shown.write(text)

        with ShownAnswer(stream, markdown=self.markdown) as shown, ReadingBar(self.llm, "Reading") as bar:
            if again:
                answer = self.conversation.ask_again(sampling, show, question)
            else:
                answer = self.conversation.ask(question or "", sampling, show)
        if answer.text.strip():
            self.last = answer
        return answer

    def _say_ending(self, answer: Answer) -> None:
        self._say_changes()
        if answer.ending == "interrupted":
            say("stopped" if answer.text.strip() else "stopped before the first word: the question was dropped")
        elif answer.ending == "length":
            say(f"stopped at --max-tokens {self.sampling.max_tokens}")
        elif answer.ending == "context":
            say(
                f"the context of {self.llm.n_ctx():,} tokens is full:"
                " /drop or /summarise makes room, /reset starts over"
            )

    def regenerate(self, argument: str) -> None:
        if self.sampling.temperature == 0:
            say("at temperature 0 the answer stays the same; /set temp 0.8 lets it vary")
        sampling = self.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=None)  # with the same seed it would be the same answer
        self._say_ending(self.show(None, again=True, sampling=sampling))

    def undo(self, argument: str) -> None:
        question = self.conversation.undo()
        self.last = None
        say(f"taken back: {shorten(' '.join(question.split()))}")

    def edit(self, argument: str) -> None:
        """Ask the last question again in another form: the one given, or one edited at the next prompt."""
        _, question = self.conversation.transcript.without_last()
        if argument:
            self.ask(argument, again=True)
        else:
            self._edited = question

    def drop(self, argument: str) -> None:
        self._make_room(0, summarise=False)

    def summarise(self, argument: str) -> None:
        self._make_room(0, summarise=True)

    def _make_room(self, needed: int, *, summarise: bool) -> None:
        if summarise:
            with ReadingBar(self.llm, "Summarising"):
                n = self.conversation.summarise_oldest(needed)
            self._changes.clear()
        else:
            n = self.conversation.drop_oldest(needed)
        done = "summarised" if summarise else "dropped"
        say(f"{done} the {counted_turns(n)}; {self._used():,} of {self.llm.n_ctx():,} tokens used")

    def set(self, argument: str) -> None:
        argument = argument.removeprefix("parameter ").strip()  # as in other chats
        name, *value = re.split(r"\s*=\s*|\s+", argument, maxsplit=1)
        if not value:
            rows = [row for row in shown_settings(self.sampling) if not name or row[0] == name]
            if not rows:
                set_setting(self.sampling, name, "")  # says which there are
            say_rows([(name, f"{value}  ({help})") for name, value, help in rows])
            return
        self.sampling = set_setting(self.sampling, name, value[0].strip())
        say(", ".join(f"{name} {value}" for name, value, _ in shown_settings(self.sampling)))

    def read(self, argument: str) -> None:
        for path in typed_files(argument, "/file"):
            self.read_file(path)

    def give(self, path: Path) -> int:
        """Have the model read a document, with a bar; return the number of tokens read.

        Raises:
            UserError: it cannot be read, or does not fit.
        """
        try:
            text = read_document(path)
        except DocumentError as error:
            raise UserError(f"{path}: {error}") from None
        with ReadingBar(self.llm, f"Reading {path.name}"):
            return self.conversation.read(path.name, text)

    def read_file(self, path: Path) -> None:
        started, before = time.perf_counter(), self._used()
        try:
            n_read = self.give(path)
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
        if not self._may_save(folder):
            say("not saved; another NAME keeps both")
            return
        self.conversation.save(folder)
        self.saved_as, self._saved_stamp = name, _stamp(folder)
        say(f"saved in {folder}")

    def _may_save(self, folder: Path) -> bool:
        """Whether nothing is lost by saving there, or the user agrees to it."""
        stamp = _stamp(folder)
        is_own = bool(self.saved_as) and saved_place(self.saved_as) == folder and stamp == self._saved_stamp
        if is_own or not stamp:
            return True
        try:
            saved = read_saved(folder).transcript
            what = f"{len(saved.messages)} messages" + (f", {first_question(saved)!r}" if saved.messages else "")
        except UserError:
            what = "damaged"
        say(f"{folder.name} is another saved conversation: {what}")
        return _choice("Overwrite it? [y/N]", "n") == "y"

    def load(self, argument: str) -> None:
        if not argument:
            self._list_saved()
            return
        place = place_to_load(argument)
        self.keep()
        self.conversation.load(place)
        self.adopt(place, argument)
        self.say_resumed()

    def adopt(self, place: Path, name: str) -> None:
        """Go on with the conversation that was just loaded from `place`."""
        if place.parent == autosaved_folder():
            self.autosave.resume(place, self.conversation.transcript)
            self.saved_as = ""
        else:
            self.autosave.start_new()
            self.saved_as, self._saved_stamp = name, _stamp(place)
        self.last = None
        self._changes.clear()

    def say_resumed(self) -> None:
        transcript = self.conversation.transcript
        unread = "nothing to read again" if self.llm.n_tokens else "read again with the next question"
        say(f"loaded: {len(transcript.messages)} messages, {transcript.n_tokens:,} tokens, {unread}")
        for message in transcript.messages[-2:]:
            lines = message.content.strip().splitlines() or [""]
            say(f"{'> ' if message.role == 'user' else '  '}{shorten(lines[-1 if message.role == 'user' else 0])}")

    def _list_saved(self) -> None:
        names, kept = saved_names(), [place for place in autosaved() if place != self.autosave.place]
        say("saved: " + ", ".join(names) if names else "nothing is saved yet; use /save NAME")
        rows = []
        for place in kept[:MAX_LISTED]:
            try:
                rows.append((place.name, first_question(read_saved(place).transcript)))
            except UserError:
                rows.append((place.name, "damaged"))
        if rows:
            say("kept without a name, the latest first:")
            say_rows(rows)

    def reset(self, argument: str) -> None:
        self.keep()
        kept = self.autosave.place if self.autosave.active else None
        self.conversation.reset()
        self.autosave.start_new()
        self.saved_as = ""
        self._changes.clear()
        self.last = None
        say(
            ("forgotten; the system message stays" if self.conversation.transcript.system else "forgotten")
            + (f"; /load {kept.name} brings it back" if kept else "")
        )

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
        say_rows(rows)

    def help(self, argument: str) -> None:
        say_rows([(f"{name} {command.argument}", command.help) for name, command in COMMANDS.items()])
        say("Enter sends; Alt-Enter (or Esc, then Enter) starts a new line, and pasted lines stay together.")
        say("Ctrl-C stops an answer or clears the line, Ctrl-D leaves. A line starting with a space is not a command.")
        say("/? is /help, /bye is /exit.")

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
        room = shutil.get_terminal_size().columns - 2
        return next(
            line for n in range(len(parts), 0, -1) if len(line := " " + " · ".join(parts[:n])) <= room or n == 1
        )

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
    "/file": Command("PATH", "read a document, folder or pattern; ask about it afterwards", Chat.read, "paths"),
    "/save": Command("NAME", "save the conversation, under a name or in a folder (a path with /)", Chat.save, "saved"),
    "/load": Command("NAME", "resume a saved conversation; without a name, list them", Chat.load, "saved"),
    "/regen": Command("", "answer the last question again", Chat.regenerate),
    "/edit": Command("[TEXT]", "change the last question, and answer it again", Chat.edit),
    "/undo": Command("", "take back the last question and its answer", Chat.undo),
    "/drop": Command("", "drop the oldest turns, to make room", Chat.drop),
    "/summarise": Command("", "replace the oldest turns by a summary, to make room", Chat.summarise),
    "/reset": Command("", "forget the conversation so far", Chat.reset),
    "/set": Command("NAME VALUE", "change temp, top-p, …; without a value, show it", Chat.set, "settings"),
    "/system": Command("TEXT", "set the system message; without text, show it", Chat.system),
    "/stats": Command("", "show tokens, band, cache, memory and speed", Chat.stats),
    "/help": Command("", "show this list", Chat.help),
    "/exit": Command("", "leave the chat", Chat.leave),
}

ALIASES = {
    "/?": "/help",
    "/h": "/help",
    "/bye": "/exit",
    "/quit": "/exit",
    "/q": "/exit",
    "/regenerate": "/regen",
    "/retry": "/regen",
    "/summarize": "/summarise",
    "/compact": "/summarise",
    "/clear": "/reset",
    "/new": "/reset",
}


def _choice(question: str, default: str) -> str:
    from .chat_prompt import choice

    return choice(question, default)


def _stamp(folder: Path) -> int:
    """Return the modification time of the conversation saved there; 0 if there is none."""
    try:
        return (folder / RECORD).stat().st_mtime_ns
    except OSError:
        return 0
