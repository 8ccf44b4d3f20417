"""torch's losses and gradients for the search: Llama-family models, the GGUF's weights made floats, CPU or CUDA.

Screening keeps, for each probe, keys before rotation and values of what lies before the window, read in the base band;
see `evaluators`.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from ....factors import Band
from ....factors.search.protocol import Fidelity, Result, Task
from ...losses import Losses
from ...memory import check_room
from ..torch_reader.model import PrefixState, load_torch_model
from .spec import EvaluatorSpec

TRIAL_TOKENS = 4096  # read twice to see whether 16 bits will do


class TorchEvaluator:
    """Losses and gradients of bands on probes; see `Evaluator`.

    Raises:
        UserError: a model that torch's reader does not cover, or too little memory.
    """

    def __init__(self, spec: EvaluatorSpec) -> None:
        self._spec, self.key = spec, spec.key
        self.weights = spec.weights
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_torch_model(spec.model, device=device, threads=spec.threads)
        self._windows = [probe.last(spec.window) for probe in spec.probes if spec.window]
        self._states: dict[int, PrefixState] = {}
        self._model.check_room(max(len(probe.tokens) for probe in spec.probes))
        self._model.try_half(spec.probes[0].tokens[:TRIAL_TOKENS], spec.base)

    def evaluate(self, task: Task) -> Result:
        """The weighted mean loss of a task's band on its document, and its derivatives if they are asked for."""
        state = self._state(task.document) if task.fidelity == "screen" else None
        probe = self._windows[task.document] if state else self._spec.probes[task.document]
        started = time.perf_counter()
        if not task.gradient:
            losses = self.losses(task.band, task.document, task.fidelity)
            return Result(float(losses @ np.array(probe.weights)), time.perf_counter() - started)
        model, what = self._model, (probe.tokens, task.band, probe.targets, probe.weights)
        found = model.window_gradient(state, *what) if state else model.loss_and_gradient(*what)
        by_factors = tuple(found.by_log_factors.tolist())
        return Result(found.loss, time.perf_counter() - started, by_factors, found.by_log_attention)

    def losses(self, band: Band, document: int, fidelity: Fidelity = "full") -> Losses:
        """Of each target of the document's probe (in its window, when screening), in nats."""
        if fidelity == "screen":
            probe = self._windows[document]
            return self._model.window_losses(self._state(document), probe.tokens, band, probe.targets)
        if self._windows and self._spec.is_base(band) and document not in self._states:
            return self._read_base(document)
        probe = self._spec.probes[document]
        return self._model.token_losses(probe.tokens, band, probe.targets)

    def _read_base(self, document: int) -> Losses:
        """A document's losses in the base band; what screening needs is kept of the same reading."""
        probe, left = self._spec.probes[document], len(self._spec.probes) - len(self._states)
        n_prefix = len(probe.tokens) - self._spec.window
        check_room(self._model.state_bytes(n_prefix), left, self._model.free_memory)
        read = self._model.losses_and_state(probe.tokens, self._spec.base, probe.targets, n_prefix)
        losses, self._states[document] = read
        return losses

    def close(self) -> None:
        self._states.clear()

    def _state(self, document: int) -> PrefixState:
        """What screening needs, always of a whole reading: in one of the prefix alone the last bits would differ."""
        if document not in self._states:
            self._read_base(document)
        return self._states[document]
