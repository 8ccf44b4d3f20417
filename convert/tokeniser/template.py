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
    """Write the template in tokenizer_config.json, or else in chat_template.jinja or chat_template.json.

    Raises:
        UserError: a template is not text.
    """
    if not files.config:
        return
    given = files.config.get("chat_template", _in_files(files.folder))
    if isinstance(given, str):
        writer.add_chat_template(given)
    elif isinstance(given, list):
        _write_named(writer, given, files.folder)
    elif given is not None:
        raise UserError(
            f"{files.folder}: chat_template: {type(given).__name__}, expected text or a list of named templates"
        )


def _in_files(folder: Path) -> Any:
    main = folder / "chat_template.jinja"
    if main.is_file():
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if not more:
            return _text(main)
        named = [{"name": path.stem, "template": _text(path)} for path in more]
        return [{"name": "default", "template": _text(main)}, *named]
    if (folder / "chat_template.json").is_file():
        return read_json(folder / "chat_template.json").get("chat_template")
    return None


def _write_named(writer: GGUFWriter, templates: list[Any], folder: Path) -> None:
    names = []
    default = None
    for entry in templates:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("template"), str):
            raise UserError(f"{folder}: chat_template: {entry!r:.60}, expected a map with name and template")
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
