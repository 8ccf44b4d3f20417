"""llama.cpp's losses for the search; for screening, the state before the window is kept, and its keys are rotated.

See `choice`.
"""

from __future__ import annotations

import time

import numpy as np

from ....container import read_header, trained_schedule
from ....errors import UserError
from ....factors import Band, Schedule
from ....factors.search.protocol import Fidelity, Result, Task
from ...free_memory import available_memory
from ...llama import Llama
from ...losses import Losses
from ...memory import check_room
from ..passages import Passage
from .spec import EvaluatorSpec


class LlamaEvaluator:
    """llama.cpp's losses: any architecture with RoPE, the quantised file itself, no reload between bands.

    Attributes:
        key, weights: as in `Evaluator`.

    Raises:
        UserError: as `Llama`.
    """

    def __init__(self, spec: EvaluatorSpec) -> None:
        self._spec, self.key = spec, spec.key
        self.weights = spec.weights
        self._facts = trained_schedule(read_header(spec.model)).facts
        longest = max(len(passage.tokens) for passage in spec.passages)
        self._llm = Llama(
            spec.model,
            schedule=self._schedule(spec.base, longest),
            n_ctx=longest,
            kv=spec.kv,
            flash_attn=True,
            exact=True,
            n_threads=spec.threads,
            n_threads_batch=spec.threads,
            verbose=False,
        )
        self._windows = [passage.last(spec.window) for passage in spec.passages if spec.window]
        self._states: dict[int, np.ndarray] = {}

    def evaluate(self, task: Task) -> Result:
        """The weighted mean loss of a task's band on its passage; see `Evaluator`."""
        if task.gradient:
            raise UserError("gradients need the torch evaluator")
        if task.fidelity == "screen":
            self._prepare(task.passage)
        started = time.perf_counter()
        losses = self.losses(task.band, task.passage, task.fidelity)
        passage = self._passage(task.passage, task.fidelity)
        return Result(float(losses @ np.array(passage.weights)), time.perf_counter() - started)

    def losses(self, band: Band, index: int, fidelity: Fidelity = "full") -> Losses:
        """Losses (nats) of each target of passage `index`; when screening, only of those in its window."""
        if fidelity == "screen":
            self._prepare(index)
        passage, llm = self._passage(index, fidelity), self._llm
        llm.reset()
        llm.set_schedule(self._schedule(band, len(passage.tokens)))
        if llm.band.near_tokens != band.near_tokens:
            raise UserError(
                f"near tokens: {band.near_tokens}, expected 0: the attention of this model cannot be read with a window"
            )
        if fidelity == "screen":
            prefix = np.array(passage.tokens[: -self._spec.window], dtype=np.int32)
            llm.restore(prefix, self._states[index], self._schedule(self._spec.base, len(passage.tokens)).bands[0])
        losses = llm.token_losses(passage.tokens, targets=passage.targets)
        if fidelity == "full" and self._windows and self._spec.is_base(band) and index not in self._states:
            self._save_state(index)
        return losses

    def close(self) -> None:
        self._llm.close()

    def _passage(self, index: int, fidelity: Fidelity) -> Passage:
        return self._spec.passages[index] if fidelity == "full" else self._windows[index]

    def _schedule(self, band: Band, context: int) -> Schedule:
        """A schedule of this band only, that holds at least `context` tokens."""
        band = band.model_copy(update={"context": max(band.context, context)})
        return Schedule(facts=self._facts, bands=(band,))

    def _prepare(self, index: int) -> None:
        """Read a passage in the base band, unless its state is kept already.

        It is read in full, in the same batches as for its loss: in others the state would differ in its last bits, and
        a resumed search could take another course.
        """
        if index not in self._states:
            self.losses(self._spec.base, index)

    def _save_state(self, index: int) -> None:
        llm, tokens = self._llm, self._spec.passages[index].tokens
        llm.rewind(len(tokens) - self._spec.window)
        check_room(llm.plan.cache_bytes, len(self._spec.passages) - len(self._states), available_memory())
        self._states[index] = llm.sequence_state()
