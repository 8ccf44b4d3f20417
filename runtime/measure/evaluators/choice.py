"""Schedule → loss: a band's loss on passages, by llama.cpp on the file itself or by torch on its weights.

Two fidelities. `full` reads a passage from its first token in the band. `screen` reads all but the last `window` tokens
once, in a base band, and keeps keys and values; for each candidate the kept keys are turned to its λ and only the
window is read. What lies deeper than the keys' rotation keeps the base's values, so screening ranks bands that are
near the base and does not measure them; it costs a tenth or less.
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
        UserError: it does not load, or not into memory.
    """
    if spec.kind == "torch":
        from .torch import TorchEvaluator

        return TorchEvaluator(spec)
    return LlamaEvaluator(spec)


@dataclass(frozen=True)
class EvaluatorRecipe:
    """Makes an evaluator, in any process that it is sent to; its key and weights are known before."""

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
    """Which of the two reads faster here, measured on the beginning of the first passage, and both speeds (tokens/s).

    A model that torch's reader does not cover has no speed there.

    Raises:
        UserError: neither can run it.
    """
    passage = spec.passages[0]
    tokens = passage.tokens[: min(n_tokens, len(passage.tokens))]
    targets = tuple(range(len(tokens) // 2, len(tokens)))
    trial = Passage(passage.name, tokens, targets, (1 / len(targets),) * len(targets))
    trials = replace(spec, passages=(trial, *spec.passages), window=0)  # all of them, as the longest must fit, too
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
