"""Band changes with every layout of keys, each in a process of its own: llama.cpp crashes where it cannot shift them.

`python tests/runtime/key_layouts.py` tries all head sizes, cache types and rotary dimensions and prints a line for each
that goes wrong (`make layouts`); `try_layouts` tries some.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import ropewalk
from ropewalk.container import native_schedule, read_header
from ropewalk.errors import UserError
from ropewalk.factors import Band, Schedule, yarn
from ropewalk.runtime.graph.admission import check_engine
from ropewalk.runtime.graph.kernels import why_missing

sys.path.append(str(Path(__file__).parents[1]))
from tiny_models import tiny_llama

BLOCK = 32  # values in a block of all the quantised types
TYPES = {"f32": 1e-4, "f16": 2e-2, "bf16": 0.2, "q8_0": 0.5, "q5_1": 3.0, "q5_0": 3.0, "q4_1": 5.0, "q4_0": 5.0}
"""Cache types, and how far rounding rotated keys moves a tiny model's logits."""

READ_AGAIN = 1e-4
"""The same where they are read again."""

TOKENS = [(37 * i) % 250 + 5 for i in range(200)]
DISABLE = "LLAMA_ATTN_ROT_DISABLE"


@dataclass(frozen=True)
class Layout:
    """Keys of `head` dimensions, `n_rot` of them rotary, cached as `kv`."""

    head: int
    n_rot: int
    kv: str
    hadamard: bool = True

    @property
    def refused(self) -> bool:
        """Whether llama.cpp has no such cache: heads must divide into a type's blocks."""
        return self.kv not in ("f32", "f16", "bf16") and self.head % BLOCK != 0

    @property
    def rotates(self) -> bool:
        """Whether these keys are rotated: the kernels can do so with all, llama.cpp's K-shift as read in its source."""
        if not why_missing() or self.kv in ("f32", "f16"):
            return True
        return self.kv != "bf16" and self.head % 64 == 0 and self.n_rot == self.head and self.hadamard


def all_layouts() -> Iterator[Layout]:
    for head, kv, parts in itertools.product(range(16, 257, 16), TYPES, (1, 2)):
        yield Layout(head, head // parts, kv)
        if head % 64 == 0 and kv in ("q8_0", "q4_0"):
            yield Layout(head, head // parts, kv, hadamard=False)


def try_layouts(layouts: Iterable[Layout], folder: Path) -> dict[Layout, str]:
    """Return what went wrong with each layout; those that came out right are left out."""
    check_engine()
    import torch  # noqa: F401  (which every child would have to import, which takes seconds)

    found = {layout: _in_a_child(layout, folder) for layout in layouts}
    return {layout: wrong for layout, wrong in found.items() if wrong}


def _in_a_child(layout: Layout, folder: Path) -> str:
    output = folder / "wrong.txt"
    output.write_text("")
    child = os.fork()
    if child == 0:
        try:
            os.environ[DISABLE] = "0" if layout.hadamard else "1"
            os.environ["GGML_NO_BACKTRACE"] = "1"
            output.write_text(_wrong(layout, folder / "tiny.gguf"))
        except BaseException as error:
            output.write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else output.read_text()


def _wrong(layout: Layout, path: Path) -> str:
    """Change bands up and down with this layout; return what is wrong, or nothing.

    With one layer, keys depend on the tokens alone: those of a changed cache must be those that the band itself gives.
    """
    _write_model(path, layout)
    schedule = _schedule(path)
    try:
        llm, changes = _load(path, schedule, layout)
    except UserError as error:
        return "" if layout.refused else str(error)
    if layout.refused:
        return "not refused"
    llm.eval(TOKENS[:90])
    llm.eval(TOKENS[90:150])
    up = _last(llm, TOKENS[150:160])
    llm.rewind(60)
    down = _last(llm, TOKENS[60:80])
    direct, _ = _load(path, schedule.only(1), layout)
    direct.eval(TOKENS[:150])
    far = float(np.abs(up - _last(direct, TOKENS[150:160])).max())
    stayed, _ = _load(path, schedule, layout)
    stayed.eval(TOKENS[:60])
    near = float(np.abs(down - _last(stayed, TOKENS[60:80])).max())
    if changes != [not layout.rotates] * 2:
        return f"read again: {changes}, expected {[not layout.rotates] * 2}"
    limit = TYPES[layout.kv] if layout.rotates else READ_AGAIN
    return "" if max(far, near) < limit else f"logits differ by {far:.3g} after going up, {near:.3g} down"


def _load(path: Path, schedule: Schedule, layout: Layout) -> tuple[ropewalk.Llama, list[bool]]:
    quiet: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
    llm = ropewalk.Llama(path, schedule=schedule, kv=layout.kv, n_ctx=200, **quiet)
    changes: list[bool] = []
    llm.on_band_change = lambda change: changes.append(change.reread)
    return llm, changes


def _last(llm: ropewalk.Llama, tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    llm.eval(tokens)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


def _schedule(path: Path) -> Schedule:
    facts = native_schedule(read_header(path)).facts
    short = Band(context=100, rescale_factors=facts.start_factors)
    factors = tuple(yarn(facts.n_rot, 4, facts.freq_base, 50).tolist())
    return Schedule(facts=facts, bands=(short, Band(context=200, rescale_factors=factors, attention_factor=1.1)))


def _write_model(path: Path, layout: Layout) -> None:
    """A llama, or where keys are rotated in part, which that has not, a stablelm."""
    n_embd = 2 * layout.head

    def stablelm(writer: gguf.GGUFWriter) -> None:
        n_rot = gguf.GGUFValue(layout.n_rot, gguf.GGUFValueType.UINT32)
        writer.kv_data[0]["stablelm.rope.dimension_count"] = n_rot
        writer.add_layer_norm_eps(1e-5)
        for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
            writer.add_tensor(f"{name}.bias", np.zeros(n_embd, dtype=np.float32))

    extend: Callable[[gguf.GGUFWriter], None] | None = None if layout.n_rot == layout.head else stablelm
    arch = "stablelm" if extend else "llama"
    tiny_llama(path, arch=arch, n_embd=n_embd, n_head=2, n_head_kv=1, n_layer=1, extend=extend)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        wrong = try_layouts(all_layouts(), Path(folder))
    for layout, line in wrong.items():
        print(layout, line, sep=": ")
    sys.exit(bool(wrong))
