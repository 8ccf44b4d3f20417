"""Every conversation is kept as it goes, so that none is lost by leaving, /load or /reset.

Each has a folder of its own under the user's state folder. After every answer its text is written there, and when the
chat ends, the model's cache too, so that it continues without reading it again; only the latest keeps its cache.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from ..errors import UserError
from ..files import lock

if TYPE_CHECKING:
    from ..runtime.chat import Conversation, Transcript

KEPT = 100
"""Conversations kept; beyond them, the oldest go."""

RECORD = "conversation.json"


def autosaved_folder() -> Path:
    return Path(platformdirs.user_state_dir("ropewalk")) / "autosaved"


def autosaved() -> list[Path]:
    """Return the kept conversations, the latest first."""
    found = []
    with suppress(OSError):
        for place in autosaved_folder().iterdir():
            with suppress(OSError):
                found.append(((place / RECORD).stat().st_mtime_ns, place))
    return [place for _, place in sorted(found, reverse=True)]


def latest() -> Path:
    """Return the place of the latest conversation.

    Raises:
        UserError: there is none.
    """
    places = autosaved()
    if not places:
        raise UserError("--continue: no conversation has been kept yet")
    return places[0]


class Autosave:
    """Keeps one conversation after another; does nothing if `active` is False."""

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.place: Path | None = None
        self._lock = -1
        self._kept: Transcript | None = None
        self._has_cache = False

    def resume(self, place: Path, transcript: Transcript) -> None:
        """Go on in `place`, unless another chat is using it: then in a new one."""
        self.start_new()
        fd = os.open(place, os.O_RDONLY)
        if lock(fd):
            self.place, self._lock, self._kept, self._has_cache = place, fd, transcript, True
        else:
            os.close(fd)

    def start_new(self) -> None:
        """Leave the conversation as it was last kept, and keep what comes in a new place."""
        if self._lock >= 0:
            os.close(self._lock)
        self.place, self._lock, self._kept = None, -1, None

    def keep(self, conversation: Conversation, *, with_cache: bool = False) -> None:
        """Write the conversation if anything has been said since; with its cache, if this is the end of it.

        Raises:
            UserError, OSError: it cannot be written; what was kept before stays.
        """
        transcript = conversation.transcript
        is_kept = transcript == self._kept and (self._has_cache or not with_cache)
        if not self.active or transcript.is_empty or is_kept:
            return
        if self.place is None:
            self.place = _new_place()
            self._lock = os.open(self.place, os.O_RDONLY)
            lock(self._lock)
        conversation.save(self.place, with_cache=with_cache and conversation.llm.n_tokens > 0)
        self._kept, self._has_cache = transcript, with_cache
        if with_cache:
            for place in _unused(autosaved()):
                _drop_cache(place)
        for place in _unused(autosaved()[KEPT:]):
            shutil.rmtree(place, ignore_errors=True)


def _new_place() -> Path:
    folder = autosaved_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = time.strftime("%Y-%m-%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        with suppress(FileExistsError):
            place = folder / f"{name}{suffix}"
            place.mkdir(mode=0o700)
            return place
    raise UserError(f"{folder}: cannot keep the conversation: a thousand were started in this second")


def _unused(places: list[Path]) -> Iterator[Path]:
    """Yield those that no running chat keeps its conversation in."""
    for place in places:
        with suppress(OSError):
            fd = os.open(place, os.O_RDONLY)
            try:
                if lock(fd):
                    yield place
            finally:
                os.close(fd)


def _drop_cache(place: Path) -> None:
    from ..runtime.chat import drop_saved_cache

    with suppress(UserError, OSError):
        facts = (place / RECORD).stat()
        drop_saved_cache(place)
        os.utime(place / RECORD, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # the order in which they were held
