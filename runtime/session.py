"""A sequence on disk: its tokens, keys and values, and the band they are in.

One safetensors file, written beside and renamed. A digest of the contents is checked before llama.cpp sees a byte, and
the model, the cache types and the rotary facts must be those it was saved with.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import UserError
from ..factors import Band, check_matches

if TYPE_CHECKING:
    from .llama import Llama

FORMAT = "ropewalk-session-1"


def save(llm: Llama, path: str | os.PathLike[str]) -> None:
    """Write the sequence that `llm` has in its cache.

    Raises:
        UserError: the place cannot be written to; what was there before stays.
    """
    n_bytes = llama_cpp.llama_state_seq_get_size(llm._ctx.ctx, 0)
    state = np.empty(n_bytes, dtype=np.uint8)
    buffer = (ctypes.c_uint8 * n_bytes).from_buffer(state)
    written = llama_cpp.llama_state_seq_get_data(llm._ctx.ctx, buffer, n_bytes, 0)
    if written != n_bytes:
        raise RuntimeError(f"llama.cpp wrote {written} of {n_bytes} bytes of its state")
    tokens = llm.input_ids[: llm.n_tokens].astype(np.int32)
    facts = {
        "format": FORMAT,
        "model": model_key(llm),
        "kv_type": llm.kv_type,
        "band": llm.band.model_dump_json(),
        "facts": llm.schedule.facts.model_dump_json(),
        "digest": _digest(tokens, state),
    }
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        try:
            save_file({"tokens": tokens, "state": state}, part, metadata=facts)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write the session: {getattr(error, 'strerror', None) or error}") from None


def load(llm: Llama, path: str | os.PathLike[str]) -> None:
    """Put a saved sequence into the cache of `llm`, turned to the band that holds it there.

    Raises:
        UserError: no such file, a torn or foreign one, or one of another model, cache type or longer context; the
            sequence in the cache stays as it was then.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise UserError(f"{path}: not a ropewalk session (format {facts.get('format')!r}, expected {FORMAT!r})")
            for key, ours in (("model", model_key(llm)), ("kv_type", llm.kv_type)):
                if facts.get(key) != ours:
                    raise UserError(f"{path}: saved with {key} {facts.get(key)!r}, expected {ours!r}")
            tokens, state = file.get_tensor("tokens"), file.get_tensor("state")
        band = Band.model_validate_json(facts.get("band", ""))
        check_matches(llm.schedule, type(llm.schedule.facts).model_validate_json(facts.get("facts", "")), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read the session: {error.strerror or error}") from None
    except (SafetensorError, ValidationError) as error:
        raise UserError(f"{path}: not a whole ropewalk session: {str(error).splitlines()[0]}") from None
    if tokens.dtype != np.int32 or state.dtype != np.uint8 or _digest(tokens, state) != facts.get("digest"):
        raise UserError(f"{path}: the session is damaged (its digest does not match)")
    if len(tokens) > llm.n_ctx():
        raise UserError(f"{path}: {len(tokens):,} tokens are more than the context of {llm.n_ctx():,}")
    llm.restore(tokens, state, band)


def model_key(llm: Llama) -> str:
    """What tells one model's sessions from another's: its description, vocabulary, layers and file size."""
    parts = [Path(llm.model_path).stat().st_size, llm.n_vocab(), llm.n_embd(), llama_cpp.llama_model_n_layer(llm.model)]
    names = [llm.metadata.get(key, "") for key in ("general.architecture", "general.name", "general.file_type")]
    return hashlib.sha256(repr((parts, names)).encode()).hexdigest()[:16]


def _digest(tokens: np.ndarray, state: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(tokens).data)
    digest.update(np.ascontiguousarray(state).data)
    return digest.hexdigest()
