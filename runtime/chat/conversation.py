"""A conversation with a model: its messages, the documents the model has been given, and how to save them.

Every step either happens completely or leaves the conversation unchanged. An answer that was stopped is kept up to
there, and a question whose answer was stopped before its first word is dropped. Earlier turns and documents stay a
prefix of the prompt, so the model reads only what is new.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...errors import UserError
from ...factors import first_mistake
from ...files import write_file
from .. import session
from ..prompt_cache import MIN_TOKENS, PromptCache
from .answer import Answer, ContextFull, Sampling
from .summary import Summarizer, SummarySettings
from .template import EXACT_CHARACTERS, ChatTemplate, Message, count_tokens

if TYPE_CHECKING:
    from ..llama import Llama

RECORD = "conversation.json"
OURS = re.compile(r"\.?(cache-[0-9a-f]{8}\.safetensors|conversation\.json)(\..*part)?$")
MAX_RECORD_BYTES = 256 << 20

OLD_TURNS = "Summary of the conversation so far:"
OLD_TURNS_PROMPT = "Summarise the conversation above in a few sentences: what was asked, and what was answered."


@dataclass(frozen=True)
class Transcript:
    """The messages so far. `pending` are documents that wait for the question about them."""

    system: str = ""
    messages: tuple[Message, ...] = ()
    pending: tuple[str, ...] = ()
    started: date = field(default_factory=date.today)
    n_tokens: int = 0
    """Tokens that it takes in the context."""

    def prompt_messages(self, *texts: str) -> tuple[Message, ...]:
        """Return the messages of the next prompt: all so far, and the user's with the pending documents and `texts`."""
        system = (Message("system", self.system),) if self.system else ()
        before = "".join(f"{document}\n\n" for document in self.pending) if texts else ""
        content = "\n\n".join([*self.pending, *texts])
        return (*system, *self.messages, Message("user", content, question_at=len(before)))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been said or read yet."""
        return not (self.messages or self.pending)

    @property
    def n_exchanges(self) -> int:
        """How many questions have been asked."""
        return sum(message.role == "user" for message in self.messages)

    def without_last(self) -> tuple[Transcript, str]:
        """Return the transcript before the last question, and that question.

        Raises:
            UserError: nothing has been asked yet.
        """
        places = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if not places:
            raise UserError("nothing has been asked yet")
        last = self.messages[places[-1]]
        documents = last.content[: last.question_at].removesuffix("\n\n")
        pending = (documents, *self.pending) if documents else self.pending
        return replace(self, messages=self.messages[: places[-1]], pending=pending), last.content[last.question_at :]

    def without_oldest(self, n: int, summary: str = "") -> Transcript:
        """Return the transcript without its first `n` exchanges, which `summary`, if given, takes the place of."""
        places = [i for i, message in enumerate(self.messages) if message.role == "user"]
        kept = self.messages[places[n] if n < len(places) else len(self.messages) :]
        if not summary:
            return replace(self, messages=kept)
        if not kept:
            return replace(self, messages=(), pending=(summary, *self.pending))
        first = Message("user", f"{summary}\n\n{kept[0].content}", len(summary) + 2 + kept[0].question_at)
        return replace(self, messages=(first, *kept[1:]))


class _Record(BaseModel):
    """A saved conversation's JSON: the transcript, and the file in the same folder that has the model's cache."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["ropewalk-conversation-1"] = "ropewalk-conversation-1"
    cache: Annotated[str, Field(pattern=r"^(cache-[0-9a-f]{8}\.safetensors)?$")]  # empty: none was saved
    model: str = ""
    digest: str
    transcript: Transcript


class Conversation:
    """Questions to one model and its answers.

    Args:
        system: a message that says how to answer.
        cache: keeps documents and long questions, so that they are not read again.

    Attributes:
        transcript: the messages so far.
    """

    def __init__(self, llm: Llama, system: str = "", cache: PromptCache | None = None) -> None:
        self.llm, self._cache = llm, cache
        self.transcript = Transcript(system=system)
        self._template = ChatTemplate(llm, self.transcript.started)

    def ask(self, question: str, sampling: Sampling, on_text: Callable[[str], None] | None = None) -> Answer:
        """Ask, and keep question and answer; Ctrl-C ends the answer early (`ending` is then "interrupted").

        Raises:
            ContextFull: the question does not fit; nothing has been done.
        """
        messages = self.transcript.prompt_messages(question)
        prompt = self._template.tokens(messages)
        if len(prompt) >= self.llm.n_ctx():
            raise self._full("this question", len(prompt), spare=1)
        answer = Answer(self.llm, prompt, sampling, self._template.stops)
        return self._answer(messages, prompt, answer, on_text)

    def ask_again(
        self, sampling: Sampling, on_text: Callable[[str], None] | None = None, question: str | None = None
    ) -> Answer:
        """Replace the last answer by a new one, to the same question or to another; the documents before it stay.

        Raises:
            UserError: nothing has been asked yet, or the question does not fit; nothing has been done.
        """
        transcript = self.transcript
        before, last = transcript.without_last()
        self.transcript = self._counted(before)
        try:
            answer = self.ask(last if question is None else question, sampling, on_text)
        except BaseException:
            self.transcript = transcript
            raise
        if not answer.text and answer.ending == "interrupted":
            self.transcript = transcript
        return answer

    def undo(self) -> str:
        """Take the last question and its answer back; return the question. Documents that came before it stay.

        Raises:
            UserError: nothing has been asked yet.
        """
        transcript, question = self.transcript.without_last()
        self.transcript = self._counted(transcript)
        return question

    def prompt_tokens(self, question: str) -> int:
        """Return how many tokens the prompt has that asks `question` next."""
        return len(self._template.tokens(self.transcript.prompt_messages(question)))

    def could_hold(self, n_tokens: int) -> bool:
        """Whether so many more tokens would fit if some, or all, of the exchanges were dropped."""
        rest = self._counted(self.transcript.without_oldest(self.transcript.n_exchanges))
        return bool(self.transcript.messages) and rest.n_tokens + n_tokens + self._spare() <= self.llm.n_ctx()

    def drop_oldest(self, needed: int = 0) -> int:
        """Forget the oldest exchanges, until half of the context is free, and `needed` tokens with some room.

        Returns how many, at least one.

        Raises:
            UserError: there is none.
        """
        n = self._n_too_old(needed)
        self.transcript = self._counted(self.transcript.without_oldest(n))
        return n

    def summarise_oldest(self, needed: int = 0) -> int:
        """Replace the oldest exchanges by a summary, as `drop_oldest`; return how many.

        Raises:
            UserError: there is none, or the model wrote no summary; the conversation is unchanged.
        """
        n = self._n_too_old(needed)
        names = {"user": "User", "assistant": "Assistant", "system": "System"}
        places = [i for i, message in enumerate(self.transcript.messages) if message.role == "user"]
        old = self.transcript.messages[: places[n] if n < len(places) else None]
        text = "\n\n".join(f"{names[message.role]}: {message.content.strip()}" for message in old)
        settings = SummarySettings(prompt=OLD_TURNS_PROMPT, max_tokens=max(64, min(256, self.llm.n_ctx() // 8)))
        summary = Summarizer(self.llm, settings, self._cache).summarize(text)
        summarised = self.transcript.without_oldest(n, f"{OLD_TURNS} {summary.text}")
        self.transcript = self._counted(summarised)
        return n

    def _n_too_old(self, needed: int) -> int:
        """Return how many exchanges have to go for `needed` tokens to fit, and for half of the context to be free."""
        n = self.transcript.n_exchanges
        if not n:
            raise UserError("there are no older questions and answers to remove")
        n_ctx = self.llm.n_ctx()
        budget = min(n_ctx // 2, n_ctx - needed - self._spare())
        return (
            bisect_left(
                range(1, n), True, key=lambda i: self._counted(self.transcript.without_oldest(i)).n_tokens <= budget
            )
            + 1
        )

    def _counted(self, transcript: Transcript) -> Transcript:
        """Return the transcript with its number of tokens."""
        n_tokens = 0 if transcript.is_empty else len(self._template.tokens(transcript.prompt_messages("")))
        return replace(transcript, n_tokens=n_tokens)

    def _answer(
        self,
        messages: tuple[Message, ...],
        prompt: list[int],
        answer: Answer,
        on_text: Callable[[str], None] | None,
    ) -> Answer:
        """Generate the answer, and keep it with its question."""
        seconds = 0.0
        ended: SystemExit | None = None
        try:
            seconds = self._read_long(prompt, answer)
            answer.write(on_text)
        except KeyboardInterrupt:
            pass  # what was generated is kept, as it is in the model's cache
        except SystemExit as error:  # a signal ends the program, which may save the conversation first
            ended = error
        answer.read_s += seconds
        if answer.text or answer.ending != "interrupted":
            history = messages[1:] if self.transcript.system else messages
            self.transcript = replace(
                self.transcript,
                messages=(*history, Message("assistant", answer.text)),
                pending=(),
                n_tokens=answer.prompt_tokens + answer.written_tokens,
            )
        if ended is not None:
            raise ended
        return answer

    def _read_long(self, prompt: list[int], answer: Answer) -> float:
        """Read a prompt much longer than the conversation so far through the prompt cache; return the seconds taken."""
        if self._cache is None or len(prompt) < self.transcript.n_tokens + MIN_TOKENS:
            return 0.0
        started = time.perf_counter()
        answer.read_tokens = self._cache.read(prompt[:-1]) + 1  # the last one is left for the answer to start with
        return time.perf_counter() - started

    def read(self, name: str, text: str) -> int:
        """Have the model read a document that the next question will be about; return the number of tokens read.

        Raises:
            ContextFull: the document does not fit with some room for a question; nothing has been done.
            KeyboardInterrupt: stopped; the document is not part of the conversation.
        """
        if len(text) > EXACT_CHARACTERS:
            self._check_fits(name, self.transcript.n_tokens + count_tokens(self.llm, text))
        document = f"{name}:\n\n{text.strip()}"
        transcript = replace(self.transcript, pending=(*self.transcript.pending, document))
        tokens = self._template.opening(transcript.prompt_messages())
        self._check_fits(name, len(tokens))
        before = int(self.llm.longest_token_prefix(self.llm.tokens.tolist(), tokens))
        if self._cache is not None:
            n_read = self._cache.read(tokens)
            self.transcript = replace(transcript, n_tokens=len(tokens))
            return n_read
        if self.llm.on_progress is not None:
            self.llm.on_progress(0, len(tokens) - before)
        stream = self.llm.generate(tokens, temp=0.0)
        next(stream)  # reads the whole prompt; the first token of an answer, which it yields, is dropped
        stream.close()
        self.transcript = replace(transcript, n_tokens=len(tokens))
        return len(tokens) - before

    def set_system(self, text: str) -> None:
        """Change the system message; the messages so far stay, and are read again with the next question."""
        self.transcript = replace(self.transcript, system=text)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.llm.reset()
        self._set_transcript(Transcript(system=self.transcript.system))

    def save(self, folder: str | os.PathLike[str], *, with_cache: bool = True) -> None:
        """Write the conversation and the model's cache to `folder`, replacing what was saved there before.

        Without the cache it takes no time, and the conversation is read again after `load`.

        Raises:
            UserError: the folder holds something else, or cannot be written to.
        """
        folder = Path(folder)
        cache = f"cache-{secrets.token_hex(4)}.safetensors" if with_cache else ""
        model = str(Path(self.llm.model_path).absolute())
        record = _Record(cache=cache, model=model, digest=_digest(self.transcript), transcript=self.transcript)
        try:
            _check_ours(folder)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                if cache:
                    session.save(self.llm, folder / cache)
                write_file(folder / RECORD, (record.model_dump_json(indent=1) + "\n").encode(), private=True)
            except BaseException:
                if cache:
                    (folder / cache).unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()  # if it was created just now, and so is empty
                raise
            for other in folder.iterdir():  # the previous cache, and what a killed run may have left
                if OURS.match(other.name) and other.name not in (RECORD, cache):
                    other.unlink()
        except OSError as error:
            raise UserError(f"{folder}: cannot save the conversation: {error.strerror or error}") from None

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Resume a saved conversation.

        Nothing of it is read again, unless it was saved without a cache, or with one that does not suit this model,
        cache type or context: then the next question reads all of it.

        Raises:
            UserError: no such conversation, or a damaged one; this one is unchanged.
        """
        record = _read_record(Path(folder))
        is_read = self._load_cache(Path(folder) / record.cache) if record.cache else False
        self._set_transcript(record.transcript)
        if not is_read:
            self.transcript = self._counted(record.transcript)

    def _load_cache(self, path: Path) -> bool:
        """Load the model's cache; return False, with the cache unchanged, where it does not suit.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            session.load(self.llm, path)
        except session.DamagedSession:
            raise
        except UserError:
            if path.is_file():
                return False
            raise
        return True

    def _set_transcript(self, transcript: Transcript) -> None:
        self.transcript = transcript
        self._template = ChatTemplate(self.llm, transcript.started)

    def _check_fits(self, name: str, n_tokens: int) -> None:
        """Check that a document leaves some room for a question and its answer."""
        spare = self._spare()
        if n_tokens + spare > self.llm.n_ctx():
            raise self._full(name, n_tokens, spare)

    def _spare(self) -> int:
        """Return the room that a question and its answer should have."""
        return min(256, self.llm.n_ctx() // 4)

    def _full(self, what: str, n_tokens: int, spare: int) -> ContextFull:
        used, n_ctx = self.transcript.n_tokens, self.llm.n_ctx()
        return ContextFull(what, max(n_tokens - used, 0), max(n_ctx - used - spare, 0), n_ctx)


def _check_ours(folder: Path) -> None:
    """Refuse to save into a folder that holds something else; what a killed run may have left is ours."""
    if folder.exists() and not (
        folder.is_dir() and ((folder / RECORD).is_file() or all(OURS.match(path.name) for path in folder.iterdir()))
    ):
        raise UserError(f"{folder}: exists and is not a saved conversation")


@dataclass(frozen=True)
class Saved:
    """What a saved conversation holds, and the path of the model that it was held with; empty if it does not say."""

    transcript: Transcript
    model: str


def read_saved(folder: str | os.PathLike[str]) -> Saved:
    """Read a saved conversation without a model.

    Raises:
        UserError: no such conversation, or a damaged one.
    """
    record = _read_record(Path(folder))
    return Saved(record.transcript, record.model)


def drop_saved_cache(folder: str | os.PathLike[str]) -> None:
    """Free the disk of a saved conversation's cache; it is read again when it is resumed.

    Raises:
        UserError: no such conversation, or a damaged one.
        OSError: it cannot be written.
    """
    record = _read_record(Path(folder))
    if record.cache:
        without = record.model_copy(update={"cache": ""})
        write_file(Path(folder) / RECORD, (without.model_dump_json(indent=1) + "\n").encode(), private=True)
        (Path(folder) / record.cache).unlink(missing_ok=True)


def _digest(transcript: Transcript) -> str:
    data = TypeAdapter(Transcript).dump_python(transcript, mode="json")
    for message in data["messages"]:
        if not message["question_at"]:
            del message["question_at"]  # as before there was one
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _read_record(folder: Path) -> _Record:
    path = folder / RECORD
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECORD_BYTES)
    except OSError as error:
        raise UserError(f"{folder}: no saved conversation: {error.strerror or error}") from None
    try:
        record = _Record.model_validate_json(raw)
    except ValidationError as error:
        raise UserError(f"{path}: not a saved conversation: {first_mistake(error)}") from None
    if _digest(record.transcript) != record.digest:
        raise UserError(f"{path}: the saved conversation is damaged (its digest does not match)")
    return record
