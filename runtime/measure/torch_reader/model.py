"""A GGUF model in torch: losses in any band, and their exact gradients with respect to ln λ and ln attention factor.

The numbers are llama.cpp's for the same file, up to its rounding (it quantises activations, this code does not).
A band's near window is a whole number, so that losses have no slope in it: two of them are compared by their losses.

A prefix can be read once and kept (`prefix_state`), with its keys before rotation, so that the tokens after it can be
read in any band over keys rotated for that band. The prefix's hidden states stay those of the band in which it was
read, which makes this a cheap approximation of reading the whole text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ....container import read_header
from ....errors import UserError, mib
from ....factors import Array, Band, RopeFacts
from ...threads import default_threads
from .layers import CHUNK_BYTES, Decoder, Rows, Targets
from .rope import RopeTable
from .weights import Weights, free_memory, load_weights

HALF_DIFFERENCE, HALF_SPREAD = 0.001, 0.02
"""How much 16 bits may change the mean loss (as a share of it), and single losses on average (nats)."""


@dataclass(frozen=True)
class PrefixState:
    """The start of a text as read in `band`: each layer's keys before rotation, and values.

    Both of shape ``(kv heads, 1, tokens, head size)``.
    """

    tokens: tuple[int, ...]
    band: Band
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def n_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))


@dataclass(frozen=True)
class LossGradient:
    """A mean loss (nats per token) and its derivatives."""

    loss: float
    by_log_factors: Array
    """d loss / d ln λ_i, shape ``(n_rot/2,)``."""
    by_log_attention: float
    """d loss / d ln attention factor."""


def load_torch_model(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_bytes: int | None = None,
) -> TorchModel:
    """Read the model at `path` into `dtype` on `device`.

    `threads` is how many threads torch uses in this model's calls (default: the physical cores that this process may
    use).

    Raises:
        UserError: not a GGUF file, a model that is not covered (see `weights`), no such device, or weights of more than
            `max_bytes` (default: the free memory). No weight has been read then.
    """
    header = read_header(path)
    try:
        torch_device = torch.device(device)
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return TorchModel(load_weights(header, torch_device, dtype, max_bytes), threads or default_threads())


class TorchModel:
    """A decoder with frozen weights; see `load_torch_model`.

    In all methods `tokens` are a whole text from position 0, `targets` positions in it: the loss at position t is
    ``-ln p(tokens[t] | tokens[:t])``, in nats. Tokens after the last target are not read.
    """

    def __init__(self, weights: Weights, threads: int) -> None:
        self._weights, self._threads = weights, threads
        self._decoder = Decoder(weights)

    @property
    def facts(self) -> RopeFacts:
        return self._weights.shape.facts

    @property
    def free_memory(self) -> int:
        """Free memory on the model's device, in bytes."""
        return free_memory(self._weights.embedding.device)

    def try_half(self, tokens: Sequence[int], band: Band) -> bool:
        """On a GPU, compute attention in 16 bits and products in TF32, if that hardly changes the losses of `tokens`.

        It is many times faster there. It is not used if the model's scores are too large for it, or if the GPU has no
        such kernel. Returns whether it is used.

        Raises:
            UserError: as `token_losses`.
        """
        if self._weights.embedding.device.type != "cuda":
            return False
        targets = range(1, len(tokens))
        exact = self.token_losses(tokens, band, targets)
        self._decoder.half = True
        try:
            half = self.token_losses(tokens, band, targets)
        except RuntimeError:  # no such kernel on this GPU, or not for this head size
            half = np.full_like(exact, np.nan)
        difference, spread = abs(float(half.mean() / exact.mean()) - 1), float(np.abs(half - exact).mean())
        self._decoder.half = difference < HALF_DIFFERENCE and spread < HALF_SPREAD
        return self._decoder.half

    def token_losses(self, tokens: Sequence[int], band: Band, targets: Sequence[int]) -> Array:
        """Return the losses at `targets`, in their order, with the whole text read in `band`.

        Raises:
            UserError: an impossible token or target, a band for another model, or too little memory.
        """
        return self._losses(None, tokens, band, targets)

    def window_losses(self, state: PrefixState, tokens: Sequence[int], band: Band, targets: Sequence[int]) -> Array:
        """Like `token_losses`, but only the tokens after those of `state` are read, in `band`, over the state's keys.

        The first position that can be a target is the second one after the state's tokens, as the state has no logits.

        Raises:
            UserError: as for `token_losses`, or a state of another text.
        """
        return self._losses(state, tokens, band, targets)

    def loss_and_gradient(
        self, tokens: Sequence[int], band: Band, targets: Sequence[int], weights: Sequence[float] = ()
    ) -> LossGradient:
        """Return the mean of `token_losses` and its exact derivatives at `band`.

        `weights`, one per target, add up to 1; by default all targets have the same weight.

        Raises:
            UserError: as for `token_losses`, or a wrong number of weights.
        """
        return self._gradient(None, tokens, band, targets, weights)

    def window_gradient(
        self,
        state: PrefixState,
        tokens: Sequence[int],
        band: Band,
        targets: Sequence[int],
        weights: Sequence[float] = (),
    ) -> LossGradient:
        """Return the mean of `window_losses` and its exact derivatives at `band`, including the state's key rotation.

        Raises:
            UserError: as for `window_losses`, or a wrong number of weights.
        """
        return self._gradient(state, tokens, band, targets, weights)

    def losses_and_state(
        self, tokens: Sequence[int], band: Band, targets: Sequence[int], n_prefix: int
    ) -> tuple[Array, PrefixState]:
        """Return `token_losses`, and from the same reading the state of the first `n_prefix` tokens.

        Raises:
            UserError: as for `token_losses`.
        """
        with self._working():
            wanted = self._targets(None, tokens, band, targets)
            text, _ = self._embed(None, tokens[: max(*targets, n_prefix)], band, gradient=False)
            losses, kept = self._decoder.losses(text, wanted, n_prefix)
            keys, values = zip(*kept, strict=True)
            return losses, PrefixState(tuple(tokens[:n_prefix]), band, keys, values)

    def prefix_state(self, tokens: Sequence[int], band: Band) -> PrefixState:
        """Read `tokens`, the start of a text, and return the state that `window_losses` needs.

        Raises:
            UserError: as for `token_losses`.
        """
        return self.losses_and_state(tokens, band, [len(tokens) - 1], len(tokens))[1]

    def state_bytes(self, n_tokens: int) -> int:
        """Bytes of a `PrefixState` of `n_tokens` tokens."""
        s, element = self._weights.shape, self._weights.embedding.element_size()
        return 2 * s.n_layer * s.n_head_kv * s.head_size * n_tokens * element

    def check_room(self, n_tokens: int) -> None:
        """Check that there is enough memory to read a text of `n_tokens` tokens.

        Raises:
            UserError: there is not; with the numbers.
        """
        self._check_memory(n_tokens, n_tokens, gradient=False)

    # --- one call

    @contextmanager
    def _working(self) -> Iterator[None]:
        """While the block runs, torch uses all our threads; elsewhere it has one, since ggml's threads do the work."""
        before = torch.get_num_threads(), torch.get_float32_matmul_precision()
        torch.set_num_threads(self._threads)
        if self._decoder.half:
            torch.set_float32_matmul_precision("high")
        try:
            with torch.no_grad(), _repeatable(self._weights.embedding.device):
                yield
        finally:
            torch.set_num_threads(before[0])
            torch.set_float32_matmul_precision(before[1])

    def _losses(self, state: PrefixState | None, tokens: Sequence[int], band: Band, targets: Sequence[int]) -> Array:
        with self._working():
            wanted = self._targets(state, tokens, band, targets)
            text, _ = self._embed(state, tokens[: max(targets)], band, gradient=False)
            return self._decoder.losses(text, wanted)[0]

    def _gradient(
        self,
        state: PrefixState | None,
        tokens: Sequence[int],
        band: Band,
        targets: Sequence[int],
        weights: Sequence[float],
    ) -> LossGradient:
        with self._working():
            wanted = self._targets(state, tokens, band, targets, weights)
            text, table = self._embed(state, tokens[: max(targets)], band, gradient=True)
            loss, of_tables = self._decoder.gradient(text, wanted)
            return LossGradient(loss, *table.gradient(of_tables))

    def _embed(
        self, state: PrefixState | None, tokens: Sequence[int], band: Band, gradient: bool
    ) -> tuple[Rows, RopeTable]:
        first = 0 if state is None else len(state.tokens)
        self._check_memory(len(tokens), len(tokens) - first, gradient, band.near_tokens)
        weights = self._weights.embedding
        table = RopeTable(self.facts, band, len(tokens), weights.device)
        rows = weights[torch.tensor(list(tokens[first:]), device=weights.device)]
        before = () if state is None else (state.keys, state.values)
        return Rows(rows, table.cast(weights.dtype), table.near_tokens, *before), table

    # --- checks

    def _targets(
        self,
        state: PrefixState | None,
        tokens: Sequence[int],
        band: Band,
        targets: Sequence[int],
        weights: Sequence[float] = (),
    ) -> Targets:
        self._check(tokens, band)
        first = 0 if state is None else len(state.tokens)
        if not len(targets) or not first < min(targets) <= max(targets) < len(tokens):
            found = f"{min(targets)} to {max(targets)}" if len(targets) else "none"
            raise UserError(f"targets: {found}, expected positions from {first + 1} to {len(tokens) - 1}")
        if state is not None and tuple(tokens[:first]) != state.tokens:
            raise UserError("tokens: they do not start with the text of the prefix state")
        device = self._weights.embedding.device
        if weights and len(weights) != len(targets):
            raise UserError(f"weights: {len(weights)}, expected one for each of the {len(targets)} targets")
        at = torch.tensor(list(targets), device=device)
        shares = torch.tensor(weights or [1 / len(targets)] * len(targets), dtype=torch.float64, device=device)
        return Targets(at - 1 - first, torch.tensor(list(tokens), device=device)[at], shares)

    def _check(self, tokens: Sequence[int], band: Band) -> None:
        half, n_vocab = self.facts.n_rot // 2, self._weights.shape.n_vocab
        if len(band.rescale_factors) != half:
            raise UserError(f"band: {len(band.rescale_factors)} rescale factors, expected n_rot/2 = {half}")
        if not len(tokens) or not 0 <= min(tokens) <= max(tokens) < n_vocab:
            found = f"{min(tokens)} to {max(tokens)}" if len(tokens) else "none"
            raise UserError(f"tokens: {found}, expected numbers from 0 to {n_vocab - 1}")

    def _check_memory(self, keys: int, rows: int, gradient: bool, near_tokens: int = 0) -> None:
        """Check that a call fits into memory, by an upper estimate.

        Raises:
            UserError: it does not; with the numbers.
        """
        s, weights = self._weights.shape, self._weights.embedding
        wide = s.n_head * s.head_size
        kept = s.n_layer * (s.n_embd + wide) if gradient else 0
        row = kept + (10 if gradient else 4) * (s.n_embd + wide)
        key = 2 * s.head_size * (4 * s.n_head_kv + (2 * s.n_head if gradient else 0)) + 8 * s.facts.n_rot
        if near_tokens:  # queries and keys are rotated twice
            row += (6 if gradient else 3) * wide
            key += 2 * s.head_size * s.n_head_kv + 16 * s.facts.n_rot
        needed = weights.element_size() * (rows * row + keys * key) + 6 * CHUNK_BYTES
        free = self.free_memory
        if needed > free:
            raise UserError(
                f"not enough memory for {keys:,} tokens{' and a gradient' if gradient else ''}:"
                f" {mib(needed)} are needed, {mib(free)} are free; use a shorter text"
            )


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """While the block runs, a GPU adds up numbers in the same order each time, so that a seeded search is repeatable.

    A CPU does that anyway.
    """
    if device.type != "cuda":
        yield
        return
    from torch.utils import deterministic

    before, fill = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs this for it
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
