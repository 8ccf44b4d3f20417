"""`ropewalk chat` as a user runs it: through a pipe, and at a pseudo-terminal."""

from __future__ import annotations

import json
import os
import pty
import pydoc_data.topics
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ropewalk.runtime.chat

COMMAND = [sys.executable, "-c", "from ropewalk.cli.main import main; main()", "chat"]
FAST = ["--context", "1024", "--temp", "0", "--threads", "1"]
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[=>]|\x1b\][^\x07]*\x07")

LONG_TEXT = pydoc_data.topics.topics["with"]  # about 800 tokens

TEXT = "Ann sold the farm to Bob in May. Bob planted apple trees on the hill, and lost half of them to the frost."

Pipe = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def pipe(ropewalk_command: Pipe, tmp_path: Path, smollm2: Path) -> Pipe:
    """Run the command with piped input."""
    return lambda stdin, *arguments: ropewalk_command("chat", smollm2, *FAST, *arguments, cwd=tmp_path, stdin=stdin)


def test_one_question_from_a_pipe(pipe: Pipe) -> None:
    question = "Who is Père Noël?\n\nTell me about him.\n".encode()
    plain = pipe(question, "--max-tokens", "12")
    assert (plain.returncode, plain.stderr) == (0, "")
    answer = plain.stdout
    assert answer.endswith("\n") and len(answer.split()) >= 3 and "\x1b" not in answer

    done = pipe(question, "--max-tokens", "12", "--json", "--system", "You are a helpful assistant.")
    facts = json.loads(done.stdout)
    assert facts["answer"].strip() == facts["answer"]
    assert 1 <= facts["tokens"]["answer"] <= 12 < facts["tokens"]["prompt"]
    assert facts["tokens"]["context"] == 1024
    assert facts["band"] == {"index": 0, "context": 8192}
    assert facts["timings"]["read_s"] > 0
    assert facts["ending"] in ("length", "stop")


@pytest.mark.parametrize(
    ("stdin", "arguments", "expected"),
    [
        (b"", [], "standard input: empty; expected a question"),
        (b" \n", [], "standard input: empty"),
        (b"a\0b", [], "standard input: binary (a NUL byte at offset 1)"),
        (b"caf\xe9", [], "standard input: not UTF-8 (byte 0xe9 at offset 3)"),
        (b"word " * 2000, [], "this question: 2,03"),
        (b"hello", ["--kv", "q9"], "kv: 'q9'"),
        (b"hello", ["--context", "50000"], "n_ctx: 50,000"),
        (b"hello", ["--context", "50000", "--max-tokens", "8"], "n_ctx: 50,000"),
        (b"hello", ["--max-tokens", "0"], "Invalid value for '--max-tokens'"),
    ],
)
def test_mistakes_in_a_pipe(
    mistake: Callable[..., str], smollm2: Path, stdin: bytes, arguments: list[str], expected: str
) -> None:
    assert mistake("chat", smollm2, *FAST, *arguments, stdin=stdin).startswith(f"ropewalk: {expected}")


@pytest.mark.parametrize("enough", [True, False])
def test_one_question_takes_no_more_cache_than_it_needs(
    ropewalk_command: Pipe, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: bool
) -> None:
    loaded: list[int] = []
    make = ropewalk.Llama.__init__

    def noted(self: ropewalk.Llama, *arguments: Any, **options: Any) -> None:
        loaded.append(options["n_ctx"])
        make(self, *arguments, **options)

    def ask(*more: str) -> dict[str, Any]:
        arguments = ("--temp", "0", "--threads", "1", "--max-tokens", "12", "--json", *more)
        done = ropewalk_command("chat", smollm2, *arguments, stdin="Wer war Père Noël? 🎅".encode())
        assert (done.returncode, done.stderr) == (0, "")
        return dict(json.loads(done.stdout))

    expected = ask("--system", "Be brief.", "--prompt-cache", str(tmp_path / "prompts"))
    monkeypatch.setattr(ropewalk.Llama, "__init__", noted)
    if not enough:
        monkeypatch.setattr(ropewalk.runtime.chat, "most_tokens", lambda *_: 20)
    answer = ask("--system", "Be brief.")
    assert answer["answer"] == expected["answer"] and answer["tokens"] == expected["tokens"]
    assert answer["tokens"]["context"] == 8192
    assert 0 < loaded[0] < 1024 and loaded[1:] == ([] if enough else [0])


def test_a_text_piped_before_is_not_read_again(pipe: Pipe, tmp_path: Path) -> None:
    def ask(question: str, *more: str) -> dict[str, Any]:
        arguments = ("--max-tokens", "8", "--json", "--prompt-cache", "prompts", *more)
        done = pipe(f"{LONG_TEXT}\n\n{question}".encode(), *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return dict(json.loads(done.stdout))

    first = ask("What is a context manager?")
    assert first["tokens"]["read"] == first["tokens"]["prompt"] > 512
    again = ask("What is a context manager?")
    assert again["tokens"]["read"] == 1 and again["answer"] == first["answer"]
    assert ask("What is a suite?")["tokens"]["read"] < 40
    assert ask("What is a suite?", "--kv", "q8_0", "--prompt-cache-size", "1MB")["tokens"]["read"] > 512
    assert len(list((tmp_path / "prompts").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt-cache", "file"], "file: not a folder"),
        (["--prompt-cache", "/proc/ropewalk"], "/proc/ropewalk: cannot keep prompts there: "),
        (["--prompt-cache", "p", "--prompt-cache-size", "much"], "--prompt-cache-size: 'much', expected a size like"),
        (["--prompt-cache", "p", "--prompt-cache-size", "-1"], "--prompt-cache-size: '-1'"),
        (["--prompt-cache", "p", "--prompt-cache-size", "0"], "--prompt-cache-size: '0'"),
    ],
)
def test_mistakes_about_the_prompt_cache(
    mistake: Callable[..., str], smollm2: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "file").write_text("mine")
    message = mistake("chat", smollm2, *FAST, *arguments, cwd=tmp_path, stdin=b"hello")
    assert message.startswith(f"ropewalk: {expected}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("500MB", 500_000_000), ("2GiB", 2 << 30), ("4g", 4 * 10**9), ("1.5 KiB", 1536), ("700", 700), ("1tb", 10**12)],
)
def test_human_readable_sizes(tmp_path: Path, text: str, n_bytes: int) -> None:
    from ropewalk.cli.prompt_cache import open_folder

    folder = open_folder(tmp_path, text)
    assert folder is not None and folder.limit_bytes == n_bytes


def test_no_such_model(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "missing.gguf"], input=b"hello", cwd=tmp_path, capture_output=True)
    assert done.returncode == 2
    assert done.stderr == b"ropewalk: missing.gguf: cannot read the model: No such file or directory\n"


class Terminal:
    """A chat at a pseudo-terminal: what it shows, and keys to press."""

    def __init__(self, model: Path, home: Path, *arguments: str, output: Path | None = None) -> None:
        self.shown = ""
        self._mark = 0
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(home)
            if output is not None:
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
            places = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("STATE", "CACHE", "DATA", "CONFIG")}
            environment = {**os.environ, **places, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
            command = [*COMMAND, str(model), *FAST, "--max-tokens", "300", *arguments]
            os.execve(sys.executable, command, environment)

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def enter(self, line: str) -> None:
        self.press(line + "\r")

    def see(self, pattern: str, seconds: float = 60) -> str:
        """Wait until `pattern` is shown, after the previous match; return what was shown up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown[self._mark :])):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} was not shown:\n{self.shown[self._mark :]}"
            if not self._take(left):
                pytest.fail(f"it ended before {pattern!r}:\n{self.shown[self._mark :]}")
        text = self.shown[self._mark : self._mark + found.end()]
        self._mark += found.end()
        return text

    def leave(self) -> int:
        while self._take(30):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self._fd)

    def _take(self, seconds: float) -> bool:
        if not select.select([self._fd], [], [], seconds)[0]:
            return True
        try:
            raw = os.read(self._fd, 65536)
        except OSError:
            return False
        for _ in range(raw.count(b"\x1b[6n")):  # a query of the cursor position
            self.press("\x1b[1;1R")
        self.shown += ESCAPES.sub("", raw.decode("utf-8", "replace"))
        return bool(raw)


@pytest.fixture
def terminal(smollm2: Path, tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(smollm2, tmp_path)
    yield terminal
    terminal.close()


def test_a_conversation_at_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "the farm.txt").write_text(TEXT)
    (tmp_path / "bad.txt").write_bytes(b"a\0b")
    (tmp_path / "long.txt").write_text(TEXT * 60)
    terminal.see(r"/help lists the commands")
    terminal.see(r"0/1,024 tokens · band 1/1 · f16 cache [\d.]+ MiB")

    terminal.enter("/help")
    for name in ("/file", "/save", "/load", "/reset", "/system", "/stats", "/exit"):
        terminal.see(name)
    for line, complaint in [
        ("/frobnicate", "/frobnicate: no such command"),
        ("/file", "/file: expected a path"),
        ("/file nowhere.txt", "nowhere.txt: cannot be read: No such file"),
        ("/file bad.txt", r"bad.txt: binary"),
        ("/file long.txt", r"long.txt: 1,\d+ tokens, and \d+ of the context's 1,024 are free; /reset starts over"),
        ("/load", "nothing is saved yet"),
        ("/load nothing", "nothing: no saved conversation"),
        ("/save monday", "/save: nothing has been said yet"),
    ]:
        terminal.enter(line)
        terminal.see(complaint)

    terminal.enter("/system You are a helpful assistant.")
    terminal.see("system message set")
    terminal.enter("/file the farm.txt")
    terminal.see(r"read the farm.txt: \d+ tokens in [\d.]+ s")
    terminal.press("Who sold\x1b\rthe farm")  # Alt-Enter: one question of two lines
    terminal.enter("?")
    terminal.see(r"the farm\?")
    terminal.see(r"\n.*\w")
    terminal.see(r"[1-9]\d*/1,024 tokens .* \d+ tokens/s")

    terminal.enter("/stats")
    terminal.see(r"context\s+\d+ of 1,024 tokens used")
    terminal.see(r"wrote\s+\d+ tokens")
    terminal.enter("/save monday")
    terminal.see("saved in ")
    terminal.enter("/reset")
    terminal.see("forgotten; the system message stays")
    terminal.see(r" 0/1,024 tokens")
    terminal.enter("/load monday")
    terminal.see(r"loaded: 2 messages, \d+ tokens, nothing to read again")
    (tmp_path / "state/ropewalk/conversations/monday/conversation.json").write_text("{}")
    terminal.enter("/load monday")
    terminal.see("monday/conversation.json: not a saved conversation")
    terminal.press("never sent\x03")
    terminal.enter("/exit")
    assert terminal.leave() == 0
    assert "never sent" not in (tmp_path / "state/ropewalk/chat_history").read_text()
    assert "Traceback" not in terminal.shown


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.see(r"0/1,024 tokens")
    terminal.enter("Write a long story about a farm.")
    terminal.see(r"about a farm\.")
    terminal.see(r"(\w+\W+){8}")  # it is generating
    terminal.press("\x03")
    terminal.see("stopped")
    terminal.see(r"[1-9]\d*/1,024 tokens")
    terminal.enter("Hello!")
    terminal.see(r"Hello!")
    terminal.see(r"[1-9]\d*/1,024 tokens")
    terminal.press("\x04")
    assert terminal.leave() == 0
    assert "Traceback" not in terminal.shown


def test_a_file_that_was_read_in_another_chat_is_not_read_again(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "with.txt").write_text(LONG_TEXT[:2600])  # about 650 tokens
    for shown in (r"read with.txt: \d+ tokens in", r"read with.txt: (\d+) tokens, \1 of them read before, in"):
        terminal = Terminal(smollm2, tmp_path, "--prompt-cache", "prompts")
        try:
            terminal.see(r"0/1,024 tokens")
            terminal.enter("/file with.txt")
            terminal.see(shown, 60)
            terminal.enter("/exit")
            assert terminal.leave() == 0
        finally:
            terminal.close()
    assert len(list((tmp_path / "prompts").iterdir())) == 1


SHORT = ("--max-tokens", "6")


@contextmanager
def chatting(model: Path, home: Path, *arguments: str) -> Iterator[Terminal]:
    terminal = Terminal(model, home, *arguments)
    try:
        terminal.see(r"/help lists the commands", 60)
        terminal.see(r"\d/[\d,]+ tokens")
        yield terminal
        assert terminal.leave() == 0
        assert "Traceback" not in terminal.shown
    finally:
        terminal.close()


def test_no_talk_is_lost_by_leaving_loading_or_saving(smollm2: Path, tmp_path: Path) -> None:
    saved, kept = tmp_path / "state/ropewalk/conversations", tmp_path / "state/ropewalk/autosaved"
    with chatting(smollm2, tmp_path, *SHORT) as first:
        first.enter("What is rain?")
        first.see(r"[1-9]\d*/1,024 tokens")
        first.enter("/save monday")
        first.see("saved in ")
        first.enter("What is snow?")
        first.see("snow")
        first.see(r"[1-9]\d*/1,024 tokens")
        first.press("\x04")
        first.see("kept: ropewalk chat --continue resumes it")
    with chatting(smollm2, tmp_path, *SHORT, "--continue") as second:
        assert re.search(r"loaded: 4 messages, \d+ tokens, nothing to read again", second.shown)
        second.enter("/reset")
        second.see(r"forgotten; /load (\S+) brings it back")
        second.enter("What is hail?")
        second.see(r"[1-9]\d*/1,024 tokens")
        before = (saved / "monday/conversation.json").read_bytes()
        for answer in ("n", "", "\x03"):
            second.enter("/save monday")
            second.see(r"monday is another saved conversation: 2 messages, 'What is rain\?'")
            second.see(r"Overwrite it\? \[y/N\]")
            second.press(answer if answer == "\x03" else answer + "\r")
            second.see("stopped" if answer == "\x03" else "not saved")
        assert (saved / "monday/conversation.json").read_bytes() == before
        second.enter("/load monday")
        second.see("loaded: 2 messages")
        second.enter("/load")
        second.see("saved: monday")
        second.see("What is hail")
        second.see("What is rain")
        second.enter("/save monday")  # its own place: nothing to ask
        second.see("saved in ")
        second.enter("/reset")
        second.enter("What is fog?")
        second.see(r"fog\?")
        second.see(r"[1-9]\d*/1,024 tokens")
        second.enter("/save monday")
        second.see("Overwrite it")
        second.enter("y")
        second.see("saved in ")
        second.enter("/bye")
    assert "fog" in (saved / "monday/conversation.json").read_text()
    texts = [(place / "conversation.json").read_text() for place in kept.iterdir()]
    for word in ("rain", "snow", "hail", "fog"):
        assert any(word in text for text in texts)
    assert len(list(kept.glob("*/cache-*"))) <= 1
    assert {place.stat().st_mode & 0o77 for place in kept.iterdir()} == {0}


def test_a_killed_chat_is_continued_and_another_model_reads_it(smollm2: Path, tmp_path: Path) -> None:
    killed = Terminal(smollm2, tmp_path, *SHORT)
    try:
        killed.see(r"0/1,024 tokens", 60)
        killed.enter("What is rain?")
        killed.see(r"[1-9]\d*/1,024 tokens")
    finally:
        killed.close()
    with chatting(smollm2, tmp_path, *SHORT, "-c", "--kv", "q8_0") as resumed:
        assert re.search(r"loaded: 2 messages, \d+ tokens, read again with the next question", resumed.shown)
        resumed.enter("/exit")


def test_what_was_generated_is_kept_when_the_window_is_closed(smollm2: Path, tmp_path: Path) -> None:
    terminal = Terminal(smollm2, tmp_path)
    try:
        terminal.see(r"0/1,024 tokens", 60)
        terminal.enter("Write a long story about a farm.")
        terminal.see(r"about a farm\.")
        terminal.see(r"(\w+\W+){60}", 60)  # it is generating, and draws it again and again
        os.kill(terminal.pid, signal.SIGHUP)
        assert terminal.leave() == 129
    finally:
        terminal.close()
    (record,) = tmp_path.glob("state/ropewalk/autosaved/*/conversation.json")
    question, answer = json.loads(record.read_text())["transcript"]["messages"]
    assert question["content"] == "Write a long story about a farm." and len(answer["content"].split()) > 2


def test_the_commands_that_change_a_conversation(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for place in ("farm.txt", "notes/farm.txt"):
        (tmp_path / place).write_text(TEXT)
    with chatting(smollm2, tmp_path, *SHORT, "-f", "farm.txt") as terminal:
        assert re.search(r"read farm.txt: \d+ tokens", terminal.shown)
        for line, shown in [
            ("/undo", "nothing has been asked yet"),
            ("/regen", "nothing has been asked yet"),
            ("/edit", "nothing has been asked yet"),
            ("/drop", "no older questions and answers"),
            ("/set", r"top-p\s+0\.95"),
            ("/set nonsense 1", "/set nonsense: no such setting, expected one of temp, top-p"),
            ("/set top-p 2", "/set top-p: '2', expected a number from 0 to 1"),
            ("/set temp nan", "/set temp: 'nan', expected a number of at least 0"),
            ("/set seed -1", "/set seed: '-1', expected a whole number from 0 to 4294967295, or none"),
            ("/set temperature=0", "temp 0"),
            ("/set parameter max_tokens 5", "max-tokens 5"),
            ("/?", "/regen"),
            ("/sav", "/sav: no such command, did you mean /save?"),
        ]:
            terminal.enter(line)
            terminal.see(shown)
        terminal.see(r"\d+/1,024 tokens")  # the prompt
        terminal.press("\x03")
        terminal.see("Ctrl-D or /exit leaves")
        for line in ("/file fa*.txt", "/file notes"):
            terminal.enter(line)
            terminal.see(r"read farm.txt: \d+ tokens")
        terminal.enter("What is rain?")
        terminal.see("stopped at --max-tokens 5")
        terminal.enter("/regen")
        terminal.see("at temperature 0 the answer stays the same")
        terminal.see("stopped at --max-tokens 5")
        terminal.enter("/edit")
        terminal.see(r"> What is rain\?")
        terminal.press("\x7f\x7f\x7f\x7f\x7fsnow?\r")
        terminal.see("stopped at --max-tokens 5")
        terminal.enter("exit")
        terminal.see(r"Leave the chat\? \[Y/n\]")
        terminal.enter("n")
        terminal.see("stopped at --max-tokens 5")
        terminal.enter("/undo")
        terminal.see("taken back: exit")
        terminal.enter("/undo")
        terminal.see(r"taken back: What is snow\?")
        terminal.enter("exit")
        terminal.see(r"Leave the chat\?")
        terminal.enter("")


def test_a_full_context_offers_to_make_room(smollm2: Path, tmp_path: Path) -> None:
    long = " ".join(["rain and snow"] * 25)
    with chatting(smollm2, tmp_path, *SHORT, "--context", "512") as terminal:
        for letter, shown in [
            ("n", r"\d/512 tokens"),
            ("", r"\d/512 tokens"),
            ("s", r"summarised the (\d oldest questions and their answers|oldest question and its answer)"),
            ("d", r"dropped the (\d oldest questions and their answers|oldest question and its answer)"),
        ]:
            while True:
                terminal.enter(f"What is {long}?")
                if "[d/s/N]" in terminal.see(r"stopped at --max-tokens 6|\[d\]rop or \[s\]ummarise .* \[d/s/N\]"):
                    break
                terminal.see(r"\d/512 tokens")
            assert re.search("this question: .* tokens, and .* are free; /reset starts over", terminal.shown)
            terminal.enter(letter)
            terminal.see(shown, 60)
            if letter in ("d", "s"):
                terminal.see("stopped at --max-tokens 6", 60)
                terminal.see(r"\d/512 tokens")
        terminal.press("\x04")


def test_a_question_and_documents_on_the_command_line(ropewalk_command: Pipe, tmp_path: Path, smollm2: Path) -> None:
    (tmp_path / "notes").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / f"notes/{name}.txt").write_text(f"{name}: {TEXT}")
    (tmp_path / "model.gguf").symlink_to(smollm2)

    def ask(*arguments: str, stdin: bytes = b"") -> tuple[int, str]:
        options = (*FAST, "--max-tokens", "4", "--json")
        done = ropewalk_command("chat", *arguments, *options, cwd=tmp_path, stdin=stdin)
        assert (done.returncode, done.stderr) == (0, "")
        facts = json.loads(done.stdout)
        return facts["tokens"]["prompt"], facts["answer"]

    alone = ask("model.gguf", "What is rain?")
    assert ask("model.gguf", "What", "is", "rain?") == ask("-m", "model.gguf", "What is rain?") == alone
    assert ask("model.gguf", stdin=b"What is rain?") == ask("*.gguf", "What is rain?") == alone
    after_text = ask("model.gguf", "Who has the farm?", stdin=TEXT.encode())
    assert after_text[0] > alone[0] + 20
    one = ask("model.gguf", "-f", "notes/a.txt", "Who has the farm?")[0]
    three = ask("model.gguf", "-f", "notes", "Who has the farm?")
    assert three[0] > one + 50
    assert three == ask("model.gguf", "-f", "notes/*.txt", "Who has the farm?")
    assert three == ask("-f", "notes/a.txt", "notes/b.txt", "notes/c.txt", "model.gguf", "Who has the farm?")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nosuch"], "nosuch: no such file, and no downloaded model of that name"),
        (["owner/nosuch"], "owner/nosuch: no such file, and no downloaded model of that name"),
        (["*.gguf"], "*.gguf: a pattern without GGUF files, expected a model"),
        (["-f", "nosuch.txt", "What?"], "nosuch.txt: No such file or directory"),
        (["a.gguf", "text.txt"], "text.txt: a file, expected a question; -f text.txt lets the model read it"),
        (["--top-p", "2"], "Invalid value for '--top-p'"),
        (["--temp", "nan"], "Invalid value for '--temp'"),
        (["--temp", "inf"], "inf: expected a finite number"),
        (["--load", "nosuch", "-m", "a.gguf", "What?"], ""),
    ],
)
def test_mistakes_on_the_command_line(
    mistake: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    for name in ("CACHE", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "text.txt").write_text(TEXT)
    message = mistake("chat", *arguments, cwd=tmp_path, stdin=b"hello" if arguments[0] != "-f" else b"")
    assert message.startswith(f"ropewalk: {expected}")


def test_output_to_another_program_has_no_escapes(smollm2: Path, tmp_path: Path) -> None:
    terminal = Terminal(smollm2, tmp_path, *SHORT, output=tmp_path / "log.txt")
    try:
        terminal.see(r"0/1,024 tokens", 60)
        terminal.enter("Name three colours, as a list.")
        terminal.see("stopped at --max-tokens 6")
        terminal.enter("/exit")
        assert terminal.leave() == 0
    finally:
        terminal.close()
    text = (tmp_path / "log.txt").read_text()
    assert text.count("\n") >= 1 and "\x1b" not in text and "\r" not in text
    assert len(text.split()) > 2 and ">" not in text
