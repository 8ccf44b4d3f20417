"""Checkpoints by their name on the Hugging Face hub: downloaded once (resumed if interrupted), then read from disk."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import UserError

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
"""``org/name`` or ``org/name@revision``."""

FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.md"]
SKIPPED = ["consolidated*", "*/*.safetensors", "*/*.bin", "*/*.json", "*/*.txt", "*/*.md"]
"""Duplicates of the weights, and files in folders for other programs."""


def is_checkpoint(source: str) -> bool:
    """Whether `source` names a checkpoint and not a file: a folder, or what looks like a name on the hub."""
    path = Path(source)
    return path.is_dir() or (not path.exists() and path.suffix != ".gguf" and HUB_ID.fullmatch(source) is not None)


def checkpoint_folder(source: str) -> Path:
    """The folder of a checkpoint: `source` itself, or the local copy of the hub's files, downloaded if necessary.

    Raises:
        UserError: it is neither a folder nor the name of a model that can be downloaded.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(source):
        raise UserError(
            f"{source}: no such folder, expected a checkpoint's folder or a hub name like org/name@revision"
        )
    return _download(source)


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    match = HUB_ID.fullmatch(source)
    assert match is not None

    def download(weights: str) -> Path:
        return Path(
            snapshot_download(
                match["repo"], revision=match["revision"], allow_patterns=[*FILES, weights], ignore_patterns=SKIPPED
            )
        )

    try:
        folder = download("*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else download("pytorch_model*.bin")
    except (OSError, HFValidationError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(
            f"{source}: not a local folder, and cannot be downloaded from the hub:"
            f" {lines[0] if lines else 'no reason given'}"
        ) from None
