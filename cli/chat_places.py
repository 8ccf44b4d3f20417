"""What is named in a chat: documents to read, and the places of saved conversations."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path

import platformdirs

from ..errors import UserError
from .chat_autosave import autosaved_folder


def typed_path(argument: str, command: str) -> Path:
    """A path as it was typed or dropped: quoted, with escaped spaces, or plain."""
    if not argument:
        raise UserError(f"{command}: expected a path")
    plain = Path(argument).expanduser()
    if plain.exists():
        return plain
    try:
        parts = shlex.split(argument)
    except ValueError:
        parts = []
    return Path(parts[0]).expanduser() if len(parts) == 1 else plain


def typed_files(argument: str, command: str) -> list[Path]:
    """Return the documents that were typed: a path, a folder, or a pattern."""
    path = typed_path(argument, command)
    if path.is_dir() or (has_magic(str(path)) and not path.exists()):
        return named_documents([str(path)])
    return [path]


def named_documents(names: Sequence[str]) -> list[Path]:
    """Return the files that files, folders and patterns stand for.

    Raises:
        UserError: one of them is missing.
    """
    from .documents import find_files

    found = find_files(names, records=False) if names else None
    for source in found.sources if found else []:
        if source.error is not None:
            raise UserError(f"{source.path}: {source.error}")
    return [source.path for source in found.sources] if found else []


def _saved_folder() -> Path:
    return Path(platformdirs.user_state_dir("ropewalk")) / "conversations"


def saved_place(name: str) -> Path:
    """The folder of a saved conversation: a bare name is in the user's state folder, one with a separator is a path."""
    path = typed_path(name, "/save")
    return path if path.name != name or name in (".", "..") else _saved_folder() / name


def place_to_load(name: str) -> Path:
    """Return the folder of a conversation that was saved under a name, or else of one that was kept without."""
    place = saved_place(name)
    kept = autosaved_folder() / name
    return kept if Path(name).name == name and not place.exists() and kept.is_dir() else place


def saved_names() -> list[str]:
    try:
        return sorted(place.name for place in _saved_folder().iterdir() if place.is_dir())
    except OSError:
        return []
