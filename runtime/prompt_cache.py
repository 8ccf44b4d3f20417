"""Prompts that were read once, kept on disk and reused by any later prompt that starts the same way.

A folder holds one session file (see `session`) per prompt. Its name encodes what the keys and values depend on besides
the tokens, how the prompt starts, and which prompt it is, so that names alone show which few files are worth
opening. If anything is wrong with a file, the prompt is read instead. When the folder exceeds its limit, the least
recently used files are removed. Several processes may share a folder, and be killed at any moment; other files in it
are left alone.
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

from ..errors import UserError, mib
from ..files import remove_dead_part
from . import session
from .free_memory import available_memory
from .loading import ROPE_OPTIONS

if TYPE_CHECKING:
    from .llama import Llama

MIN_TOKENS = 512
"""Shorter prompts are not kept; also the number of first tokens that are part of an entry's name."""

MIN_GAIN = 256
"""Tokens of reading that loading an entry must save."""

LOADED_PER_READ = 16
"""Tokens loaded in the time of reading one, at least: decides whether a long file pays off for a short common start."""

ENTRY = re.compile(r"prompt-[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{16}\.safetensors")
PART = re.compile(rf"\.{ENTRY.pattern}\.[0-9a-f]{{16}}\.part")


class PromptFolder:
    """A folder of kept prompts, of any models.

    Args:
        path: created, readable by its owner only, if it is missing.
        limit_bytes: size of all prompts together.

    Raises:
        UserError: it cannot be created or written to, or others may write to it.
    """

    def __init__(self, path: str | os.PathLike[str], limit_bytes: int) -> None:
        self.path, self.limit_bytes = Path(path), limit_bytes
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(b"\0")
        except FileExistsError:
            raise UserError(f"{path}: not a folder, expected one to keep prompts in") from None
        except OSError as error:
            raise UserError(f"{path}: cannot keep prompts there: {error.strerror or error}") from None
        self._check_private()
        self._remove_parts()

    def _check_private(self) -> None:
        """Refuse a folder in which others could put entries: keys and values cannot be checked against their tokens.

        Raises:
            UserError: others may write to it, or own it.
        """
        facts = self.path.stat()
        if facts.st_uid not in (os.geteuid(), 0):
            raise UserError(f"{self.path}: another user's folder, expected one of your own to keep prompts in")
        own_group = facts.st_gid == os.getegid() == os.geteuid()  # a group of one, as most systems give each user
        if facts.st_mode & (stat.S_IWOTH if own_group else stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(facts.st_mode)
            raise UserError(
                f"{self.path}: others may write to it (mode {mode:o}), and a prompt from them could answer for yours;"
                f" expected a folder that only you may write to: chmod go-w {self.path}"
            )

    def place(self, kind: str, tokens: session.Tokens) -> Path:
        """Return the path for the state of `tokens`; `kind` stands for what it depends on besides them."""
        return self.path / f"prompt-{kind}-{_digest(tokens[:MIN_TOKENS])}-{_digest(tokens)}.safetensors"

    def same_start(self, place: Path) -> list[Path]:
        """Return the entries of the same kind and with the same first tokens as the one at `place`."""
        start = place.name[: place.name.rindex("-") + 1]
        return [path for path, _ in self._entries() if path.name.startswith(start)]

    def make_room(self, n_bytes: int) -> None:
        """Remove entries, least recently used first, until `n_bytes` more fit."""
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
                    with suppress(OSError):  # another process may have removed it just now
                        facts = file.stat(follow_symlinks=False)
                        if stat.S_ISREG(facts.st_mode):
                            yield Path(file.path), facts

    def _remove_parts(self) -> None:
        """Remove half-written files of killed runs; a live run holds a lock on its own."""
        for path in self.path.iterdir():
            if PART.fullmatch(path.name):
                remove_dead_part(path)


class PromptCache:
    """The prompts that one model reads, kept in a folder.

    Args:
        on_problem: called with one line the first time that something could not be kept, and not again.
    """

    def __init__(self, llm: Llama, folder: PromptFolder, on_problem: Callable[[str], None] = lambda line: None) -> None:
        self._llm, self._folder, self._on_problem = llm, folder, on_problem
        self._keeps = True
        self._reported = False

    def read(self, tokens: Sequence[int]) -> int:
        """Have the model read `tokens`, except those that its own cache or the folder already has, and keep them.

        Returns the number of tokens read. Afterwards the model's cache holds exactly `tokens`.

        Raises:
            UserError: they do not fit.
        """
        llm, wanted = self._llm, np.asarray(tokens, dtype=np.int32)
        place = self._folder.place(self._kind(), wanted)
        if len(wanted) >= MIN_TOKENS:
            self._load_best(place, wanted)
        shared = self._roll_back(wanted)
        rest = wanted[shared:].tolist()
        if rest:
            if llm.on_progress is not None:
                llm.on_progress(0, len(rest))
            llm.eval(rest)
        if len(rest) >= MIN_TOKENS:
            self._keep(place)
        return len(rest)

    def _load_best(self, place: Path, wanted: session.Tokens) -> None:
        """Load the entry that saves the most reading, if one saves enough."""
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
        """Yield the entries worth loading, each with the tokens it saves reading, less the cost of loading it."""
        llm = self._llm
        held = _shared(llm.tokens, wanted)
        for path in self._folder.same_start(place):
            try:
                tokens = session.load_tokens(path, llm.n_ctx())
                spare = available_memory() - path.stat().st_size
                if self._folder.place(self._kind(), tokens).name != path.name:
                    raise session.DamagedSession(f"{path}: its tokens do not match its name")
            except session.DamagedSession:
                remove(path)
                continue
            except (UserError, OSError):
                continue
            shared = _shared(tokens, wanted)
            gain = shared - held - len(tokens) // LOADED_PER_READ
            if gain >= MIN_GAIN and spare > 0 and (shared == len(tokens) or llm.can_rewind):
                yield gain, path

    def _roll_back(self, wanted: session.Tokens) -> int:
        """Cut the model's cache back to the prefix it shares with `wanted`; return its length."""
        llm = self._llm
        shared = _shared(llm.tokens, wanted)
        if shared < llm.n_tokens:
            if not llm.can_rewind:
                llm.reset()
                return 0
            llm.rewind(shared)
        return shared

    def _keep(self, place: Path) -> None:
        """Write what the model's cache holds to `place`."""
        if not self._keeps:
            return
        try:
            n_bytes = session.size(self._llm)
            if n_bytes > self._folder.limit_bytes:
                self._report(f"{self._llm.n_tokens:,} tokens are not kept: {mib(n_bytes)} are more than the limit")
            elif n_bytes > available_memory():
                self._report(f"{self._llm.n_tokens:,} tokens are not kept: {mib(n_bytes)} of memory are not free")
            else:
                self._folder.make_room(n_bytes)
                session.save(self._llm, place, sync=False)  # the digest reveals what a power cut damages
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            self._keeps = False
            self._report(f"prompts are no longer kept: {error}")

    def _report(self, line: str) -> None:
        if not self._reported:
            self._reported = True
            self._on_problem(line)

    def _kind(self) -> str:
        """Return a name for everything that keys and values depend on besides the tokens."""
        llm = self._llm
        params = llm.context_params
        options = [getattr(params, name) for name in ROPE_OPTIONS]
        longest = 0 if llm.runs_by_schedule else llm.n_ctx()  # llama.cpp chooses native long factors by it
        settings = (llm.kv_type, llm.plan.flash_attn, llm.computed_by, llm.n_batch, params.n_ubatch, longest)
        schedule = llm.schedule.model_dump_json()
        parts = (session.FORMAT, llama_cpp.__version__, llm.weights_key, schedule, settings, options)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def remove(path: Path) -> None:
    """Remove an entry if possible; another process may have it open, or have removed it."""
    with suppress(OSError):
        path.unlink()


def _shared(ours: session.Tokens, theirs: session.Tokens) -> int:
    """Return the length of the common prefix of two sequences."""
    n = min(len(ours), len(theirs))
    differ = np.flatnonzero(ours[:n] != theirs[:n])
    return int(differ[0]) if len(differ) else n


def _digest(tokens: session.Tokens) -> str:
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16]
