"""Reading a checkpoint's folder: every way in which it can be incomplete, broken or hostile is a one-line error."""

import json
import pickle
import re
import struct

import pytest
import torch
from ropewalk.convert.checkpoint import open_checkpoint, read_config
from ropewalk.errors import UserError
from safetensors.torch import save_file

A, B = torch.arange(6, dtype=torch.float32).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)


def refused(folder, message):
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


def raw_safetensors(path, header, data=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def test_one_file_several_and_bin(tmp_path):
    single, sharded, pickled, legacy = (tmp_path / name for name in ("single", "sharded", "pickled", "legacy"))
    for folder in (single, sharded, pickled, legacy):
        folder.mkdir()
    save_file({"a": A, "b": B}, single / "model.safetensors")
    save_file({"a": A}, sharded / "model-00001-of-00002.safetensors")
    save_file({"b": B}, sharded / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"a": A, "b": B}, pickled / "pytorch_model.bin")
    torch.save({"a": A, "b": B}, legacy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for folder in (single, sharded, pickled, legacy):
        checkpoint = open_checkpoint(folder)
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.tensors["a"].shape == (2, 3) and checkpoint.tensors["b"].dtype == torch.bfloat16
        assert torch.equal(checkpoint.read("a"), A) and torch.equal(checkpoint.read("b"), B)


def test_what_is_missing_is_named(tmp_path):
    refused(tmp_path, "no weights, expected model.*safetensors or pytorch_model.*bin")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    save_file({"a": A}, tmp_path / "one.safetensors")
    refused(tmp_path, r"two.safetensors: missing, although model.safetensors.index.json names it for 1 of the tensors")
    save_file({"a": A}, tmp_path / "two.safetensors")
    refused(tmp_path, "two.safetensors: a: is also in one.safetensors")
    (tmp_path / "two.safetensors").unlink()
    index.unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "a LoRA adapter alone, expected the model with it merged")
    with pytest.raises(UserError, match="a LoRA adapter alone"):
        read_config(tmp_path)


def test_an_index_that_is_out_of_date_is_noted(tmp_path):
    """What the model needs is checked later; a list of names alone never stops it."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    save_file({"a": A, "c": A + 1, "d": B}, tmp_path / "one.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a", "c", "d"]
    assert checkpoint.notes == (
        "model.safetensors.index.json: out of date: b in no shard",
        "model.safetensors.index.json: out of date: c and 1 more not in the index",
    )
    save_file({"a": A}, tmp_path / "model.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a"] and checkpoint.tensors["a"].shard.name == "model.safetensors"
    assert checkpoint.notes == ("model.safetensors.index.json: ignored, as all weights are in model.safetensors",)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "list, expected a JSON object"),
        ("{}", "weight_map: missing or not a map"),
        ('{"weight_map": {"a": 3}}', "weight_map: missing or not a map"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "expected the name of a file beside it"),
        ('{"weight_map": {"a": "a\\nb"}}', "expected the name of a file beside it"),
        ('{"weight_map": {"a": "\\ud800"}}', "expected the name of a file beside it"),
        ('{"weight_map": {"a": "' + "é" * 200 + '"}}', "expected the name of a file beside it"),
        ("[" * 100_000, "not a JSON file"),
    ],
)
def test_an_invalid_index(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, message)


def entry(start, end, shape=(2, 3), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"[]",
        {"a": entry(0, 48)},  # beyond the file
        {"a": entry(0, 24), "b": entry(12, 36)},  # overlapping
        {"a": entry(0, 20)},  # fewer bytes than its shape has
        {"a": entry(0, 24, shape=(1 << 40, 1 << 40))},
        {"a": entry(24, 0)},
        {"a": entry(0, 24, dtype="X9")},
        {"a": {"dtype": "F32"}},
    ],
)
def test_a_header_with_wrong_entries(tmp_path, header):
    raw_safetensors(tmp_path / "model.safetensors", header, bytes(24))
    refused(tmp_path, "model.safetensors: not a whole safetensors file")


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refused(tmp_path, "not a whole safetensors file")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "not a whole safetensors file")


def test_a_shard_cut_short(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in (4, 20, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        refused(tmp_path, "not a whole safetensors file")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, protocol):
    proof = tmp_path / "ran"
    torch.save({"a": A, "b": Hostile(proof)}, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    refused(tmp_path, "pytorch_model.bin: not only tensors, and nothing else is loaded")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(proof)))
    refused(tmp_path, "pytorch_model.bin: not")
    assert not proof.exists()


@pytest.mark.parametrize("data", [[A], {"a": 3}, {3: A}, A])
def test_a_bin_file_of_other_things(tmp_path, data):
    torch.save(data, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin: .*(expected a map of names to tensors|a tensor's name is not text)")


def test_a_bin_file_that_claims_more_than_it_has(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "a: shape .1099511627776. is larger than the file")


def test_a_bin_file_cut_short(tmp_path):
    torch.save({"a": A, "b": B}, tmp_path / "pytorch_model.bin")
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "pytorch_model.bin").write_bytes(whole[:length])
        refused(tmp_path, "pytorch_model.bin: not")


def test_an_invalid_config(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: no config.json, expected a Hugging Face checkpoint")):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a JSON file"):
        read_config(tmp_path)


@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "8", True, [], 2**40, float("nan")])
def test_an_invalid_number(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": value}))
    with pytest.raises(UserError, match=r"config.json: hidden_size: .*expected a "):
        read_config(tmp_path).count("hidden_size")
