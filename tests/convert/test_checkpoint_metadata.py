"""A model card or a generation config may be odd in any way: what cannot be used is left out, with a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as checkpoints
from ropewalk.container import read_header
from ropewalk.convert import convert_checkpoint
from ropewalk.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    case = checkpoints.Case("tiny-model", checkpoints.LLAMA)
    if not case.can_be_made():
        pytest.skip(f"{case.needs}, which the tokeniser comes from, is not installed")
    return checkpoints.write_checkpoint(case, tmp_path)


def general(file: Path) -> dict[str, Any]:
    """What is under `general.` in a file."""
    header = read_header(file)
    return {
        key.removeprefix("general."): header.get(key) if entry.item_type is None else header.array(key)
        for key, entry in header.entries.items()
        if key.startswith("general.")
    }


CARDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "numbers among the tags": ("tags:\n- llama\n- 2024\n- 1.5", {"tags": ["llama", "2024", "1.5"]}, []),
    "a map among the tags": ("tags: [{a: b}, good]", {"tags": ["good"]}, ["README.md: tags: {'a': 'b'}"]),
    "a map for tags": ("tags: {a: b}\nlicense: mit", {"license": "mit"}, ["README.md: tags: {'a': 'b'}"]),
    "lists among the tags": ("tags: [[a, b], c]", {"tags": ["c"]}, []),
    "no tags at all": ("tags: []\nlicense:\nlanguage: null", {}, []),
    "Norwegian": ("language: no", {"languages": ["no"]}, []),
    "a date and a number": ("license: 2024-01-01\nversion: 1.0", {"license": "2024-01-01", "version": "1.0"}, []),
    "a list of licences": ("license: [mit, apache-2.0]", {"license": "mit,apache-2.0"}, []),
    "a name that is none": ("name: [a, b]\nlicense: mit", {"license": "mit", "name": "tiny-model"}, []),
    "base models as maps": ("base_model: [{name: x, repo: [1]}, org/y]", {"base_model.1.name": "Y"}, []),
    "a base model of nothing": ("base_model: [3, null, [a]]\ndatasets: 7", {}, []),
    "not YAML": ("tags: [a\nlicense: : mit", {}, ["README.md: its head is not readable as a model card"]),
    "two documents": ("a: 1\n...\n--- {\nb: 2", {}, ["README.md: its head is not readable"]),
    "a list": ("- a\n- b", {}, []),
    "text": ("just text", {}, []),
    "a recursive alias": ("tags: &a [x, *a]", {"tags": ["x"]}, []),
    "a surrogate": ('license: "\\ud83d"\nauthor: me', {"author": "me"}, ["license"]),
    "a Python object": ("tags: !!python/object/apply:os.system ['true']", {}, ["README.md: its head"]),
}


@pytest.mark.parametrize("case", CARDS)
def test_an_odd_model_card(case: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    head, expected, noted = CARDS[case]
    (folder / "README.md").write_text(f"---\n{head}\n---\n\n# Tiny\n", encoding="utf-8")
    notes = convert_checkpoint(folder, tmp_path / "out.gguf")
    found = general(tmp_path / "out.gguf")
    assert {key: found[key] for key in expected} == expected
    assert len(notes) == len(noted) and all(part in note for part, note in zip(noted, notes, strict=True))
    assert all("\n" not in note and "left out" in note for note in notes)
    assert found["architecture"] == "llama"
    assert "while reading" not in capfd.readouterr().err


@pytest.mark.parametrize("raw", [b"\xff\xfe-\x00", b"", b"---", b"---\n", "---\ntags: é\n---".encode("cp1252")])
def test_a_card_of_other_bytes(raw: bytes, folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_bytes(raw)
    notes = convert_checkpoint(folder, tmp_path / "out.gguf")
    assert all("README.md" in note for note in notes) and general(tmp_path / "out.gguf")["name"] == "Tiny Model"


def test_a_card_that_is_a_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").mkdir()
    assert convert_checkpoint(folder, tmp_path / "out.gguf") == ()


GENERATION: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "good": ({"temperature": 1, "top_k": 20.0, "repetition_penalty": 1.5}, {"temp": 1.0, "top_k": 20}, []),
    "text": ({"temperature": "hot", "top_p": 0.5}, {"top_p": 0.5}, ["temperature: 'hot', expected a number"]),
    "lists": ({"top_k": [1]}, {}, ["top_k: [1], expected a whole number"]),
    "truth": ({"top_k": True, "min_p": None}, {}, ["top_k: True, expected a whole number"]),
    "fractions": ({"top_k": 1.5}, {}, ["top_k: 1.5, expected a whole number"]),
    "large": ({"top_k": 2**40, "temperature": 10**400}, {}, ["top_k", "temperature"]),
    "penalty": ({"repetition_penalty": "no"}, {}, ["repetition_penalty: 'no', expected a number"]),
    "surrogate": ({"sequence": "\ud83d"}, {}, ["general.sampling.sequence"]),
    "not an object": ([1, 2], {}, ["generation_config.json: list, expected a JSON object"]),
    "not JSON": ("{", {}, ["generation_config.json: not a JSON file"]),
    "not finite": ('{"temperature": NaN, "top_p": Infinity}', {}, ["top_p: inf", "temperature: nan"]),
    "eos of nothing": ({"eos_token_id": ["x", None, True, -1, 10**30, 2.5]}, {}, []),
}


@pytest.mark.parametrize("case", GENERATION)
def test_an_odd_generation_config(case: str, folder: Path, tmp_path: Path) -> None:
    content, expected, noted = GENERATION[case]
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    notes = convert_checkpoint(folder, tmp_path / "out.gguf")
    found = general(tmp_path / "out.gguf")
    assert {key: found[f"sampling.{key}"] for key in expected} == expected
    assert len(notes) == len(noted) and all(part in note for part, note in zip(noted, notes, strict=True))


@pytest.mark.parametrize("name", ["x/\ud83d", 7, ["a"], {"a": 1}, ""])
def test_an_odd_name_in_the_config(name: Any, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"_name_or_path": name, **config}))
    convert_checkpoint(folder, tmp_path / "out.gguf")
    assert general(tmp_path / "out.gguf")["architecture"] == "llama"


def test_numbers_that_do_not_fit_their_keys(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1e39}))
    with pytest.raises(UserError, match=r"rope_theta: 1e\+39, expected"):
        convert_checkpoint(folder, tmp_path / "out.gguf")
