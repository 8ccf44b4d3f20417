"""Files at which llama.cpp would abort, or the memory plan would stumble: one line each, before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from ropewalk import Llama, UserError
from ropewalk.container import read_header
from ropewalk.runtime import plan_memory
from ropewalk.runtime.loading import check_loadable

KINDS = gguf.GGUFValueType
U32, I32, F32, TEXT, LIST = KINDS.UINT32, KINDS.INT32, KINDS.FLOAT32, KINDS.STRING, KINDS.ARRAY
NAN, INFINITY = float("nan"), float("inf")
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *tiny_models.PIECES]

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Write a tiny model in which some keys have other values (or, with None, are missing)."""

    def make(changes: dict[str, tuple[Any, gguf.GGUFValueType] | None], arch: str = "llama") -> Path:
        changes = {key.replace("ARCH", arch): value for key, value in changes.items()}
        add = gguf.GGUFWriter.add_key_value

        def add_changed(self: Any, key: str, value: Any, kind: Any, sub_type: Any = None) -> None:
            changed = changes.get(key, (value, kind))
            if changed is not None:
                add(self, key, changed[0], changed[1], sub_type if key not in changes else None)

        def extend(writer: gguf.GGUFWriter) -> None:
            for key, value in changes.items():
                if value is not None and not any(key in keys for keys in writer.kv_data):
                    add(writer, key, *value)

        with monkeypatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "add_key_value", add_changed)
            return tiny_models.tiny_llama(tmp_path / "m.gguf", arch=arch, n_embd=128, extend=extend)

    return make


@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "embedding_length", "attention.key_length"])
@pytest.mark.parametrize(
    "value",
    [
        (2**31 - 1, U32),
        (-1, I32),
        ("x", TEXT),
        ("", TEXT),
        (NAN, F32),
        (INFINITY, F32),
        (2.5, F32),
        (True, KINDS.BOOL),
        ([2, 2, 2], LIST),
        ([NAN, 1.0], LIST),
        (["a", "b"], LIST),
        ([-1, -1], LIST),
    ],
    ids=str,
)
def test_sizes_of_any_kind_are_refused_in_one_line(make: Make, key: str, value: Any) -> None:
    header = read_header(make({f"ARCH.{key}": value}))
    started = time.perf_counter()
    with pytest.raises(UserError, match=rf"m\.gguf: llama\.{key}: .*expected ") as caught:
        plan_memory(header, 256, "f16")
    assert "\n" not in str(caught.value) and time.perf_counter() - started < 1


@pytest.mark.parametrize("key", ["attention.head_count_kv", "feed_forward_length"])
@pytest.mark.parametrize("value", [("x", TEXT), (NAN, F32), ([1], LIST), (["a", "b"], LIST), (-1, I32)], ids=str)
def test_sizes_per_layer_as_well(make: Make, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"llama\.{key}: .*expected "):
        plan_memory(read_header(make({f"ARCH.{key}": value})), 256, "f16")


def test_one_number_for_each_layer_is_taken(make: Make) -> None:
    lists = {"ARCH.attention.head_count": ([2, 2], LIST), "ARCH.attention.head_count_kv": ([1, 1], LIST)}
    path = make({**lists, "ARCH.feed_forward_length": ([256, 256], LIST)})
    plain = plan_memory(read_header(make({})), 256, "f16")
    path = make({**lists, "ARCH.feed_forward_length": ([256, 256], LIST)})
    assert plan_memory(read_header(path), 256, "f16").cache_bytes == plain.cache_bytes


ABORTS: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"ARCH.attention.layer_norm_rms_epsilon": (-1.0, F32)},
        "layer_norm_rms_epsilon: -1, expected at least 0",
    ),
    ("llama", {"ARCH.attention.layer_norm_rms_epsilon": (NAN, F32)}, "layer_norm_rms_epsilon: nan"),
    ("llama", {"ARCH.attention.layer_norm_epsilon": (-1e-5, F32)}, "layer_norm_epsilon: -1e-05"),
    ("llama", {"ARCH.block_count": (0, U32)}, "block_count: 0, expected a whole number from 1 to 512"),
    ("llama", {"ARCH.block_count": (513, U32)}, "block_count: 513"),
    ("llama", {"ARCH.nextn_predict_layers": (3, U32)}, "nextn_predict_layers: 3, expected at most 2"),
    ("llama", {"ARCH.expert_count": (4, U32)}, "expert_used_count: 0, expected 1 to 4"),
    ("llama", {"ARCH.expert_used_count": (2, U32)}, "expert_used_count: 2, expected 0"),
    ("llama", {"ARCH.expert_count": (4, U32), "ARCH.expert_used_count": (8, U32)}, "expert_used_count: 8"),
    ("llama", {"ARCH.expert_count": (9999, U32), "ARCH.expert_used_count": (8, U32)}, "expert_count: 9999"),
    (
        "llama",
        {"ARCH.expert_count": (4, U32), "ARCH.expert_used_count": (2, U32), "ARCH.expert_group_count": (3, U32)},
        "expert_group_count: 3, expected a divisor of 4",
    ),
    (
        "llama",
        {"ARCH.expert_count": (4, U32), "ARCH.expert_used_count": (2, U32), "ARCH.expert_group_count": (2, U32)},
        "expert_group_used_count: 0, expected 1 to 1",
    ),
    ("qwen2", {"ARCH.rope.dimension_count": (32, U32)}, "qwen2.rope.dimension_count: 32, expected the head size, 64"),
    ("qwen2", {"ARCH.attention.value_length": (32, U32)}, "value_length: 32, expected the key's, 64"),
    ("qwen2", {"ARCH.attention.key_length": (2, U32)}, "dimension_count: 64, expected the head size, 2"),
    ("phi3", {"ARCH.attention.key_length": (72, U32)}, "value_length: 64, expected the key's, 72"),
    ("phi3", {"ARCH.rope.dimension_count": (128, U32)}, "dimension_count: 128, expected at most the head size, 64"),
    ("gemma3", {"ARCH.rope.dimension_count": (66, U32)}, "dimension_count: 66, expected at most the head size, 64"),
    ("llama", {"tokenizer.ggml.model": ("none", TEXT)}, "tokenizer.ggml.model: 'none', expected"),
    ("llama", {"tokenizer.ggml.model": ("no_vocab", TEXT)}, "tokenizer.ggml.model: 'no_vocab', expected"),
    ("llama", {"tokenizer.ggml.model": ("bert", TEXT)}, "expected a byte like '<0x0A>'"),
    ("llama", {"tokenizer.ggml.tokens": ([*TOKENS[:-1], "<s>"], LIST)}, "'<s>' appears twice"),
    ("llama", {"tokenizer.ggml.tokens": ([*TOKENS[:9], "<", *TOKENS[10:]], LIST)}, "9: '<', expected a byte"),
    ("llama", {"tokenizer.ggml.token_type": ([1] * 5, LIST)}, "5 types, expected one for each of 295 tokens"),
    ("llama", {"tokenizer.ggml.scores": ([0.0] * 5, LIST)}, "scores"),
    ("llama", {"tokenizer.ggml.tokens": (TOKENS[:-3], LIST)}, "token_embd.weight"),
]


@pytest.mark.parametrize("arch, changes, message", ABORTS, ids=[message for _, _, message in ABORTS])
def test_what_llama_cpp_aborts_at_is_refused(make: Make, arch: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Llama(make(changes, arch), n_ctx=100, verbose=False)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_vocabulary_without_the_token_that_it_adds(make: Make) -> None:
    path = make(
        {
            "tokenizer.ggml.model": ("gpt2", TEXT),
            "tokenizer.ggml.pre": ("default", TEXT),
            "tokenizer.ggml.merges": (["t h"], LIST),
            "tokenizer.ggml.tokens": (["t", "h", "th"], LIST),
            "tokenizer.ggml.token_type": ([1, 1, 1], LIST),
            "tokenizer.ggml.bos_token_id": None,
            "tokenizer.ggml.eos_token_id": None,
            "tokenizer.ggml.add_bos_token": (True, KINDS.BOOL),
        }
    )
    with pytest.raises(UserError, match="bos_token_id: missing"):
        Llama(path, vocab_only=True, n_ctx=1, verbose=False)


@pytest.mark.parametrize("kept", [(), ("q", "v")])
def test_a_layer_without_attention(make: Make, tmp_path: Path, kept: tuple[str, ...]) -> None:
    """phi3's loader takes it, and its graph reads from a null pointer."""
    path = make({}, "phi3")
    data = path.read_bytes()
    for name in "qkv":
        if name not in kept:
            data = data.replace(f"blk.1.attn_{name}.weight".encode(), f"blk.1.none_{name}.weight".encode())
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"blk\.1\.attn_qkv\.weight: missing"):
        check_loadable(read_header(path))
    check_loadable(read_header(make({}, "phi3")))


def test_a_text_takes_no_more_memory_than_it_has_tokens(make: Make) -> None:
    llm = Llama(make({"ARCH.context_length": (2**31 - 1, U32)}), n_ctx=100, verbose=False)
    started = time.perf_counter()
    assert llm.detokenize(llm.tokenize(b"the rope" * 99)).strip() == b"the rope" * 99
    assert time.perf_counter() - started < 1
    assert llm.tokenize(b"", add_bos=True) == [1] and llm.tokenize(b"", add_bos=False) == []


def test_texts_that_a_vocabulary_without_all_bytes_cannot_spell(make: Make) -> None:
    tokens = ["zqxjkv" if token == "<0xC3>" else token for token in TOKENS]
    llm = Llama(make({"tokenizer.ggml.tokens": (tokens, LIST)}), n_ctx=100, verbose=False)
    assert llm.detokenize(llm.tokenize("the rope 你".encode())).decode().strip() == "the rope 你"
    with pytest.raises(UserError, match=r"m\.gguf: its vocabulary has no token for '\\xe9'"):
        llm.tokenize("a rop\u00e9".encode())


def test_texts_that_a_vocabulary_without_unknown_tokens_cannot_spell(make: Make) -> None:
    changes = {"tokenizer.ggml.model": ("rwkv", TEXT), "tokenizer.ggml.unknown_token_id": None}
    llm = Llama(make(changes), n_ctx=100, verbose=False)
    with pytest.raises(UserError, match="no token for a part of the text"):
        llm.tokenize("the rope 你".encode())


@pytest.mark.parametrize("tokens", [[-1], [5, len(TOKENS)]])
def test_tokens_outside_the_vocabulary_have_no_text(make: Make, tokens: list[int]) -> None:
    llm = Llama(make({}), n_ctx=100, verbose=False)
    with pytest.raises(UserError, match="expected 0 to 294"):
        llm.detokenize(tokens)


def test_a_wrong_adapter(make: Make, tmp_path: Path) -> None:
    model = make({})
    with pytest.raises(UserError, match=r"lora_path: .*general\.type: None, expected 'adapter'"):
        Llama(model, n_ctx=100, lora_path=str(model), verbose=False)
    (tmp_path / "adapter.bin").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"adapter\.bin: starts with"):
        Llama(model, n_ctx=100, lora_path=tmp_path / "adapter.bin", verbose=False)
    for arch, reason in (("qwen2", "an adapter for architecture 'qwen2'"), ("llama", "does not exist in base model")):
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", arch)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        for half in "ab":
            writer.add_tensor(f"blk.7.attn_q.weight.lora_{half}", np.ones((4, 4), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=reason):
            Llama(model, n_ctx=100, lora_path=str(tmp_path / "a.gguf"), verbose=False)


def test_real_models_pass(smollm2: Path, make: Make) -> None:
    for path in (smollm2, make({}), make({}, "qwen2")):
        check_loadable(read_header(path))


def test_a_sound_adapter_is_taken_from_any_path(make: Make, tmp_path: Path) -> None:
    model, path = make({}), tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for half, shape in (("a", (4, 128)), ("b", (128, 4))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{half}", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain, adapted = (Llama(model, n_ctx=100, lora_path=adapter, verbose=False) for adapter in (None, path))
    weaker = Llama(model, n_ctx=100, lora_path=str(path), lora_scale=0.5, verbose=False)
    for llm in (plain, adapted, weaker):
        llm.eval([5, 6, 7])
    assert len({plain.weights_key, adapted.weights_key, weaker.weights_key}) == 3
    assert not np.allclose(plain._logits(1), adapted._logits(1))
