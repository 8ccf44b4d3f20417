"""Files are there whole or not at all, and nothing is left behind."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ropewalk import files
from ropewalk.errors import UserError

WRITE = """
import sys, time
from ropewalk.files import replacement
with replacement(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with files.replacement(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert stat.S_IMODE(Path(file.name).stat().st_mode) == 0o600
        assert Path(file.name).name not in (".a.json.part", f".a.json.{os.getpid()}.part")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, RuntimeError, OSError])
def test_nothing_is_left_after_any_exception(tmp_path, ending):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ending), files.replacement(tmp_path / "a") as file:
        file.write(b"half")
        raise ending
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_modes(tmp_path, umask):
    (tmp_path / "shared").write_bytes(b"old")
    (tmp_path / "shared").chmod(0o664)
    for name in ("new", "shared"):
        files.write_file(tmp_path / name, b"new")
    files.write_file(tmp_path / "private", b"new", private=True)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"new": 0o644, "shared": 0o664, "private": 0o600}


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "target")
    for data in (b"first", b"second"):
        files.write_file(tmp_path / "link", data)
        assert (tmp_path / "folder" / "target").read_bytes() == data and (tmp_path / "link").is_symlink()
    assert names(tmp_path / "folder") == ["target"]


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "\udcff" * 200])
def test_the_longest_names_can_be_written(tmp_path, name):
    files.write_file(tmp_path / name, b"data")
    assert names(tmp_path) == [name]


def test_a_name_that_somebody_puts_there_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)
    (tmp_path / "theirs").write_bytes(b"precious")
    (tmp_path / f".a.{'0' * 16}.part").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError):
        files.write_file(tmp_path / "a", b"data")
    assert (tmp_path / "theirs").read_bytes() == b"precious"
    assert (tmp_path / f".a.{'0' * 16}.part").is_symlink()


def test_what_a_killed_process_leaves_is_removed_and_a_living_ones_stays(tmp_path):
    path = tmp_path / "a"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    assert len(names(tmp_path)) == 2
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()
    files.write_file(path, b"whole")
    assert len(names(tmp_path)) == 2 and path.read_bytes() == b"whole"
    writers[1].kill()
    writers[1].wait()
    files.write_file(path, b"again")
    assert names(tmp_path) == ["a"]
    for writer in writers:
        writer.stdout.close()


def test_other_files_beside_it_are_left_alone(tmp_path):
    others = [
        ".a.part",
        ".a.0123.part",
        ".a.0123456789abcdeg.part",
        "a.0123456789abcdef.part",
        ".b.0123456789abcdef.part",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"theirs")
    files.write_file(tmp_path / "a", b"ours")
    assert names(tmp_path) == sorted(["a", *others])


def test_places_that_cannot_be_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"")
    wrong = {
        tmp_path: "is a folder",
        tmp_path / "pipe": "is not a regular file",
        tmp_path / "none" / "a": "its folder does not exist",
        tmp_path / "file" / "a": "cannot write",
        tmp_path / ("n" * 300): "cannot write: File name too long",
    }
    for place, says in wrong.items():
        with pytest.raises(UserError, match=says):
            files.check_place(place)
    files.check_place(tmp_path / "new")
    files.check_place(tmp_path / "file")


def test_a_file_of_lines_is_one_processs(tmp_path):
    fd = files.open_locked(tmp_path / "log")
    with pytest.raises(UserError, match="another run is writing it"):
        files.open_locked(tmp_path / "log")
    files.append_line(fd, tmp_path / "log", b"one\n")
    files.close_log(fd, tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == b"one\n"
    files.close_log(files.open_locked(tmp_path / "empty"), tmp_path / "empty")
    assert names(tmp_path) == ["log"]


OURS = [b'{"id": "a", "source": "x", "n": 1}\n', b'{"id": "b\\"c", "source": "y", "n": 2}\n']
START, KEY = b'{"id": "', b'", "source": "'


def lines_of(path):
    file = files.LineFile(path)
    try:
        return [line for _, line in file.read(lambda n, line: files.is_torn(line, START, KEY, alone=n == 1))]
    finally:
        file.close()


@pytest.mark.parametrize(
    "content",
    [
        b'{"id": 7, "text": "my only copy"}',
        b'{"id": "7", "text": "my only copy"}',
        b'{"id": "7", "text": "my on',
        b'{"id": "my only copy',
        b'{"id": "a", "source": "x", "n": 1}',
        b'{"id": "a", "source": "x", "n": 1}' + b"\0" * 9,
        b'{"id": "a", "source": "x", "n',
        b'{"id',
        b"\0" * 70_000,
        OURS[0] + b'{"id": "b, "so',
        OURS[0] + b'{"id": "b\\',
        OURS[0] + b"buy milk",
    ],
)
def test_opening_a_file_of_lines_changes_nothing(tmp_path, content):
    path = tmp_path / "log"
    path.write_bytes(content)
    lines_of(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "after_ours", "alone"),
    [
        (b'{"id": 7, "text": "my only copy"}', False, False),
        (b'{"id": "7", "text": "my on', False, False),
        (b'{"id": "7", "sou', True, False),
        (b'{"id": "7\\", te', True, False),
        (b'{"id": "7\\', True, False),
        (b'{"id": "7", "source": "x', True, True),
        (b'{"id": "7", "source": "x' + b"\0" * 100, True, True),
        (b'{"id": "7", "source": "x' + b"\0" * 100_000, False, False),
        (b'{"id', True, True),
        (b"\0" * 100, True, True),
        (b"[" * 100_000, False, False),
        (b"9" * 10_000, False, False),
    ],
)
def test_a_line_is_torn_if_it_does_not_parse_and_is_ours(line, after_ours, alone):
    assert files.is_torn(line, START, KEY) is after_ours
    assert files.is_torn(line, START, KEY, alone=True) is alone
    assert not files.is_torn(line + b"\n", START, KEY)


def test_a_torn_line_goes_when_the_next_one_comes(tmp_path):
    path = tmp_path / "log"
    for tail, kept in [(b'{"id": "c", "sou', 2), (OURS[0][:-1], 3), (OURS[0][:-1] + b"\0\0", 3), (b"\0\0", 2)]:
        path.write_bytes(b"".join(OURS) + tail)
        file = files.LineFile(path)
        assert len(list(file.read(lambda n, line: files.is_torn(line, START, KEY, alone=n == 1)))) == kept
        file.append(OURS[1])
        file.close()
        assert path.read_bytes() == b"".join([*[*OURS, OURS[0]][:kept], OURS[1]])


def test_a_file_of_lines_that_is_moved_or_changed_during_a_run(tmp_path):
    def opened():
        (tmp_path / "log").unlink(missing_ok=True)
        file = files.LineFile(tmp_path / "log")
        file.append(OURS[0])
        return file

    file = opened()
    (tmp_path / "log").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="log: was moved, removed or replaced"):
        file.append(OURS[1])
    file.close()
    assert (tmp_path / "moved").read_bytes() == b"".join(OURS)  # nothing is lost of it
    file = opened()
    (tmp_path / "moved").replace(tmp_path / "log")
    with pytest.raises(UserError, match="was moved, removed or replaced"):
        file.append(OURS[1])
    file.close()
    file = opened()
    (tmp_path / "log").unlink()
    with pytest.raises(UserError, match="was moved, removed or replaced"):
        file.rewrite(lambda line: True)
    file.close()
    assert names(tmp_path) == []
    for change in (b"", OURS[0] + b"theirs"):
        file = opened()
        (tmp_path / "log").write_bytes(change)
        with pytest.raises(UserError, match="another program has changed it"):
            file.append(OURS[1])
        file.close()
        assert (tmp_path / "log").exists() == bool(change)


def test_an_empty_file_that_was_there_before_stays(tmp_path):
    (tmp_path / "log").touch()
    lines_of(tmp_path / "log")
    lines_of(tmp_path / "new")
    assert names(tmp_path) == ["log"]
