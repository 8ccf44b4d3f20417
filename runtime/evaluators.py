"""Schedule → loss: a band's loss on probes, by llama.cpp on the file itself or by torch on its weights.

Two fidelities. `full` reads a probe from its first token in the band. `screen` reads all but the last `window` tokens
once, in a base band, and keeps keys and values; for each candidate the kept keys are turned to its λ and only the
window is read. What lies deeper than the keys' rotation keeps the base's values, so screening ranks bands that are
near the base and does not measure them; it costs a tenth or less.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..container import read_header, trained_schedule
from ..errors import UserError
from ..factors import Band, Schedule
from ..factors.search.protocol import Fidelity, Result, Task
from .llama import Llama
from .losses import Losses
from .probes import Probe, digest
from .results import model_digest
from .session import state_of

if TYPE_CHECKING:
    from .torch_evaluator import TorchEvaluator

WINDOW = 1024

TRIAL_TOKENS = 2048

Kind = Literal["llama", "torch"]


@dataclass(frozen=True)
class EvaluatorSpec:
    """All that an evaluator is made from, in any process: call it.

    Attributes:
        base: the band in which screening reads what lies before the window.
        window: tokens at a probe's end that screening reads.
        kv: cache type of llama.cpp's evaluator.
        threads: CPU threads; None = the machine's cores.
    """

    model: str
    probes: tuple[Probe, ...]
    base: Band
    kind: Kind = "llama"
    window: int = WINDOW
    kv: str = "f16"
    threads: int | None = None

    @property
    def key(self) -> str:
        """A digest of all that a loss depends on beside the band; threads are not of it."""
        base = self.base.model_dump_json(exclude={"found"})
        parts = (model_digest(self.model), digest(self.probes), base, self.kind, self.window, self.kv)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def weights(self) -> tuple[float, ...]:
        """How much each probe counts: all the same."""
        return (1.0,) * len(self.probes)

    def __call__(self) -> LlamaEvaluator | TorchEvaluator:
        """Load the model.

        Raises:
            UserError: it does not load, or not into memory.
        """
        if self.kind == "torch":
            from .torch_evaluator import TorchEvaluator

            return TorchEvaluator(self)
        return LlamaEvaluator(self)


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
        self._windows = [probe.last(spec.window) for probe in spec.probes]
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
        probe, llm = self._probe(document, fidelity), self._llm
        llm.reset()
        llm.set_schedule(self._alone(band, len(probe.tokens)))
        if fidelity == "screen":
            self._prepare(document)
            prefix = np.array(probe.tokens[: -self._spec.window], dtype=np.int32)
            llm.restore(prefix, self._states[document], self._alone(self._spec.base, len(probe.tokens)).bands[0])
        losses = llm.token_losses(probe.tokens, targets=probe.targets)
        # What was read is what screening would have to read; bit for bit where the same tokens were read at once.
        alike = _same(band, self._spec.base) and (len(probe.tokens) - self._spec.window) % llm.n_batch == 0
        if fidelity == "full" and alike and document not in self._states:
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
        """Read a document up to its window in the base band, unless that is kept."""
        if document in self._states:
            return
        tokens = self._spec.probes[document].tokens
        self._llm.reset()
        self._llm.set_schedule(self._alone(self._spec.base, len(tokens)))
        self._llm.eval(tokens[: -self._spec.window])
        self._keep(document)

    def _keep(self, document: int) -> None:
        llm, n = self._llm, len(self._spec.probes[document].tokens) - self._spec.window
        llm.n_tokens = n
        self._states[document] = state_of(llm)


def faster(spec: EvaluatorSpec, n_tokens: int = TRIAL_TOKENS) -> tuple[Kind, dict[Kind, float]]:
    """Which of the two reads faster here, measured on the beginning of the first probe, and both speeds (tokens/s).

    A model that torch's reader does not cover has no speed there.

    Raises:
        UserError: neither can run it.
    """
    probe = spec.probes[0]
    tokens = probe.tokens[: min(n_tokens, len(probe.tokens))]
    targets = tuple(range(len(tokens) // 2, len(tokens)))
    trial = Probe(probe.name, tokens, targets, (1 / len(targets),) * len(targets))
    kinds: tuple[Kind, ...] = ("llama", "torch")
    speeds: dict[Kind, float] = {}
    for kind in kinds:
        try:
            reader = replace(spec, kind=kind, probes=(trial,), window=len(targets) + 1)()
        except UserError:
            if kind == "llama":
                raise
            continue
        spent = [reader.evaluate(Task(spec.base, 0)).seconds for _ in range(2)]  # the first one warms up
        speeds[kind] = len(tokens) / min(spent)
        reader.close()
    return max(speeds, key=lambda kind: speeds[kind]), speeds


def _same(band: Band, other: Band) -> bool:
    facts = ("rescale_factors", "start_tokens", "attention_factor")
    return all(getattr(band, name) == getattr(other, name) for name in facts)
