"""Checkpoints with anything in their files: converted, or refused in one line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tiny_checkpoints as tc
from fuzzing import ODD, changed, changed_bytes, check_line, rounds, write_json
from ropewalk.container import read_header, schedule_of, what_stock_does
from ropewalk.convert import convert_checkpoint
from ropewalk.convert.from_checkpoint import read_source
from ropewalk.errors import UserError

SMALL = [case for case in tc.CASES if isinstance(case.tokeniser, tc.SentencePiece) and case.tokeniser is not tc.WHOLE]
SETTINGS = [item for case in SMALL for item in case.config.items()]
NAMES = ("yarn", "linear", "longrope", "su", "llama3", "dynamic", "silu", "gelu", "<s>", "LlamaForCausalLM")
MORE = {"README.md": tc.CARD, "generation_config.json": json.dumps(tc.GENERATION), "chat_template.jinja": "{{ 1 }}"}
TEXTS = (".json", ".md", ".jinja")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of sound checkpoints, each with all the files that one may have."""
    cases = [case for case in SMALL if case.can_be_made()]
    if not cases:
        pytest.skip("mistral_common, which the tokenisers come from, is not installed")
    place, folders = tmp_path_factory.mktemp("sound"), []
    for case in cases:
        folders.append(tc.write_checkpoint(case, place))
        for name, text in MORE.items():
            if not (folders[-1] / name).exists():
                (folders[-1] / name).write_text(text)
    return folders


def write_odd(folder: Path, sound: Path, rng: random.Random) -> None:
    """Copy a sound checkpoint to `folder` with a few changes."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice([path for path in folder.iterdir() if path.suffix in TEXTS or rng.random() < 0.3])
        kind = rng.random()
        if path.suffix == ".json" and kind < 0.75:
            _change_json(path, rng)
        elif kind < 0.95:
            path.write_bytes(changed_bytes(path.read_bytes(), rng, within=4096))
        else:
            path.unlink()


def _change_json(path: Path, rng: random.Random) -> None:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # changed before
        return
    if path.name == "config.json" and isinstance(value, dict) and rng.random() < 0.4:
        key, other = rng.choice(SETTINGS)
        value[key] = other if rng.random() < 0.5 else changed(other, rng, (*ODD, *NAMES))
    else:
        value = changed(value, rng, (*ODD, *NAMES))
    write_json(path, value)


def test_what_is_read_of_a_checkpoint(sound: list[Path], tmp_path: Path) -> None:
    ends = {"read": 0, "refused": 0}
    for rng in rounds(3):
        write_odd(tmp_path / "odd", rng.choice(sound), rng)
        try:
            read_source(tmp_path / "odd")
            ends["read"] += 1
        except UserError as error:
            check_line(error)
            ends["refused"] += 1
    assert min(ends.values()) > 0, ends


def test_what_is_converted(sound: list[Path], tmp_path: Path) -> None:
    converted = 0
    for rng in rounds(3):
        write_odd(tmp_path / "odd", rng.choice(sound), rng)
        kind = rng.choice((None, "f16", "q8_0", "q4_0"))
        try:
            notes = convert_checkpoint(tmp_path / "odd", tmp_path / "out.gguf", weight_type=kind, force=True)
        except UserError as error:
            check_line(error)
            assert "/ropewalk-" not in str(error)  # of a temporary file
        else:
            assert not [note for note in notes if "\n" in note]
            header = read_header(tmp_path / "out.gguf")
            assert schedule_of(header) and what_stock_does(header)
            converted += 1
    assert converted
