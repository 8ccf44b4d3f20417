"""Asking a model the suite's questions, in one band after another; each answer is on disk as soon as it is known."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import llama_cpp

from ....errors import UserError
from ....factors import Band, Schedule
from .haystacks import Essays
from .journal import Journal
from .pen import Pen
from .question import SPARE_TOKENS, Question
from .scoring import score
from .tasks import Haystacks, Task, haystacks_for, questions_about

if TYPE_CHECKING:
    from ...llama import Llama

VERSION = 1
"""Increase it when the same question would be answered or scored in another way than before."""

MAX_LOSS = 1e6  # nats; no model's logits are that far apart

SLOWER_PER_TOKEN = 1 / 8192
"""About how much longer the next token takes for each that was read before it; for the time that is left."""

QUESTION_TOKENS = 80
"""About how many tokens a question, its answer's opening and the answer take."""


Bands = Mapping[int, Mapping[str, Band]]
"""Bands by length, and by the name of the method."""


@dataclass(frozen=True)
class SuitePlan:
    """What to ask, and in which bands.

    Attributes:
        bands: equal ones are read once.
        samples: questions of each task at each length.
        share: at most so many of them are about the same haystack.
    """

    tasks: tuple[Task, ...]
    bands: Bands
    samples: int
    share: int
    seed: int = 0

    def haystacks(self, task: Task) -> Haystacks:
        return haystacks_for(task, self.samples, self.share)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.bands)


@dataclass(frozen=True)
class Answered:
    """A model's answer to one question.

    Attributes:
        score: from 0 to 1, see `scoring.score`.
        loss: mean loss (nats) of the right answer's tokens.
        said: the model's own answer.
    """

    task: str
    length: int
    method: str
    haystack: int
    depth: float | None
    score: float
    loss: float
    said: str
    seconds: float


Advance = Callable[[float, float], None]
"""Called with (done, total), in about the time that a token at the start takes."""


def ask_all(
    llm: Llama, essays: Essays, pen: Pen, plan: SuitePlan, journal: Journal, model: str, advance: Advance
) -> Iterator[Answered]:
    """Ask all questions of a plan; those that the journal knows are not asked again.

    Args:
        model: a digest of the model.

    Raises:
        UserError: a length is too short for a task, or the texts for a length; nothing has been asked then.
    """
    check_lengths(essays, pen, plan)
    total, done = sum(_cost(plan, task, length) for length in plan.lengths for task in plan.tasks), 0.0
    for length in plan.lengths:
        for task in plan.tasks:
            stacks = plan.haystacks(task)
            share = _cost(plan, task, length) / stacks.count / len(plan.bands[length])
            for number in range(stacks.count):
                questions = questions_about(pen, essays, task, length, number, stacks.questions, plan.seed)
                for method, band in plan.bands[length].items():
                    at = done
                    for i, question in enumerate(questions):
                        done = at + share * i / len(questions)
                        llm.on_progress = _within(advance, done, share / len(questions), total)
                        yield _known_or_asked(llm, pen, question, method, band, journal, model)
                    done = at + share
                    advance(done, total)
    llm.on_progress = None


def check_lengths(essays: Essays, pen: Pen, plan: SuitePlan) -> None:
    """Refuse lengths that are too short for a task, or too long for the texts, before hours are spent on others."""
    for length in {min(plan.lengths), max(plan.lengths)}:
        for task in plan.tasks:
            questions_about(pen, essays, task, length, 0, plan.haystacks(task).questions, plan.seed)


def tokens_to_read(plan: SuitePlan) -> int:
    """About how many tokens the model reads for all questions of a plan."""
    return sum(_tokens(plan, task, length) for length in plan.lengths for task in plan.tasks)


def _tokens(plan: SuitePlan, task: Task, length: int) -> int:
    """About how many tokens are read for a cell, in all of its bands that differ."""
    stacks = plan.haystacks(task)
    once = round(length * (1 + task.rereads * (stacks.questions - 1))) + stacks.questions * QUESTION_TOKENS
    return stacks.count * once * len({band_key(band) for band in plan.bands[length].values()})


def _cost(plan: SuitePlan, task: Task, length: int) -> float:
    """About how long a cell takes, as the number of tokens at a text's start that are read in that time."""
    return _tokens(plan, task, length) * (1 + length * SLOWER_PER_TOKEN)


def band_key(band: Band) -> str:
    """What a band does: equal for two if and only if they read a text in the same way."""
    return band.model_dump_json(exclude={"found", "context", "force_start_tokens", "plain"})


def _within(advance: Advance, done: float, share: float, total: float) -> Callable[[int, int], None]:
    return lambda read, of: advance(done + share * read / of, total)


def _known_or_asked(
    llm: Llama, pen: Pen, question: Question, method: str, band: Band, journal: Journal, model: str
) -> Answered:
    key = question_key(model, f"{llm.kv_type} {llm.computed_by}", band, question)
    found = journal.find(key)
    if found is None:
        read = ask(llm, pen, question, band)
        if not math.isfinite(read.loss) or abs(read.loss) > MAX_LOSS:
            raise UserError("the model's losses are not finite numbers: its weights or its schedule are broken")
        found = journal.add(key, _about(question, method), asdict(read))
    return _answered(question, method, found, f"{journal.path}: {key}")


def _about(question: Question, method: str) -> dict[str, Any]:
    names = ("task", "length", "haystack", "depth")
    return {"method": method, **{name: getattr(question, name) for name in names}}


def _answered(question: Question, method: str, found: dict[str, Any], where: str) -> Answered:
    """An answer as it is kept in a journal.

    Raises:
        UserError: it is something else.
    """
    try:
        score, loss, seconds = (float(found[name]) for name in ("score", "loss", "seconds"))
        if not (0 <= score <= 1 and math.isfinite(loss) and math.isfinite(seconds)):
            raise ValueError("not the numbers of an answer")
        return Answered(**_about(question, method), score=score, loss=loss, said=str(found["said"]), seconds=seconds)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: is not an answer of ropewalk eval --suite") from None


def question_key(model: str, computed: str, band: Band, question: Question) -> str:
    """A digest of all that an answer depends on; `computed` says how: the cache type, and by what code."""
    asked = (question.prompt, question.cuts, question.answer, question.references, question.any_of)
    parts = (VERSION, SPARE_TOKENS, model, computed, band_key(band), asked)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Read:
    """What is kept of an answer, see `Answered`."""

    score: float
    loss: float
    said: str
    seconds: float


def ask(llm: Llama, pen: Pen, question: Question, band: Band) -> Read:
    """Read a question's prompt in `band`, score the right answer's tokens, and have the model answer.

    What the cache holds up to the last of the question's cuts is not read again, if it was read in this band.
    """
    started = time.perf_counter()
    if llm.schedule.bands != (band,):
        llm.reset()
        llm.set_schedule(Schedule(facts=llm.schedule.facts, bands=(band,)))
    prompt = list(question.prompt)
    same = llm.longest_token_prefix(llm.tokens.tolist(), prompt)
    kept = max((cut for cut in question.cuts if cut <= same), default=0)
    if llm.can_rewind:
        llm.rewind(kept)
    else:
        llm.reset()
        kept = 0
    for start, stop in pairwise([kept, *(cut for cut in question.cuts if cut > kept)]):
        llm.eval(prompt[start:stop])
    answer = list(question.answer)
    losses = llm.token_losses([*prompt, *answer], len(prompt))
    said = _said(llm, pen, question)
    return Read(
        score=score(said, question.references, question.any_of),
        loss=float(losses.mean()),
        said=said,
        seconds=time.perf_counter() - started,
    )


def _said(llm: Llama, pen: Pen, question: Question) -> str:
    """The model's most likely answer, token by token, as far as is needed to score it."""
    answer: list[int] = []
    stream = llm.generate(question.prompt, temp=0.0, repeat_penalty=1.0, top_k=1)
    try:
        for token in stream:
            if llama_cpp.llama_vocab_is_eog(llm.vocab, token):
                break
            answer.append(token)
            said = pen.text(answer)
            if len(answer) >= question.max_tokens or score(said, question.references) == 1:
                break
    finally:
        stream.close()
    return pen.text(answer).strip()
