"""The result of an evaluation as a GGUF file carries it, in metadata under `ropewalk.evaluation.`.

    ropewalk.evaluation.{suite, suite_version, ropewalk, texts_digest, schedule_digest, kv_type}
    ropewalk.evaluation.{seed, samples, share, chat, original_context}
    ropewalk.evaluation.{effective_by_accuracy, effective_by_likelihood}    missing if there is none
    ropewalk.evaluation.{lengths, tasks}                                    arrays
    ropewalk.evaluation.{accuracy, loss}[_low, _high]                       by length
    ropewalk.evaluation.{task_accuracy, task_loss}                          by task, then by length

It says what the schedule in the same file is worth, as long as that schedule's digest is the one that is kept here.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..factors import Schedule, first_mistake
from .header import GGUFError, Header
from .values import ARRAY, BOOL, EVALUATION, F64, I64, STRING, U32, Value

MOST = 4096
"""Most items of an array."""

Number = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(max_length=200)]
Share = Annotated[float, Field(ge=0, le=1)]
Nats = Annotated[float, Field(allow_inf_nan=False)]
Shares = Annotated[tuple[Share, ...], Field(max_length=MOST)]
Losses = Annotated[tuple[Nats, ...], Field(max_length=MOST)]


class Certificate(BaseModel):
    """What was evaluated, how, and what came out; see `runtime.measure.suites`.

    Attributes:
        suite_version: a higher one asks other questions.
        ropewalk: the version of the program.
        share: at most so many of the questions are about the same text.
        chat: whether prompts went through the chat template.
        effective_by_accuracy, effective_by_likelihood: in tokens; None = at no length.
        accuracy, loss: means over tasks by length, loss in nats per token, with their 95 % intervals.
        task_accuracy, task_loss: by task and length, task by task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: Name
    suite_version: Number
    ropewalk: Name
    texts_digest: Name
    schedule_digest: Name
    kv_type: Name
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    samples: Number
    share: Number
    chat: bool
    original_context: Number
    effective_by_accuracy: Number | None = None
    effective_by_likelihood: Number | None = None
    lengths: Annotated[tuple[Number, ...], Field(min_length=1, max_length=MOST)]
    tasks: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MOST)]
    accuracy: Shares
    accuracy_low: Shares
    accuracy_high: Shares
    loss: Losses
    loss_low: Losses
    loss_high: Losses
    task_accuracy: Shares
    task_loss: Losses

    @model_validator(mode="after")
    def _check_lengths(self) -> Certificate:
        wanted = {name: len(self.lengths) for name in BY_LENGTH}
        wanted |= {name: len(self.lengths) * len(self.tasks) for name in BY_TASK}
        for name, n in wanted.items():
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name}: {len(getattr(self, name))} numbers, expected {n}")
        return self

    def holds_for(self, schedule: Schedule) -> bool:
        """Whether it is that schedule that was evaluated."""
        return self.schedule_digest == schedule_digest(schedule)


BY_LENGTH = ("accuracy", "accuracy_low", "accuracy_high", "loss", "loss_low", "loss_high")
BY_TASK = ("task_accuracy", "task_loss")
ITEM_TYPES = dict.fromkeys((*BY_LENGTH, *BY_TASK), F64) | {"lengths": U32, "tasks": STRING}


def schedule_digest(schedule: Schedule) -> str:
    """A digest of what a schedule does; how it was found is not part of it."""
    bands = [band.model_dump_json(exclude={"found", "plain", "force_start_tokens"}) for band in schedule.bands]
    return hashlib.sha256(repr((schedule.facts.model_dump_json(), bands)).encode()).hexdigest()[:16]


def certificate_values(certificate: Certificate) -> list[Value]:
    """The metadata that holds a certificate, in the order in which it is written."""
    return [
        _value(EVALUATION + name, name, value) for name, value in certificate.model_dump().items() if value is not None
    ]


def _value(key: str, name: str, value: Any) -> Value:
    if name in ITEM_TYPES:
        return Value(key, ARRAY, list(value), ITEM_TYPES[name])
    if isinstance(value, bool):
        return Value(key, BOOL, value)
    if isinstance(value, int):
        return Value(key, I64 if name == "seed" else U32, value)
    return Value(key, STRING, value)


def certificate_of(header: Header) -> Certificate | None:
    """The certificate in a file, or None.

    Raises:
        GGUFError: there is one, but it is invalid; the message names the file and the key.
    """
    keys = [key for key in header.entries if key.startswith(EVALUATION)]
    if not keys:
        return None
    data = {}
    for key in keys:
        entry = header.entries[key]
        if entry.item_type is not None and entry.count > MOST:
            raise GGUFError(f"{header.path}: {key}: {entry.count} items, expected at most {MOST}")
        data[key.removeprefix(EVALUATION)] = header.get(key) if entry.item_type is None else header.array(key)
    try:
        return Certificate.model_validate(data)
    except ValidationError as error:
        raise GGUFError(f"{header.path}: {EVALUATION[:-1]} metadata: {first_mistake(error)}") from None
