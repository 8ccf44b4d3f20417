"""One answer of a model, generated token by token, with its statistics: used by chat and by summaries.

What fits is decided before any work: a prompt that fills the context is refused, and an answer is limited to what the
prompt leaves.
"""

from __future__ import annotations

import codecs
import ctypes
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import llama_cpp

from ...errors import UserError

if TYPE_CHECKING:
    from ..llama import Llama

MAX_PIECE = 4096  # bytes of one token's text; real tokens stay far below


class ContextFull(UserError):
    """More tokens than the context has room for."""

    def __init__(self, what: str, n_tokens: int, room: int, n_ctx: int) -> None:
        self.n_tokens = n_tokens
        super().__init__(f"{what}: {n_tokens:,} tokens, and {room:,} of the context's {n_ctx:,} are free")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where an answer ends.

    Temperature 0 takes the most likely token; `max_tokens` None means what the context leaves; `stops` are texts that
    end the answer, and are not part of it.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    repeat_penalty: float = 1.1  # without it, small models fall into loops
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    stops: tuple[str, ...] = ()


class Answer:
    """An answer while it is generated, and its statistics afterwards.

    Attributes:
        text: what has been generated so far, unmodified.
        prompt_tokens: tokens of the prompt; `read_tokens` of them were not cached already.
        written_tokens: tokens generated.
        read_s, write_s: seconds until the first token, and from then on.
        ending: "stop" when the model ended its answer, "length" at `max_tokens`, "context" when the context is full,
            "interrupted" until then.

    Raises:
        ContextFull: the prompt leaves no room for an answer; nothing has been done.
    """

    def __init__(self, llm: Llama, prompt: Sequence[int], sampling: Sampling, stops: Sequence[str] = ()) -> None:
        room = llm.n_ctx() - len(prompt)
        if room < 1:
            raise ContextFull("the prompt", len(prompt), max(llm.n_ctx() - 1, 0), llm.n_ctx())
        self._llm = llm
        self._prompt = prompt
        self._sampling = sampling
        self._stops = [stop for stop in (*stops, *sampling.stops) if stop]
        self._limit = min(room, sampling.max_tokens or room)
        self._limit_ending: Literal["length", "context"] = "length" if self._limit == sampling.max_tokens else "context"
        self.text = ""
        self.prompt_tokens = len(prompt)
        self.read_tokens = len(prompt) - llm.longest_token_prefix(llm.tokens.tolist(), list(prompt))
        self.written_tokens = 0
        self.read_s = self.write_s = 0.0
        self.ending: Literal["stop", "length", "context", "interrupted"] = "interrupted"

    def write(self, on_text: Callable[[str], None] | None = None) -> None:
        """Generate the answer; `on_text` gets each new piece of text, except for white space at the start.

        Ctrl-C passes through; `text` then has what was generated before it.
        """
        sampling, llm = self._sampling, self._llm
        llm.set_seed(secrets.randbits(31) if sampling.seed is None else sampling.seed)
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        shown = 0
        started = time.perf_counter()
        stream = llm.generate(
            self._prompt,
            temp=sampling.temperature,
            repeat_penalty=sampling.repeat_penalty,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
        )
        try:
            for token in stream:
                if not self.written_tokens:
                    self.read_s = time.perf_counter() - started
                if llama_cpp.llama_vocab_is_eog(llm.vocab, token):
                    self.ending = "stop"
                    break
                self.written_tokens += 1
                self.text += decode(piece(llm, token))
                if self._cut_at_stop():
                    self.ending = "stop"
                    break
                if self.written_tokens == self._limit:
                    self.ending = self._limit_ending
                    break
                shown = self._show(shown, len(self.text) - self._held_back(), on_text)
            self.text += decode(b"", final=True)
            self._show(shown, len(self.text), on_text)
        finally:
            stream.close()
            elapsed = time.perf_counter() - started
            self.read_s = self.read_s or elapsed
            self.write_s = elapsed - self.read_s

    @property
    def read_speed(self) -> float:
        """Tokens of the prompt read per second."""
        return self.read_tokens / self.read_s if self.read_s else 0.0

    @property
    def write_speed(self) -> float:
        """Tokens generated per second, not counting the first one, which comes with the prompt."""
        return max(self.written_tokens - 1, 0) / self.write_s if self.write_s else 0.0

    def _show(self, start: int, stop: int, on_text: Callable[[str], None] | None) -> int:
        lead = len(self.text) - len(self.text.lstrip())
        start = max(start, lead)
        if on_text is not None and start < stop:
            on_text(self.text[start:stop])
        return max(start, stop)

    def _cut_at_stop(self) -> bool:
        places = [place for stop in self._stops if (place := self.text.find(stop)) >= 0]
        if places:
            self.text = self.text[: min(places)]
        return bool(places)

    def _held_back(self) -> int:
        """Return how many characters at the end may yet turn out to start a stop."""
        return max(
            (n for stop in self._stops for n in range(len(stop), 0, -1) if self.text.endswith(stop[:n])), default=0
        )


def piece(llm: Llama, token: int) -> bytes:
    """Return the text of one token, of any length; empty for control tokens."""
    buffer = ctypes.create_string_buffer(MAX_PIECE)
    n_bytes = llama_cpp.llama_token_to_piece(llm.vocab, token, buffer, MAX_PIECE, 0, False)
    return buffer.raw[: max(n_bytes, 0)]
