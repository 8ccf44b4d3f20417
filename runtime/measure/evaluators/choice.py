"""The choice of an evaluator, which computes a band's loss on passages: llama.cpp on the file, or torch on its weights.

There are two fidelities. `full` reads a passage from its first token in the band. `screen` reads all but the last
`window` tokens once, in a base band, and keeps their keys and values; for each candidate, these keys are rotated by its
λ and only the window is read. Apart from that rotation the prefix stays as read in the base band, so screening ranks
bands near the base but does not measure them; it costs a tenth or less.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ....errors import UserError
from ....factors.search.protocol import Task
from ..passages import Passage
from .llama import LlamaEvaluator
from .spec import EvaluatorSpec, Kind

if TYPE_CHECKING:
    from .torch import TorchEvaluator

TRIAL_TOKENS = 2048


def make_evaluator(spec: EvaluatorSpec) -> LlamaEvaluator | TorchEvaluator:
    """Load the model.

    Raises:
        UserError: it cannot be loaded, or does not fit into memory.
    """
    if spec.kind == "torch":
        from .torch import TorchEvaluator

        return TorchEvaluator(spec)
    return LlamaEvaluator(spec)


@dataclass(frozen=True)
class EvaluatorRecipe:
    """Creates an evaluator, in any process that it is sent to; key and weights are known without creating one."""

    spec: EvaluatorSpec

    @property
    def key(self) -> str:
        return self.spec.key

    @property
    def weights(self) -> Sequence[float]:
        return self.spec.weights

    def __call__(self) -> LlamaEvaluator | TorchEvaluator:
        return make_evaluator(self.spec)


def faster(spec: EvaluatorSpec, n_tokens: int = TRIAL_TOKENS) -> tuple[Kind, dict[Kind, float]]:
    """Measure which evaluator is faster on this machine, on the start of the first passage; and both speeds (tokens/s).

    If torch's reader does not cover the model, it has no speed.

    Raises:
        UserError: neither can run it.
    """
    passage = spec.passages[0]
    tokens = passage.tokens[: min(n_tokens, len(passage.tokens))]
    targets = tuple(range(len(tokens) // 2, len(tokens)))
    trial = Passage(passage.name, tokens, targets, (1 / len(targets),) * len(targets))
    trials = replace(spec, passages=(trial, *spec.passages), window=0)  # all of them, as the longest must fit as well
    kinds: tuple[Kind, ...] = ("llama", "torch")
    speeds: dict[Kind, float] = {}
    for kind in kinds:
        try:
            with closing(make_evaluator(replace(trials, kind=kind))) as reader:
                spent = [reader.evaluate(Task(spec.base, 0)).seconds for _ in range(2)]  # the first one warms up
        except UserError:
            if kind == "llama":
                raise
            continue
        speeds[kind] = len(tokens) / min(spent)
    return max(speeds, key=lambda kind: speeds[kind]), speeds
