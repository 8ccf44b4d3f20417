"""The options --prompt-cache and --prompt-cache-size, which several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .terminal import err, printable

if TYPE_CHECKING:
    from ..runtime import Llama
    from ..runtime.prompt_cache import PromptCache, PromptFolder

CacheFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Cache prompts in DIR: a beginning that was read before is not read again."),
]
CacheSize = Annotated[str, typer.Option(metavar="SIZE", help="Maximum total size of the prompts in DIR.")]
DEFAULT_SIZE = "4GiB"

SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?(?:([kmgt])(i?))?b?", re.IGNORECASE)


def open_folder(folder: Path | None, size: str) -> PromptFolder | None:
    """Open the folder given by the options; None without one.

    Raises:
        UserError: it cannot be written to, or the size is not a size.
    """
    n_bytes = _bytes(size)
    if folder is None:
        return None
    from ..runtime.prompt_cache import PromptFolder

    return PromptFolder(folder, n_bytes)


def open_cache(llm: Llama, folder: PromptFolder | None) -> PromptCache | None:
    """Return the prompt cache of `llm` in `folder`; None without one."""
    if folder is None:
        return None
    from ..runtime.prompt_cache import PromptCache

    return PromptCache(llm, folder, _say)


def _bytes(text: str) -> int:
    """Parse a human-readable size: `500MB`, `2GiB`, `4g`, or a plain number of bytes."""
    match = SIZE.fullmatch(text.strip())
    n_bytes = 0
    if match is not None:
        power = " kmgt".index((match[2] or " ").lower())
        n_bytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if not n_bytes:
        raise UserError(f"--prompt-cache-size: {text!r}, expected a size like 500MB or 4GiB")
    return n_bytes


def _say(line: str) -> None:
    if err.is_terminal:
        err.print(printable(line), style="dim", markup=False)
