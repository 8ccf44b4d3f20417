"""torch's losses and gradients for the search: Llama-family models with dequantised weights, on a CPU or CUDA.

For screening, each passage's unrotated keys and values before the window are kept, as read in the base band; see
`choice`.
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

TRIAL_TOKENS = 4096  # read twice, to test whether 16 bits are precise enough


class TorchEvaluator:
    """Losses and gradients of bands on passages; see `Evaluator`.

    Raises:
        UserError: a model that torch's reader does not cover, or too little memory.
    """

    def __init__(self, spec: EvaluatorSpec) -> None:
        self._spec, self.key = spec, spec.key
        self.weights = spec.weights
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_torch_model(spec.model, device=device, threads=spec.threads)
        self._windows = [passage.last(spec.window) for passage in spec.passages if spec.window]
        self._states: dict[int, PrefixState] = {}
        self._model.check_room(max(len(passage.tokens) for passage in spec.passages))
        self._model.try_half(spec.passages[0].tokens[:TRIAL_TOKENS], spec.base)

    def evaluate(self, task: Task) -> Result:
        """The weighted mean loss of a task's band on its passage, and its derivatives if requested."""
        state = self._state(task.passage) if task.fidelity == "screen" else None
        passage = self._windows[task.passage] if state else self._spec.passages[task.passage]
        started = time.perf_counter()
        if not task.gradient:
            losses = self.losses(task.band, task.passage, task.fidelity)
            return Result(float(losses @ np.array(passage.weights)), time.perf_counter() - started)
        model, arguments = self._model, (passage.tokens, task.band, passage.targets, passage.weights)
        found = model.window_gradient(state, *arguments) if state else model.loss_and_gradient(*arguments)
        by_factors = tuple(found.by_log_factors.tolist())
        return Result(found.loss, time.perf_counter() - started, by_factors, found.by_log_attention)

    def losses(self, band: Band, index: int, fidelity: Fidelity = "full") -> Losses:
        """Losses (nats) of each target of passage `index`; when screening, only of those in its window."""
        if fidelity == "screen":
            passage = self._windows[index]
            return self._model.window_losses(self._state(index), passage.tokens, band, passage.targets)
        if self._windows and self._spec.is_base(band) and index not in self._states:
            return self._read_base(index)
        passage = self._spec.passages[index]
        return self._model.token_losses(passage.tokens, band, passage.targets)

    def _read_base(self, index: int) -> Losses:
        """A passage's losses in the base band; the state that screening needs is kept from the same reading."""
        passage, n_left = self._spec.passages[index], len(self._spec.passages) - len(self._states)
        n_prefix = len(passage.tokens) - self._spec.window
        check_room(self._model.state_bytes(n_prefix), n_left, self._model.free_memory)
        losses, self._states[index] = self._model.losses_and_state(
            passage.tokens, self._spec.base, passage.targets, n_prefix
        )
        return losses

    def close(self) -> None:
        self._states.clear()

    def _state(self, index: int) -> PrefixState:
        """The state for screening, always from a full reading: that of a prefix alone would differ in the last bits."""
        if index not in self._states:
            self._read_base(index)
        return self._states[index]
