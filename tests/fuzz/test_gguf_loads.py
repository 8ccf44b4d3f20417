"""GGUF files with anything in their heads, loaded and run in a child process: they run, or are refused in one line.

That llama.cpp aborts is a fault: a check has to refuse the file before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_checkpoints as tc
from children import Child
from fuzzing import MINUTES, changed_bytes, check_line, rounds
from ropewalk.convert import convert_checkpoint
from ropewalk.errors import UserError

T = gguf.GGUFValueType
NUMBERS = (0, 1, 2, 3, 5, 16, 32, 63, 64, 128, 255, 2**16, 2**31 - 1, 2**32 - 1, -1, 0.0, 1e-45, 0.5, 4.0, -1.0, 3e38)
WORDS = ("", "x", "yarn", "linear", "longrope", "none", "llama", "gpt2", "bert", "t5", "rwkv", "default", "9" * 500)
TOKENS = ("", "▁", "<0x41>", "<0x", "a", "<s>", "\ufffd", "x" * 300, " ", "\0")
KEYS = (
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"),
    *("rope.scaling.original_context_length", "attention.key_length", "attention.value_length", "vocab_size"),
    *("attention.sliding_window", "attention.causal", "pooling_type", "expert_count", "expert_used_count"),
    *("nextn_predict_layers", "leading_dense_block_count", "expert_feed_forward_length", "attention.scale"),
    *("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "residual_scale", "embedding_scale"),
    *("expert_weights_scale", "expert_gating_func", "attention.clamp_kqv", "rope.dimension_sections"),
)
SPECIAL = tuple(f"tokenizer.ggml.{name}_token_id" for name in "bos eos eot eom unknown seperator padding mask".split())  # noqa: SIM905
FLAGS = tuple(f"tokenizer.ggml.add_{name}" for name in ("bos_token", "eos_token", "sep_token", "space_prefix"))
CASES = ("mixtral", "gemma3", "phi3-longrope")


@dataclass(frozen=True)
class Contents:
    """A file's metadata as (value, type, type of items), and tensors as (numbers, type), by name."""

    values: dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]
    tensors: dict[str, tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]]


def read(path: Path) -> Contents:
    reader = gguf.GGUFReader(path)
    values = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            values[name] = (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    return Contents(values, {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors})


def write(path: Path, contents: Contents) -> None:
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    for name, (value, kind, item) in contents.values.items():
        writer.add_key_value(name, value, kind, item)
    for name, (data, tensor_type) in contents.tensors.items():
        writer.add_tensor(name, data, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_odd(path: Path, sound: Contents, rng: random.Random) -> None:
    """Write a sound file's contents with a few changes."""
    contents = Contents(dict(sound.values), dict(sound.tensors))
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.85:
            _change_value(contents.values, rng)
        else:
            _change_tensor(contents.tensors, rng)
    write(path, contents)
    if rng.random() < 0.1:
        path.write_bytes(changed_bytes(path.read_bytes(), rng, within=4096))


def _change_value(values: dict[str, Any], rng: random.Random) -> None:
    arch = values["general.architecture"][0] if "general.architecture" in values else ""
    name = rng.choice((*values, *SPECIAL, *FLAGS, *(f"{arch}.{key}" for key in KEYS)))
    kind = rng.random()
    if name in values and kind < 0.1:
        del values[name]
    elif name in values and values[name][1] == T.ARRAY and kind < 0.9:
        value, _, item = values[name]
        values[name] = (_changed_list(value, rng), T.ARRAY, item)
    else:
        values[name] = _odd(name, rng)


def _changed_list(items: list[Any], rng: random.Random) -> list[Any]:
    items, kind = list(items), rng.random()
    if not items or kind < 0.2:
        return items + items[:1] or [0]
    if kind < 0.4:
        return items[: rng.randrange(1, len(items) + 1)]
    for _ in range(rng.choice((1, 3, 100))):
        odd = TOKENS if isinstance(items[0], str) else (-1e30, 0.5) if isinstance(items[0], float) else range(1, 8)
        items[rng.randrange(len(items))] = rng.choice((rng.choice(items), rng.choice(odd)))
    return items


def _odd(name: str, rng: random.Random) -> tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]:
    if name in FLAGS or rng.random() < 0.05:
        return rng.random() < 0.8, T.BOOL, None
    if "type" in name or ("tokenizer" in name and name not in SPECIAL) or rng.random() < 0.1:
        return rng.choice(WORDS), T.STRING, None
    number = rng.choice(NUMBERS)
    if rng.random() < 0.1:
        return [number] * rng.randint(1, 9), T.ARRAY, T.FLOAT32 if isinstance(number, float) else T.INT64
    if isinstance(number, float):
        return number, T.FLOAT32, None
    return number, T.UINT32 if number >= 0 else T.INT32, None


def _change_tensor(tensors: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    data, kind = tensors.pop(name)
    change = rng.randrange(5)
    if change == 0:
        tensors[rng.choice((f"{name}x", "rope_freqs.weight", name.replace("weight", "bias")))] = (data, kind)
    elif change == 1 and data.ndim:
        tensors[name] = (np.ascontiguousarray(data[: max(1, len(data) // 2)]), kind)
    elif change == 2 and data.ndim > 1 and kind == gguf.GGMLQuantizationType.F32:
        tensors[name] = (np.ascontiguousarray(data.T), kind)
    elif change == 3:
        odd = data.view(np.uint8).copy()
        odd.flat[:4] = 255
        tensors[name] = (odd.view(data.dtype), kind)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> list[Contents]:
    """The contents of files that run, of several architectures."""
    place = tmp_path_factory.mktemp("sound")
    files = [tiny_llama(place / f"tiny-{arch}.gguf", arch=arch) for arch in ("llama", "qwen2")]
    for case in tc.CASES:
        if (case.name in CASES or (MINUTES and isinstance(case.tokeniser, tc.SentencePiece))) and case.can_be_made():
            files.append(place / f"{case.name}.gguf")
            convert_checkpoint(tc.write_checkpoint(case, place), files[-1])
    return [read(path) for path in files]


def test_loading(sound: list[Contents], tmp_path: Path) -> None:
    ends = dict.fromkeys(("ran", "refused", "failed", "died"), 0)
    with Child("model") as child:
        for contents in sound:
            write(tmp_path / "in.gguf", contents)
            assert child.load(tmp_path / "in.gguf") == ("ran", "")
        for rng in rounds(4):
            write_odd(tmp_path / "in.gguf", rng.choice(sound), rng)
            how, text = child.load(tmp_path / "in.gguf")
            ends[how] += 1
            assert how in ("ran", "refused"), text
            if how == "refused":
                check_line(UserError(text))
    assert ends["ran"] and ends["refused"], ends
