"""An output file that appears whole or not at all, even if the process is killed.

It is written next to its target under a temporary name that one run at a time may claim, synced to disk, and only then
renamed. The claim is a system lock on the open file, which ends with the process that holds it, however that ends; so
the leftover of a killed run is recognised as one and replaced.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, mib
from ..files import MAX_STEM_BYTES, check_place, is_same, lock, sync_folder


@dataclass(frozen=True)
class Output:
    """A claim on `target`: the output is written to `part`; `scratch` is for an intermediate file."""

    target: Path
    part: Path
    scratch: Path


@contextmanager
def output_file(target: str | os.PathLike[str], *, source: Path, force: bool = False) -> Iterator[Output]:
    """Claim `target` while the block runs, and rename `part` to it when the block is done.

    After any exception nothing of it is left. An existing `target` is only replaced with `force`, and then in one step.

    Raises:
        UserError: `target` exists (without `force`), is a folder or a device, or is `source`; its folder is missing or
            not writable; another run is writing it; or the disk is full.
    """
    path = Path(target)
    _check_output(path, source, force)
    output = Output(path, _beside(path, "part"), _beside(path, "scratch.part"))
    fd = _claim(output.part, path)
    try:
        output.scratch.unlink(missing_ok=True)
        with named(path, output.part, output.scratch):
            yield output
        output.scratch.unlink(missing_ok=True)
        _publish(output, force)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        _release(output, fd)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Claim the name of a whole file beside `target`, which is then split, while the block runs; remove it afterwards.

    Raises:
        UserError: another run has claimed it, or its folder is not writable.
    """
    whole, claim = _beside(target, "whole.part"), _beside(target, "whole.claim.part")
    fd = _claim(claim, target)
    try:
        with named(target, whole):
            yield whole
    finally:
        whole.unlink(missing_ok=True)
        with suppress(OSError):
            if is_same(fd, claim):
                claim.unlink()
        os.close(fd)


@contextmanager
def named(target: Path | str, *places: Path) -> Iterator[None]:
    """Let messages from the block name `target` where they would name a file that is gone when they are read."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for place in places:
            text = text.replace(str(place), str(target))
        if text == str(error):
            raise
        raise type(error)(text) from None


def _beside(target: Path, ending: str) -> Path:
    """A hidden name next to `target`; a name that would be too long for a file system is shortened to a digest."""
    raw = os.fsencode(target.name)
    if len(raw) <= MAX_STEM_BYTES:
        return target.with_name(f".{target.name}.{ending}")
    stem = raw[: MAX_STEM_BYTES - 9].decode("utf-8", errors="ignore")
    return target.with_name(f".{stem}-{hashlib.sha256(raw).hexdigest()[:8]}.{ending}")


def check_space(target: Path, n_bytes: int) -> None:
    """Refuse an output for which the disk has too little space.

    Raises:
        UserError: the message gives both sizes.
    """
    free = shutil.disk_usage(target.parent).free
    if n_bytes > free:
        raise UserError(f"{target}: not enough disk space: {mib(n_bytes)} needed, {mib(free)} free")


def _check_output(target: Path, source: Path, force: bool) -> None:
    try:
        if target.exists() and target.samefile(source):
            raise UserError(f"{target}: the output is the input itself, expected another file")
    except OSError as error:
        raise UserError(f"{target}: cannot write: {error.strerror or error}") from None
    check_place(target)
    if os.path.lexists(target) and not force:
        raise UserError(f"{target}: already exists (--force replaces it)")


def _claim(part: Path, target: Path) -> int:
    """Create `part` and lock it; the lock lasts as long as the file descriptor that is returned."""
    while True:
        try:
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(f"{target}: cannot write: {error.strerror or error}") from None
        try:
            with suppress(FileNotFoundError):
                if not lock(fd):
                    raise UserError(f"{target}: another run is writing it")
                if is_same(fd, part):
                    if os.fstat(fd).st_size == 0:
                        return fd
                    part.unlink()  # left by a killed run, whose child may still have it open: use a new file
            os.close(fd)
        except BaseException:
            os.close(fd)
            raise


def _release(output: Output, fd: int) -> None:
    """Release the claim and remove its files; once `part` is renamed, its old name may belong to another run."""
    with suppress(OSError):
        if is_same(fd, output.part):
            output.scratch.unlink(missing_ok=True)
            output.part.unlink()
    os.close(fd)


def _publish(output: Output, force: bool) -> None:
    with output.part.open("rb+") as file:
        os.fsync(file.fileno())
    if force:
        output.part.replace(output.target)
    else:
        _link(output)
    sync_folder(output.target.parent)


def _link(output: Output) -> None:
    """Give the finished part its final name, unless a file with that name has appeared."""
    try:
        os.link(output.part, output.target)
        return
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not os.path.lexists(output.target):
            output.part.rename(output.target)
            return
    raise UserError(f"{output.target}: exists now (--force replaces it); the new file was discarded")
