"""Prompts that were read once, kept on disk, and taken up again by any later prompt that begins the same way.

A folder holds one session file (see `session`) for each. Its name says what the keys and values depend on beside the
tokens, how the prompt begins, and which it is, so that the names tell the few files that are worth opening. Whatever is
wrong with a file, the prompt is read instead. When the folder outgrows its limit, what was unused for longest goes.
Several processes may share a folder, and be killed at any moment; other files in it are let alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np

from ..container import model_digest
from ..errors import UserError, mib
from ..files import remove_dead_part
from . import session
from .loading import ROPE_OPTIONS
from .memory import available_memory

if TYPE_CHECKING:
    from .llama import Llama

LEAST_TOKENS = 512
"""What takes no longer to read is not kept; and so many at its beginning are part of a prompt's name."""

LEAST_GAIN = 256
"""Tokens that taking up a file must save."""

LOADED_FOR_ONE_READ = 16
"""Tokens loaded in the time of reading one, at the least: whether a long file pays for a short beginning."""

ENTRY = re.compile(r"prompt-[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{16}\.safetensors")
PART = re.compile(rf"\.{ENTRY.pattern}\.[0-9a-f]{{16}}\.part")


class PromptFolder:
    """A folder of kept prompts, of any models.

    Args:
        path: where; made, for its owner alone, if it is missing.
        limit_bytes: of all prompts together.

    Raises:
        UserError: it cannot be made or written to.
    """

    def __init__(self, path: str | os.PathLike[str], limit_bytes: int) -> None:
        self.path, self.limit_bytes = Path(path), limit_bytes
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"\0")
        except FileExistsError:
            raise UserError(f"{path}: is no folder, expected one to keep prompts in") from None
        except OSError as error:
            raise UserError(f"{path}: cannot keep prompts there: {error.strerror or error}") from None
        self._remove_parts()

    def place(self, kind: str, tokens: session.Tokens) -> Path:
        """Where the state of `tokens` goes, `kind` being what it depends on beside them."""
        return self.path / f"prompt-{kind}-{_digest(tokens[:LEAST_TOKENS])}-{_digest(tokens)}.safetensors"

    def alike(self, place: Path) -> list[Path]:
        """The entries of the same kind whose first tokens are the same as those of the one at `place`."""
        start = place.name[: place.name.rindex("-") + 1]
        return [path for path, _ in self._entries() if path.name.startswith(start)]

    def make_room(self, n_bytes: int) -> None:
        """Remove entries, longest unused first, until `n_bytes` more fit."""
        found = sorted(((facts.st_mtime_ns, facts.st_size, path) for path, facts in self._entries()))
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total + n_bytes <= self.limit_bytes:
                break
            remove(path)
            total -= size

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        with suppress(OSError), os.scandir(self.path) as files:
            for file in files:
                if ENTRY.fullmatch(file.name):
                    with suppress(OSError):  # another process may just have removed it
                        facts = file.stat(follow_symlinks=False)
                        if stat.S_ISREG(facts.st_mode):
                            yield Path(file.path), facts

    def _remove_parts(self) -> None:
        """What killed runs have left half-written; a run that lives holds a lock on its own."""
        for path in self.path.iterdir():
            if PART.fullmatch(path.name):
                remove_dead_part(path)


class PromptCache:
    """What one model reads, kept in a folder.

    Args:
        on_problem: told, in a line, when something could not be kept; once, as nothing is said of the next ones.
    """

    def __init__(self, llm: Llama, folder: PromptFolder, on_problem: Callable[[str], None] = lambda line: None) -> None:
        self._llm, self._folder, self._on_problem = llm, folder, on_problem
        self._model = model_digest(llm.model_path)
        self._keeps = True
        self._told = False

    def read(self, tokens: Sequence[int]) -> int:
        """Have the model read `tokens`, as far as neither its own cache nor the folder has them, and keep them.

        Returns how many were read. Afterwards the model's cache holds exactly `tokens`.

        Raises:
            UserError: they do not fit.
        """
        llm, wanted = self._llm, np.asarray(tokens, dtype=np.int32)
        place = self._folder.place(self._kind(), wanted)
        if len(wanted) >= LEAST_TOKENS:
            self._take_up(place, wanted)
        shared = self._roll_back(wanted)
        rest = wanted[shared:].tolist()
        if rest:
            if llm.on_progress is not None:
                llm.on_progress(0, len(rest))
            llm.eval(rest)
        if len(rest) >= LEAST_TOKENS:
            self._keep(place)
        return len(rest)

    def _take_up(self, place: Path, wanted: session.Tokens) -> None:
        """Load the entry that saves most reading, if one saves enough."""
        for _, path in sorted(self._gains(place, wanted), reverse=True):
            try:
                session.load(self._llm, path)
            except session.DamagedSession:
                remove(path)
            except (UserError, MemoryError):
                continue
            else:
                with suppress(OSError):
                    os.utime(path)
                return

    def _gains(self, place: Path, wanted: session.Tokens) -> Iterator[tuple[int, Path]]:
        """Entries worth loading, and how many tokens each saves reading, its own length reckoned in."""
        llm = self._llm
        held = _shared(llm.tokens, wanted)
        for path in self._folder.alike(place):
            try:
                tokens = session.load_tokens(path, llm.n_ctx())
                spare = available_memory() - path.stat().st_size
                if self._folder.place(self._kind(), tokens).name != path.name:
                    raise session.DamagedSession(f"{path}: other tokens than it is named for")
            except session.DamagedSession:
                remove(path)
                continue
            except (UserError, OSError):
                continue
            shared = _shared(tokens, wanted)
            gain = shared - held - len(tokens) // LOADED_FOR_ONE_READ
            if gain >= LEAST_GAIN and spare > 0 and (shared == len(tokens) or llm.can_rewind):
                yield gain, path

    def _roll_back(self, wanted: session.Tokens) -> int:
        """Leave of the model's cache only what `wanted` begins with; how many tokens that is."""
        llm = self._llm
        shared = _shared(llm.tokens, wanted)
        if shared < llm.n_tokens:
            if not llm.can_rewind:
                llm.reset()
                return 0
            llm.rewind(shared)
        return shared

    def _keep(self, place: Path) -> None:
        """Write down what the model's cache holds."""
        if not self._keeps:
            return
        try:
            n_bytes = session.size(self._llm)
            if n_bytes > self._folder.limit_bytes:
                self._tell(f"{self._llm.n_tokens:,} tokens are not kept: {mib(n_bytes)} are more than the limit")
            elif n_bytes > available_memory():
                self._tell(f"{self._llm.n_tokens:,} tokens are not kept: {mib(n_bytes)} of memory are not free")
            else:
                self._folder.make_room(n_bytes)
                session.save(self._llm, place, sync=False)  # what a power cut spoils is told by its digest
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            self._keeps = False
            self._tell(f"prompts are no longer kept: {error}")

    def _tell(self, line: str) -> None:
        if not self._told:
            self._told = True
            self._on_problem(line)

    def _kind(self) -> str:
        """A name for all that keys and values depend on beside the tokens."""
        llm = self._llm
        params = llm.context_params
        own_ropes = [getattr(params, name) for name in ROPE_OPTIONS]
        longest = 0 if llm.runs_by_schedule else llm.n_ctx()  # llama.cpp chooses native long factors by it
        ways = (llm.kv_type, llm.plan.flash_attn, llm.fast_prefill, llm.n_batch, params.n_ubatch, longest)
        adapter = model_digest(llm.lora_path) if llm.lora_path else ""
        parts = (session.FORMAT, llama_cpp.__version__, self._model, llm.schedule.model_dump_json(), ways, own_ropes)
        return hashlib.sha256(repr((*parts, adapter, llm.lora_scale)).encode()).hexdigest()[:16]


def remove(path: Path) -> None:
    """Remove an entry, if it can be; another process may have it open, or have removed it."""
    with suppress(OSError):
        path.unlink()


def _shared(ours: session.Tokens, theirs: session.Tokens) -> int:
    """How many tokens two sequences have in common at their beginning."""
    n = min(len(ours), len(theirs))
    differ = np.flatnonzero(ours[:n] != theirs[:n])
    return int(differ[0]) if len(differ) else n


def _digest(tokens: session.Tokens) -> str:
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16]
