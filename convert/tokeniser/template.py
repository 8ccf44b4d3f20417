"""The chat template, or several named ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter

from ...errors import UserError
from ..json_file import read_json
from .files import TokeniserFiles

KEY = "tokenizer.chat_template"
MAX_BYTES = 16 << 20


def write_template(writer: GGUFWriter, files: TokeniserFiles) -> None:
    """Write the template in chat_template.jinja, or else in tokenizer_config.json or chat_template.json.

    That is the order of transformers. The named ones in additional_chat_templates come with any of them.

    Raises:
        UserError: a template is not text.
    """
    configured = files.config.get("chat_template")
    _check(configured, files.folder)
    main = files.folder / "chat_template.jinja"
    given: Any = _text(main) if main.is_file() else configured
    old = files.folder / "chat_template.json"
    if given is None and old.is_file():
        given = read_json(old).get("chat_template")
        _check(given, files.folder)
    given = _with_additional(given, files.folder)
    if isinstance(given, str):
        writer.add_chat_template(given)
    elif given is not None:
        _write_named(writer, given)


def _check(given: Any, folder: Path) -> None:
    if given is not None and not isinstance(given, str | list):
        raise UserError(f"{folder}: chat_template: {type(given).__name__}, expected text or a list of named templates")
    for entry in given if isinstance(given, list) else ():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("template"), str):
            raise UserError(f"{folder}: chat_template: {entry!r:.60}, expected a map with name and template")


def _with_additional(given: Any, folder: Path) -> Any:
    """Return the templates with those that have files of their own, which go before others of the same name."""
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if not files:
        return given
    listed = [{"name": "default", "template": given}] if isinstance(given, str) else given or []
    names = {path.stem for path in files}
    kept = [entry for entry in listed if entry.get("name") not in names]
    return kept + [{"name": path.stem, "template": _text(path)} for path in files]


def _write_named(writer: GGUFWriter, templates: list[Any]) -> None:
    names = []
    default = None
    for entry in templates:
        name = "".join(c if c.isascii() and c.isalnum() else "_" for c in str(entry.get("name", "")))
        if name == "default":
            default = entry["template"]
        elif name:
            names.append(name)
            writer.add_string(f"{KEY}.{name}", entry["template"])
    if names:
        writer.add_key_value(f"{KEY}s", sorted(set(names)), GGUFValueType.ARRAY, sub_type=GGUFValueType.STRING)
    if default is not None:
        writer.add_chat_template(default)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, expected a chat template")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
