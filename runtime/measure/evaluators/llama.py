"""llama.cpp's losses for the search; for screening, the state before the window is kept, and its keys turned.

See `evaluators`.
"""

from __future__ import annotations

import time

import numpy as np

from ....container import read_header, trained_schedule
from ....errors import UserError
from ....factors import Band, Schedule
from ....factors.search.protocol import Fidelity, Result, Task
from ...llama import Llama
from ...losses import Losses
from ...memory import available_memory, check_room
from ..passages import Probe
from .spec import EvaluatorSpec


class LlamaEvaluator:
    """llama.cpp's losses: any architecture with RoPE, the quantised file itself. No reload between bands.

    Attributes:
        key, weights: as in `Evaluator`.

    Raises:
        UserError: as `Llama`.
    """

    def __init__(self, spec: EvaluatorSpec) -> None:
        self._spec, self.key = spec, spec.key
        self.weights = spec.weights
        self._facts = trained_schedule(read_header(spec.model)).facts
        longest = max(len(probe.tokens) for probe in spec.probes)
        self._llm = Llama(
            spec.model,
            schedule=self._alone(spec.base, longest),
            n_ctx=longest,
            kv=spec.kv,
            flash_attn=True,
            n_threads=spec.threads,
            n_threads_batch=spec.threads,
            verbose=False,
        )
        self._windows = [probe.last(spec.window) for probe in spec.probes if spec.window]
        self._states: dict[int, np.ndarray] = {}

    def evaluate(self, task: Task) -> Result:
        """The weighted mean loss of a task's band on its document; see `Evaluator`."""
        if task.gradient:
            raise UserError("gradients need the torch evaluator")
        if task.fidelity == "screen":
            self._prepare(task.document)
        started = time.perf_counter()
        losses = self.losses(task.band, task.document, task.fidelity)
        probe = self._probe(task.document, task.fidelity)
        return Result(float(losses @ np.array(probe.weights)), time.perf_counter() - started)

    def losses(self, band: Band, document: int, fidelity: Fidelity = "full") -> Losses:
        """Of each target of the document's probe (in its window, when screening), in nats."""
        if fidelity == "screen":
            self._prepare(document)
        probe, llm = self._probe(document, fidelity), self._llm
        llm.reset()
        llm.set_schedule(self._alone(band, len(probe.tokens)))
        if fidelity == "screen":
            prefix = np.array(probe.tokens[: -self._spec.window], dtype=np.int32)
            llm.restore(prefix, self._states[document], self._alone(self._spec.base, len(probe.tokens)).bands[0])
        losses = llm.token_losses(probe.tokens, targets=probe.targets)
        if fidelity == "full" and self._windows and self._spec.is_base(band) and document not in self._states:
            self._keep(document)
        return losses

    def close(self) -> None:
        self._llm.close()

    def _probe(self, document: int, fidelity: Fidelity) -> Probe:
        return self._spec.probes[document] if fidelity == "full" else self._windows[document]

    def _alone(self, band: Band, context: int) -> Schedule:
        """A schedule of this band only, that serves at least `context` tokens."""
        band = band.model_copy(update={"context": max(band.context, context)})
        return Schedule(facts=self._facts, bands=(band,))

    def _prepare(self, document: int) -> None:
        """Read a document in the base band, unless that is kept.

        In full, just as its loss is read: in other batches the state would differ in its last bits, and a search that
        was killed could go another way.
        """
        if document not in self._states:
            self.losses(self._spec.base, document)

    def _keep(self, document: int) -> None:
        llm, tokens = self._llm, self._spec.probes[document].tokens
        llm.rewind(len(tokens) - self._spec.window)
        check_room(llm.plan.cache_bytes, len(self._spec.probes) - len(self._states), available_memory())
        self._states[document] = llm.sequence_state()
