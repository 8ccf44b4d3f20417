"""GGUF heads with anything in them: read, planned for, extended and checked, or refused in one line.

Here nothing of llama.cpp runs; `test_gguf_loads` has what is loaded.
"""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np
from fuzzing import check_line, rounds
from ropewalk.container import freq_scale, plain_context, read_header, schedule_of, trained_schedule, what_stock_does
from ropewalk.convert import embed_schedule, plan_extension
from ropewalk.errors import UserError
from ropewalk.factors import METHODS, read_schedule
from ropewalk.runtime import choose_kv
from ropewalk.runtime.loading import check_loadable

T = gguf.GGUFValueType
NUMBERS = (
    *((T.FLOAT32, value) for value in (float("nan"), float("inf"), 3e38, -1.0, 1e-45, 0.0, 0.5, 4.0, 1e9)),
    *((T.FLOAT64, value) for value in (1e308, -1e308, 5e-324, 1e300)),
    *((T.UINT32, value) for value in (0, 1, 2, 3, 64, 2**31 - 1, 2**32 - 1)),
    (T.UINT64, 2**64 - 1),
    (T.INT64, -(2**63)),
    (T.INT64, 2**63 - 1),
    (T.INT32, -1),
    (T.UINT8, 255),
    (T.BOOL, True),
    (T.BOOL, False),
)
WORDS = ("", "x", "yarn", "longrope", "linear", "none", "\x1b[31m", "\u202e", "9" * 500)
TEXTS = tuple((T.STRING, word) for word in WORDS)
VALUES = (*NUMBERS, *TEXTS)
ARRAYS = ([1, 2], [0], [2.5], ["a"], [True], [-1], [2**31 - 1], [0] * 3000)

ARCHITECTURES = "llama phi3 grok mistral3 deepseek2 granite qwen2 gemma3 minicpm mamba x".split()  # noqa: SIM905
KEYS = """
    rope.freq_base rope.dimension_count context_length embedding_length feed_forward_length block_count vocab_size
    attention.head_count attention.head_count_kv attention.key_length attention.value_length attention.sliding_window
    attention.layer_norm_rms_epsilon attention.temperature_scale expert_count expert_used_count
    rope.scaling.type rope.scaling.factor rope.scale_linear rope.scaling.original_context_length
    rope.scaling.attn_factor rope.scaling.finetuned rope.scaling.alpha rope.scaling.yarn_ext_factor
    rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    rope.scaling.yarn_log_multiplier
""".split()  # noqa: SIM905
GENERAL = ("split.no", "split.count", "split.tensors.count", "general.type", "general.name", "tokenizer.ggml.model")
SCHEDULE = {
    "format_version": (T.UINT32, 2),
    "band_count": (T.UINT32, 1),
    "facts.n_rot": (T.UINT32, 32),
    "facts.freq_base": (T.FLOAT64, 10000.0),
    "facts.original_context": (T.UINT32, 256),
    "facts.native_attention_factor": (T.FLOAT64, 1.0),
    "band.0.context": (T.UINT32, 256),
    "band.0.near_tokens": (T.UINT32, 8),
    "band.0.start_tokens": (T.UINT32, 0),
    "band.0.attention_factor": (T.FLOAT64, 1.0),
    "band.0.found.method": (T.STRING, "x"),
    "band.0.found.seed": (T.INT64, 1),
}
PLAIN = {f"band.0.plain.{name}": SCHEDULE[f"band.0.{name}"] for name in ("context", "start_tokens", "attention_factor")}


def write_odd(path: Path, rng: random.Random) -> None:
    """A small model's head in which some values are anything."""
    arch = rng.choice(ARCHITECTURES)
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "context_length": (T.UINT32, 256),
        "embedding_length": (T.UINT32, 64),
        "attention.head_count": (T.UINT32, 2),
        "block_count": (T.UINT32, 2),
    }
    arrays = {}
    for _ in range(rng.randint(1, 5)):
        key = rng.choice(KEYS)
        if rng.random() < 0.1:
            arrays[key] = rng.choice(ARRAYS)
            values.pop(key, None)
        elif key not in arrays:
            values[key] = rng.choice(VALUES)
    for key, (kind, value) in values.items():
        writer.add_key_value(f"{arch}.{key}", value, kind)
    for key, array in arrays.items():
        writer.add_array(f"{arch}.{key}", array)
    for key in GENERAL:
        if rng.random() < 0.05:
            kind, value = rng.choice(VALUES)
            writer.add_key_value(key, value, kind)
    if rng.random() < 0.3:
        _add_schedule(writer, rng)
    if rng.random() < 0.3:
        name = rng.choice(("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"))
        writer.add_tensor(name, np.array(_factors(rng), dtype=np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_schedule(writer: gguf.GGUFWriter, rng: random.Random) -> None:
    has_plain = rng.random() < 0.3
    for key, right in (SCHEDULE | PLAIN if has_plain else SCHEDULE).items():
        kind, value = right if rng.random() < 0.9 else rng.choice(VALUES)
        writer.add_key_value(f"ropewalk.{key}", value, kind)
    for name in ("band.0.rescale_factors", *(["band.0.plain.rescale_factors"] if has_plain else [])):
        writer.add_key_value(f"ropewalk.{name}", _factors(rng), T.ARRAY, sub_type=T.FLOAT64)


def _factors(rng: random.Random) -> list[float]:
    return [rng.choice((1.0, 2.0, 0.0, 1e38, float("nan"))) if rng.random() < 0.05 else 1.5 for _ in range(16)]


def use(path: Path, rng: random.Random) -> None:
    """What the commands do with a file, up to loading it."""
    header = read_header(path)
    schedule = schedule_of(header)
    what_stock_does(header)
    trained_schedule(header)
    freq_scale(header)
    plain_context(header)
    check_loadable(header)
    choose_kv(header, min(schedule.context, 1 << 20), rng.choice(("auto", "f16", "q8_0")))
    plan = plan_extension(header, min(schedule.context * 2, 1 << 22), rng.choice(tuple(METHODS)))
    embed_schedule(path, path.with_name("out.gguf"), plan.schedule, force=True)
    schedule_of(read_header(path.with_name("out.gguf")))


def test_odd_values_in_a_head(tmp_path: Path) -> None:
    ends = {"used": 0, "refused": 0}
    for rng in rounds(3):
        write_odd(tmp_path / "in.gguf", rng)
        try:
            use(tmp_path / "in.gguf", rng)
            ends["used"] += 1
        except UserError as error:
            check_line(error)
            assert str(error).isprintable()
            ends["refused"] += 1
    assert min(ends.values()) > 0, ends


def test_bytes_that_are_changed_or_missing(tiny_llama, tmp_path: Path) -> None:
    whole = tiny_llama(tmp_path / "whole.gguf").read_bytes()
    head = whole[: 64 << 10]
    path = tmp_path / "in.gguf"
    for rng in rounds(2):
        data = bytearray(whole)
        for _ in range(rng.randint(0, 4)):
            data[rng.randrange(min(len(head), 4096))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        try:
            use(path, rng)
        except UserError as error:
            check_line(error)


def test_odd_schedules(tmp_path: Path) -> None:
    odd = ["NaN", "Infinity", "1e999", "9" * 400, "-1", "0", "null", "true", '"x"', '"\\ud800"', "[]", "{}", "[" * 999]
    text = (
        '{"facts": {"n_rot": 8, "freq_base": 10000.0, "original_context": 256}, "bands": [{"context": 256,'
        ' "rescale_factors": [1, 1, 1, 1], "start_tokens": 0, "attention_factor": 1.0, "found": {"method": "yarn"}}]}'
    )
    path = tmp_path / "schedule.json"
    for rng in rounds(2):
        changed = text
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(changed))
            changed = changed[:at] + rng.choice((*odd, "", ",", "}", ":")) + changed[at + rng.randint(0, 8) :]
        path.write_text(changed, encoding="utf-8", errors="surrogatepass")
        try:
            read_schedule(path)
        except UserError as error:
            check_line(error)
