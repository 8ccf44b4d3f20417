"""Files that are not a model that runs are called what they are; tensor types are those of the installed engine."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from llama_cpp._ctypes_extensions import load_shared_library
from ropewalk.container import GGUFError, read_header, schedule_of, type_name, what_stock_does
from ropewalk.container.kinds import check_has_tensors
from ropewalk.container.tensor_types import TENSOR_TYPES

TinyLlama = Callable[..., Path]
Writer = gguf.GGUFWriter


def test_types_are_those_of_the_installed_ggml() -> None:
    import llama_cpp

    ggml = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
    ggml.ggml_type_name.restype, ggml.ggml_type_size.restype = ctypes.c_char_p, ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_name.argtypes = ggml.ggml_type_size.argtypes = ggml.ggml_blck_size.argtypes = [ctypes.c_int]
    known = {
        kind: (ggml.ggml_type_name(kind).decode().upper(), ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind))
        for kind in range(min(max(TENSOR_TYPES) + 1, llama_cpp.GGML_TYPE_COUNT))
        if (ggml.ggml_type_name(kind) or b"NONE") != b"NONE" and ggml.ggml_blck_size(kind)
    }
    assert len(known) > 30
    assert known == {kind: (name.upper(), *sizes) for kind, (name, *sizes) in TENSOR_TYPES.items() if kind in known}
    assert type_name(42) == "Q2_0" and type_name(99) == "type 99"


def test_a_type_that_gguf_does_not_know_yet(tmp_path: Path) -> None:
    name = b"blk.0.ffn_up.weight"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    head += struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 64, 3, 42, 0)
    (tmp_path / "m.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(64))
    assert read_header(tmp_path / "m.gguf").tensors[0].n_bytes == 3 * 18


@pytest.mark.parametrize(
    ("kind", "arch", "message"),
    [
        ("adapter", "llama", "is a LoRA adapter, expected a model"),
        ("imatrix", "llama", "is an importance matrix"),
        ("mmproj", "clip", "is a multimodal projector"),
        ("model", "clip", "is a multimodal projector"),
        ("model", "controlvector", "is a control vector"),
    ],
)
def test_what_is_not_a_model(tiny_llama: TinyLlama, tmp_path: Path, kind: str, arch: str, message: str) -> None:
    path = tiny_llama(tmp_path / "m.gguf", arch=arch, extend=lambda writer: writer.add_type(kind))
    with pytest.raises(GGUFError, match=message) as caught:
        schedule_of(read_header(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_an_importance_matrix_without_an_architecture(tmp_path: Path) -> None:
    """As llama-imatrix writes it."""
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(GGUFError, match="is an importance matrix"):
        schedule_of(read_header(tmp_path / "imatrix.gguf"))


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=r"vocab.gguf: has a vocabulary and no tensors, expected a whole model"):
        check_has_tensors(read_header(tmp_path / "vocab.gguf"))


def test_an_architecture_that_llama_cpp_does_not_know(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    header = read_header(tiny_llama(tmp_path / "m.gguf", arch="llama9000"))
    assert what_stock_does(header) == ["does not know the architecture 'llama9000' (as of llama-cpp-python 0.3.36)."]
