"""An output file that is there whole or not at all, whatever happens meanwhile.

It is written beside its place, under a name of our own that one run at a time may hold, made durable, and only then
given its name. The hold is the system's lock on the open file: it ends with the process that has it, however that
ends, so what a killed run left is known for a leftover and replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, mib
from ..files import check_place, is_same, lock, sync_folder


@dataclass(frozen=True)
class Output:
    """A claim on `target`: what goes there is written to `part`; `scratch` is for what is needed on the way."""

    target: Path
    part: Path
    scratch: Path


@contextmanager
def output_file(target: str | os.PathLike[str], *, source: Path, force: bool = False) -> Iterator[Output]:
    """Claim `target` while the block runs, and put `part` in its place when the block is done.

    On any exception nothing is left of it. An existing `target` is replaced with `force` only, and then in one step.

    Raises:
        UserError: it exists (without `force`), is a folder or a device, is `source`, its folder is missing or cannot
            be written to, another run is writing it, or the disk is full.
    """
    path = Path(target)
    _check_output(path, source, force)
    output = Output(path, path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.scratch.part"))
    hold = _hold(output.part, path)
    try:
        output.scratch.unlink(missing_ok=True)
        yield output
        output.scratch.unlink(missing_ok=True)
        _publish(output, force)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        _drop(output, hold)


def check_space(target: Path, n_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        UserError: with the numbers.
    """
    free = shutil.disk_usage(target.parent).free
    if n_bytes > free:
        raise UserError(f"{target}: not enough space on the disk: {mib(n_bytes)} are needed, {mib(free)} are free")


def _check_output(target: Path, source: Path, force: bool) -> None:
    try:
        if target.exists() and target.samefile(source):
            raise UserError(f"{target}: the output is the input itself, expected another file")
    except OSError as error:
        raise UserError(f"{target}: cannot write: {error.strerror or error}") from None
    check_place(target)
    if os.path.lexists(target) and not force:
        raise UserError(f"{target}: exists already (--force replaces it)")


def _hold(part: Path, target: Path) -> int:
    """Make `part` and lock it; the lock lives as long as the descriptor that is returned."""
    while True:
        try:
            hold = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(f"{target}: cannot write: {error.strerror or error}") from None
        try:
            with suppress(FileNotFoundError):
                if not lock(hold):
                    raise UserError(f"{target}: another run is writing it")
                if is_same(hold, part):
                    if os.fstat(hold).st_size == 0:
                        return hold
                    part.unlink()  # a killed run's; its child may still hold it open, so begin with a new one
            os.close(hold)
        except BaseException:
            os.close(hold)
            raise


def _drop(output: Output, hold: int) -> None:
    """Let go of the claim, and of what is left of it: once `part` has its final name, that name is another run's."""
    with suppress(OSError):
        if is_same(hold, output.part):
            output.scratch.unlink(missing_ok=True)
            output.part.unlink()
    os.close(hold)


def _publish(output: Output, force: bool) -> None:
    with output.part.open("rb+") as file:
        os.fsync(file.fileno())
    if force:
        output.part.replace(output.target)
    else:
        _link(output)
    sync_folder(output.target.parent)


def _link(output: Output) -> None:
    """Give the finished part its name, unless something has that name by now."""
    try:
        os.link(output.part, output.target)
        return
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not os.path.lexists(output.target):
            output.part.rename(output.target)
            return
    raise UserError(f"{output.target}: exists by now (--force replaces it); what was written is dropped")
