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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...errors import UserError
from ...files import write_file
from .. import session
from ..prompt_cache import MIN_TOKENS, PromptCache
from .answer import Answer, ContextFull, Sampling
from .template import EXACT_CHARACTERS, ChatTemplate, Message, count_tokens

if TYPE_CHECKING:
    from ..llama import Llama

RECORD = "conversation.json"
OURS = re.compile(r"\.?(cache-[0-9a-f]{8}\.safetensors|conversation\.json)(\..*part)?$")
MAX_RECORD_BYTES = 256 << 20


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
        return (*system, *self.messages, Message("user", "\n\n".join([*self.pending, *texts])))


class _Record(BaseModel):
    """A saved conversation's JSON: the transcript, and the file in the same folder that has the model's cache."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["ropewalk-conversation-1"] = "ropewalk-conversation-1"
    cache: Annotated[str, Field(pattern=r"^cache-[0-9a-f]{8}\.safetensors$")]
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
        seconds = 0.0
        with suppress(KeyboardInterrupt):  # what was generated is kept, as it is in the model's cache
            seconds = self._read_long(prompt, answer)
            answer.write(on_text)
        answer.read_s += seconds
        if answer.text or answer.ending != "interrupted":
            history = messages[1:] if self.transcript.system else messages
            self.transcript = replace(
                self.transcript,
                messages=(*history, Message("assistant", answer.text)),
                pending=(),
                n_tokens=answer.prompt_tokens + answer.written_tokens,
            )
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

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the conversation and the model's cache to `folder`, replacing what was saved there before.

        Raises:
            UserError: the folder holds something else, or cannot be written to.
        """
        folder = Path(folder)
        cache = f"cache-{secrets.token_hex(4)}.safetensors"
        record = _Record(cache=cache, digest=_digest(self.transcript), transcript=self.transcript)
        try:
            _check_ours(folder)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                session.save(self.llm, folder / cache)
                write_file(folder / RECORD, (record.model_dump_json(indent=1) + "\n").encode(), private=True)
            except BaseException:
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
        """Resume a saved conversation; nothing of it is read again.

        Raises:
            UserError: no such conversation, a damaged one, or another model's; this one is unchanged.
        """
        record = _read_record(Path(folder))
        session.load(self.llm, Path(folder) / record.cache)
        self._set_transcript(record.transcript)

    def _set_transcript(self, transcript: Transcript) -> None:
        self.transcript = transcript
        self._template = ChatTemplate(self.llm, transcript.started)

    def _check_fits(self, name: str, n_tokens: int) -> None:
        """Check that a document leaves some room for a question and its answer."""
        spare = min(256, self.llm.n_ctx() // 4)
        if n_tokens + spare > self.llm.n_ctx():
            raise self._full(name, n_tokens, spare)

    def _full(self, what: str, n_tokens: int, spare: int) -> ContextFull:
        used, n_ctx = self.transcript.n_tokens, self.llm.n_ctx()
        return ContextFull(what, max(n_tokens - used, 0), max(n_ctx - used - spare, 0), n_ctx)


def _check_ours(folder: Path) -> None:
    """Refuse to save into a folder that holds something else; what a killed run may have left is ours."""
    if folder.exists() and not (
        folder.is_dir() and ((folder / RECORD).is_file() or all(OURS.match(path.name) for path in folder.iterdir()))
    ):
        raise UserError(f"{folder}: exists and is not a saved conversation")


def _digest(transcript: Transcript) -> str:
    data = TypeAdapter(Transcript).dump_python(transcript, mode="json")
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
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = re.sub(r"\s+", " ", f"{key + ': ' if key else ''}{first['msg']}")
        raise UserError(f"{path}: not a saved conversation: {reason}") from None
    if _digest(record.transcript) != record.digest:
        raise UserError(f"{path}: the saved conversation is damaged (its digest does not match)")
    return record
