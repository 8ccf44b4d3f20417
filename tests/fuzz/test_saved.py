"""Saved sequences, kept prompts and conversations with anything in them: taken up, read again, or refused in one line.

Sequences are loaded in a child process, where an abort of llama.cpp is a fault. Half of them have the right digest for
what is in them, as a hostile file would; a folder of prompts is refused where others might put one.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from children import Child
from fuzzing import changed, changed_bytes, check_line, rounds, write_json
from pydantic import ValidationError
from ropewalk import Llama
from ropewalk.errors import UserError
from ropewalk.runtime import session
from ropewalk.runtime.chat import Conversation, Transcript, read_saved
from ropewalk.runtime.chat.conversation import RECORD, _digest, _Record
from ropewalk.runtime.chat.template import Message
from ropewalk.runtime.prompt_cache import PromptCache, PromptFolder
from safetensors import safe_open


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "m.gguf", context_length=1024)


@pytest.fixture(scope="module")
def llm(model: Path) -> Llama:
    return Llama(model, n_ctx=1024, n_threads=1, verbose=False)


# --- sequences


def changed_sequence(path: Path, rng: random.Random) -> bytes:
    """Return the bytes of a saved sequence with something in its head or in its numbers changed."""
    data = path.read_bytes()
    if rng.random() < 0.3:
        return changed_bytes(data, rng, within=rng.choice((8, 600, len(data))))
    length = int.from_bytes(data[:8], "little")
    head, numbers = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    if rng.random() < 0.5:
        head = changed(head, rng)
    for _ in range(rng.choice((0, 1, 1, 5))):
        at = rng.randrange(min(len(numbers), rng.choice((300, 8000, len(numbers)))))
        numbers[at : at + 4] = rng.choice((b"\xff\xff\xff\x7f", bytes(4), rng.randbytes(4), b"\0\0\xc0\x7f"))
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + bytes(numbers)


def set_right_digest(path: Path) -> None:
    """Write the digest that a damaged file's numbers have into its head, if it has one."""
    try:
        with safe_open(path, framework="numpy") as file:
            old, new = file.metadata()["digest"], session._digest(file.get_tensor("tokens"), file.get_tensor("state"))
        path.write_bytes(path.read_bytes().replace(str(old).encode(), new.encode()))
    except Exception:
        return  # nothing to sign


def test_sequences(llm: Llama, model: Path, tmp_path: Path) -> None:
    llm.reset()
    llm.eval(llm.tokenize(b"the rope in the rain"))
    session.save(llm, tmp_path / "sound.safetensors")
    _load_odd(
        model, tmp_path / "sound.safetensors", tmp_path / "odd.safetensors", tmp_path / "odd.safetensors", signed=0.5
    )


def test_kept_prompts(llm: Llama, model: Path, tmp_path: Path) -> None:
    """A damaged prompt is read again, whatever is wrong with it."""
    llm.reset()
    tokens = llm.tokenize(b"the rope " * 200)[:700]
    PromptCache(llm, PromptFolder(tmp_path / "kept", 1 << 30)).read(tokens)
    (entry,) = (tmp_path / "kept").iterdir()
    shutil.copy(entry, tmp_path / "sound.safetensors")
    ends = _load_odd(model, tmp_path / "sound.safetensors", entry, tmp_path / "kept", signed=0)
    assert set(ends) == {"ran"}


def _load_odd(model: Path, sound: Path, odd: Path, loaded: Path, signed: float) -> dict[str, int]:
    ends: dict[str, int] = {}
    with Child("sequence", str(model)) as child:
        shutil.copy(sound, odd)
        assert child.load(loaded) == ("ran", "")
        for rng in rounds(2):
            odd.write_bytes(changed_sequence(sound, rng))
            if rng.random() < signed:
                set_right_digest(odd)
            how, text = child.load(loaded)
            ends[how] = ends.get(how, 0) + 1
            assert how in ("ran", "refused"), text
            if how == "refused":
                check_line(UserError(text))
    return ends


# --- conversations


def test_conversations(llm: Llama, tmp_path: Path) -> None:
    messages = (Message("user", "a: the text\n\nWhat?", 11), Message("assistant", "That."), Message("user", "And?"))
    conversation = Conversation(llm)
    conversation.transcript = Transcript(system="Be short.", messages=messages, pending=("b: more",))
    conversation.save(tmp_path / "sound", with_cache=False)
    sound, taken = (tmp_path / "sound" / RECORD).read_bytes(), 0
    place = tmp_path / "odd"
    place.mkdir()
    for rng in rounds(2):
        if rng.random() < 0.3:
            (place / RECORD).write_bytes(changed_bytes(sound, rng))
        else:
            write_json(place / RECORD, _signed(changed(json.loads(sound), rng)))
        try:
            read_saved(place)
            conversation.load(place)
            taken += 1
            conversation.transcript.without_last()
            conversation.save(tmp_path / "again", with_cache=False)
            assert read_saved(tmp_path / "again").transcript == conversation.transcript
        except UserError as error:
            check_line(error)
    assert taken


def _signed(record: object) -> object:
    """A conversation's record with the digest of what is in it."""
    try:
        return {**record, "digest": _digest(_Record.model_validate_json(json.dumps(record)).transcript)}  # type: ignore[dict-item]
    except (ValidationError, TypeError, ValueError):
        return record


def test_a_sound_sequence_is_the_one_that_was_saved(llm: Llama, tmp_path: Path) -> None:
    """What the changes above are made to is loaded, and gives the same logits."""
    llm.reset()
    tokens = llm.tokenize(b"the rope in the rain")
    llm.eval(tokens)
    session.save(llm, tmp_path / "sound.safetensors")
    llm.eval([5])
    expected = np.array(llm._logits(1))
    llm.reset()
    session.load(llm, tmp_path / "sound.safetensors")
    llm.eval([5])
    assert np.array_equal(llm._logits(1), expected)
