"""Fixtures for the tests of conversion: tiny Hugging Face checkpoints."""

from pathlib import Path

import pytest
import tiny_checkpoints as checkpoints

CASES = {case.name: case for case in checkpoints.CASES}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a case of tiny_checkpoints.py, by its name; created once, not to be changed."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        case = CASES[name]
        if not case.can_be_made():
            pytest.skip(f"{case.needs}, which the tokeniser comes from, is not installed")
        if name not in folders:
            folders[name] = checkpoints.write_checkpoint(case, tmp_path_factory.mktemp("checkpoints"))
        return folders[name]

    return get
