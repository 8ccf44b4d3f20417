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
