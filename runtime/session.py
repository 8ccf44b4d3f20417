"""A sequence on disk: its tokens, keys and values, and the band they are in.

One safetensors file, written under a temporary name and renamed. Nothing in it is trusted: its metadata, lengths and
tokens must match the model before memory is spent on it, and a digest of the contents is checked before llama.cpp sees
a byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..factors import Band, RopeFacts, Schedule, check_matches
from ..files import replacement

if TYPE_CHECKING:
    from .llama import Llama

FORMAT = "ropewalk-session-1"

PIECE_BYTES = 16 << 20  # written and hashed at a time, so that Ctrl-C takes effect in between
SPARE_BYTES = 1 << 20  # allowed for what a state holds besides the cells
RECURRENT_BYTES = 1 << 30  # the same, where some layers keep something other than cells

Tokens = np.ndarray[Any, np.dtype[np.int32]]
State = np.ndarray[Any, np.dtype[np.uint8]]


class DamagedSession(UserError):
    """A file that no model can load: truncated, damaged, or not a session at all."""


def save(llm: Llama, path: str | os.PathLike[str], *, sync: bool = True) -> None:
    """Write the sequence in the cache of `llm`.

    Args:
        sync: wait until it is on disk, so that it survives a power cut.

    Raises:
        UserError: the path cannot be written to; what was there before stays.
    """
    tokens, state = llm.tokens, llm.sequence_state()
    try:
        with replacement(path, private=True, sync=sync) as file:
            file.write(_head(llm, len(tokens), state.nbytes, _digest(tokens, state)))
            for piece in _pieces(tokens, state):
                file.write(piece)
    except OSError as error:
        raise UserError(f"{path}: cannot write the session: {error.strerror or error}") from None


def size(llm: Llama) -> int:
    """Bytes of the file that `save` would write."""
    n_tokens, n_bytes = int(llm.n_tokens), llm.sequence_bytes
    return len(_head(llm, n_tokens, n_bytes, "0" * 64)) + 4 * n_tokens + n_bytes


def load(llm: Llama, path: str | os.PathLike[str]) -> None:
    """Load a saved sequence into the cache of `llm`, rotated to the band that holds it there.

    Raises:
        UserError: no such file, or one of another model, cache type or longer context; the cache is unchanged.
        DamagedSession: a damaged or foreign file; the cache is unchanged, or empty if llama.cpp itself refused it.
    """
    with _opened(path) as file:
        facts = file.metadata() or {}
        band = _band(llm, path, facts)
        n_tokens, n_bytes = _length(file, "tokens", "I32"), _length(file, "state", "U8")
        if n_tokens > llm.n_ctx():
            raise UserError(f"{path}: {n_tokens:,} tokens are more than the context of {llm.n_ctx():,}")
        if n_bytes > _max_state_bytes(llm, n_tokens):
            raise DamagedSession(f"{path}: {n_bytes:,} bytes of state are too many for {n_tokens:,} tokens")
        tokens, state = file.get_tensor("tokens"), file.get_tensor("state")
    if _digest(tokens, state) != facts.get("digest"):
        raise DamagedSession(f"{path}: the session is damaged (its digest does not match)")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < llm.n_vocab():
        raise DamagedSession(f"{path}: tokens outside the model's vocabulary of {llm.n_vocab():,}")
    try:
        llm.restore(tokens, state, band)
    except RuntimeError as error:
        raise DamagedSession(f"{path}: {error}") from None


def load_tokens(path: str | os.PathLike[str], max_tokens: int) -> Tokens:
    """Return the tokens of a saved sequence, shape ``(n,)``, without its state; only their number is checked.

    Raises:
        UserError: no such file, or more than `max_tokens` tokens.
        DamagedSession: a damaged or foreign file.
    """
    with _opened(path) as file:
        n_tokens = _length(file, "tokens", "I32")
        if n_tokens > max_tokens:
            raise UserError(f"{path}: {n_tokens:,} tokens, expected at most {max_tokens:,}")
        tokens: Tokens = file.get_tensor("tokens")
        return tokens


# --- the file


def _head(llm: Llama, n_tokens: int, n_bytes: int, digest: str) -> bytes:
    """Return the bytes of a safetensors file up to its first tensor."""
    facts = {
        "format": FORMAT,
        "model": llm.weights_key,
        "kv_type": llm.kv_type,
        "band": llm.band.model_dump_json(),
        "facts": llm.schedule.facts.model_dump_json(),
        "digest": digest,
    }
    end = 4 * n_tokens
    tensors = {
        "tokens": {"dtype": "I32", "shape": [n_tokens], "data_offsets": [0, end]},
        "state": {"dtype": "U8", "shape": [n_bytes], "data_offsets": [end, end + n_bytes]},
    }
    text = json.dumps({"__metadata__": facts, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _digest(tokens: Tokens, state: State) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(tokens, state):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(tokens: Tokens, state: State) -> Iterator[memoryview]:
    """Yield the bytes of both, one after the other."""
    for array in (np.ascontiguousarray(tokens, dtype="<i4").view(np.uint8), state):
        for start in range(0, len(array), PIECE_BYTES):
            yield array[start : start + PIECE_BYTES].data


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open the file; anything wrong with it becomes a one-line error."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot read the session: {error.strerror or error}") from None
    except (SafetensorError, ValidationError) as error:
        raise DamagedSession(f"{path}: not a complete ropewalk session: {str(error).splitlines()[0]}") from None


def _length(file: Any, name: str, dtype: str) -> int:
    """Return the length of a tensor in the file, which must be a row of `dtype`."""
    tensor = file.get_slice(name)
    shape = tensor.get_shape()
    if tensor.get_dtype() != dtype or len(shape) != 1:
        raise SafetensorError(f"{name}: {tensor.get_dtype()} of shape {shape}, expected a row of {dtype}")
    return int(shape[0])


# --- checks against the model


def _band(llm: Llama, path: str | os.PathLike[str], facts: dict[str, str]) -> Band:
    """Return the band that the saved keys are in, after checking that the file's metadata matches `llm`."""
    if facts.get("format") != FORMAT:
        raise DamagedSession(f"{path}: not a ropewalk session (format {facts.get('format')!r}, expected {FORMAT!r})")
    if facts.get("model") != llm.weights_key:
        raise UserError(f"{path}: saved with another model (or by an older ropewalk), expected the same weights")
    if facts.get("kv_type") != llm.kv_type:
        raise UserError(f"{path}: saved with kv_type {facts.get('kv_type')!r}, expected {llm.kv_type!r}")
    check_matches(llm.schedule, RopeFacts.model_validate_json(facts.get("facts", "")), str(path))
    band = Band.model_validate_json(facts.get("band", ""))
    Schedule(facts=llm.schedule.facts, bands=(band,))  # checks that it has as many factors as the model
    if band not in llm.schedule.bands and not llm.runs_by_schedule:
        raise UserError(f"{path}: saved in a band that this model does not have, and cannot be rotated to")
    return band


def _max_state_bytes(llm: Llama, n_tokens: int) -> int:
    """Return twice what the state of so many tokens should take, as architectures differ."""
    spare = SPARE_BYTES if llm.can_rewind else RECURRENT_BYTES
    return 2 * llm.cache_bytes * n_tokens // llm.plan.n_ctx + 64 * n_tokens + spare
