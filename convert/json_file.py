"""JSON files from elsewhere: read with a size limit, and anything but an object is a one-line error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError

MAX_BYTES = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        UserError: it cannot be read, or does not hold an object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, expected at most {MAX_BYTES:,}")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: {type(data).__name__}, expected a JSON object")
    return data
