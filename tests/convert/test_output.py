"""The output appears whole or not at all: refusals, full disks, two runs at once, signals at any moment, memory."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
from ropewalk.container import GGUFError, read_header
from ropewalk.convert import convert_model, embed_schedule, plan_extension
from ropewalk.convert.output import output_file
from ropewalk.errors import UserError

MIB = 1 << 20


@pytest.fixture
def source(tiny_llama, tmp_path):
    (tmp_path / "in").mkdir()
    return tiny_llama(tmp_path / "in" / "in.gguf")


@pytest.fixture
def schedule(source):
    return plan_extension(read_header(source), 1024, "yarn").schedule


@pytest.fixture
def place(tmp_path):
    """An empty folder to write into."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def sparse_model(path, n_bytes):
    """A file that llama.cpp would take for a model of one huge tensor, of zeros that take no disk space."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_head_count(2)
    writer.add_tensor_info("huge.weight", (n_bytes // 4,), np.dtype(np.float32), n_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("rb+") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + n_bytes)
    return path


@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_an_output_is_refused(source, schedule, place, force):
    folder = place / "folder"
    folder.mkdir()
    (place / "link.gguf").symlink_to(source)
    os.link(source, place / "hard.gguf")
    os.mkfifo(place / "pipe")
    wrong = {
        source: "the output is the input",
        place / "link.gguf": "the output is the input",
        place / "hard.gguf": "the output is the input",
        folder: "is a folder",
        place / "pipe": "is not a regular file",
        place / "none" / "out.gguf": "no such folder",
        source / "out.gguf": "[Nn]o(t a directory|t a folder| such folder)",
        place / ("x" * 300): "File name too long",
    }
    before, whole = names(place), source.read_bytes()
    for target, message in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            embed_schedule(source, target, schedule, force=force)
        assert "\n" not in str(caught.value)
    assert names(place) == before and source.read_bytes() == whole


def test_an_existing_output_is_replaced_with_force_only(source, schedule, place):
    target = place / "out.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(UserError, match="already exists"):
        embed_schedule(source, target, schedule)
    assert target.read_bytes() == b"precious"
    embed_schedule(source, target, schedule, force=True)
    assert read_header(target).get("llama.context_length") == 1024
    assert names(place) == ["out.gguf"]


def test_an_output_that_appears_in_the_meantime_is_not_touched(source, place):
    target = place / "out.gguf"
    with pytest.raises(UserError, match="exists now"), output_file(target, source=source) as output:
        output.part.write_bytes(b"ours")
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs" and names(place) == ["out.gguf"]


def test_a_second_run_on_the_same_output_is_refused_and_harms_nothing(source, schedule, place):
    target = place / "out.gguf"
    with output_file(target, source=source) as output:
        output.part.write_bytes(b"ours")
        with pytest.raises(UserError, match="another run is writing it"):
            embed_schedule(source, target, schedule, force=True)
    assert target.read_bytes() == b"ours" and names(place) == ["out.gguf"]


def test_a_run_that_starts_while_another_ends_keeps_its_part(source, place):
    """The first has published, and still holds its lock, when the second claims the same name."""
    target = place / "out.gguf"
    with output_file(target, source=source, force=True) as first:
        first.part.write_bytes(b"first")
        first.part.replace(target)
        with output_file(target, source=source, force=True) as second:
            second.part.write_bytes(b"second")
            first.part.read_bytes()
            first.part.replace(target)
            with output_file(target, source=source, force=True) as third:
                third.part.write_bytes(b"third")
            second.part.write_bytes(b"late")
        first.part.write_bytes(b"later")
    assert target.read_bytes() == b"later"


@pytest.mark.parametrize(
    "ending", [KeyboardInterrupt, SystemExit, RuntimeError, OSError(28, "No space left on device")]
)
def test_nothing_is_left_after_any_exception(source, place, ending):
    with pytest.raises((BaseException, UserError)), output_file(place / "out.gguf", source=source) as output:
        output.part.write_bytes(b"half")
        output.scratch.write_bytes(b"half")
        raise ending
    assert names(place) == []


def test_a_leftover_of_a_killed_run_is_replaced(source, schedule, place):
    (place / ".out.gguf.part").write_bytes(b"leftover" * 1000)
    (place / ".out.gguf.scratch.part").write_bytes(b"leftover")
    embed_schedule(source, place / "out.gguf", schedule)
    assert names(place) == ["out.gguf"]
    read_header(place / "out.gguf")


def limited(limit, code, *args):
    """Run Python code in a process whose files may not grow past `limit` bytes."""
    start = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    command = [sys.executable, "-c", start + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


CONVERT = """
import sys
from ropewalk.convert import convert_model, plan_extension
from ropewalk.container import read_header
from ropewalk.errors import UserError
source, target, kind, *_ = sys.argv[1:]
try:
    schedule = plan_extension(read_header(source), 1024, "yarn").schedule
    convert_model(source, target, schedule=schedule, weight_type=kind or None)
except UserError as error:
    sys.exit(f"mistake: {error}")
"""


@pytest.mark.parametrize("kind", ["", "f16"])
def test_a_file_that_may_not_grow(source, place, kind):
    done = limited(100_000, CONVERT, source, place / "out.gguf", kind)
    assert done.returncode == 1 and done.stderr.startswith("mistake: ") and done.stderr.count("\n") == 1
    assert f"{place / 'out.gguf'}: cannot write" in done.stderr
    assert names(place) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("kind", ["", "f16"])
def test_a_full_disk(source, schedule, place, kind):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(UserError, match=r"not enough disk space: .* needed, .* free"):
            convert_model(source, place / "out.gguf", schedule=schedule, weight_type=kind or None)
        assert names(place) == []
    finally:
        subprocess.run(["umount", place], check=True)


WATCH_MEMORY = """
import resource, sys
from ropewalk.container import read_header
from ropewalk.convert import embed_schedule, plan_extension
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
schedule = plan_extension(read_header(sys.argv[1]), 1024, "yarn").schedule
embed_schedule(sys.argv[1], sys.argv[2], schedule)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(place):
    source = sparse_model(place / "in.gguf", 500 * MIB)
    try:
        command = [sys.executable, "-c", WATCH_MEMORY, source, place / "out.gguf"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert (place / "out.gguf").stat().st_size > 500 * MIB
        assert int(done.stdout) < 100, "MiB above what the imports took"
    finally:
        for path in place.iterdir():
            path.unlink()


def test_memory_does_not_grow_with_the_metadata(tiny_llama, place):
    def large_arrays(writer):
        writer.add_array("test.numbers", list(range(300_000)))
        writer.add_array("test.texts", ["some text to fill the file with " * 10] * 200_000)

    source = tiny_llama(place / "in.gguf", extend=large_arrays)
    command = [sys.executable, "-c", WATCH_MEMORY, source, place / "out.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50


@pytest.mark.parametrize("kind", ["", "q8_0"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_moment(smollm2, place, end, kind):
    """No output, or a whole one; nothing else after SIGTERM and Ctrl-C; and no leftover stops the next run."""
    target = place / "out.gguf"
    options = ["convert", smollm2, target, "--context", "16384", *(["--type", kind] if kind else [])]
    command = [sys.executable, "-c", "from ropewalk.cli.main import main; main()", *map(str, options)]
    rng = random.Random(f"{end} {kind}")
    for _ in range(2):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 20
        while not any(place.iterdir()) and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2.0 if kind else 0.25))
        run.send_signal(end)
        _, errors = run.communicate(timeout=30)
        if run.returncode == 0 or target.exists():
            assert read_header(target).get("llama.context_length") == 16384
            target.unlink()
        else:
            assert run.returncode in (-end, 128 + end) and b"Traceback" not in errors, errors
        if end != signal.SIGKILL:
            assert names(place) == []
    schedule = plan_extension(read_header(smollm2), 16384, "yarn").schedule
    embed_schedule(smollm2, target, schedule)
    assert names(place) == ["out.gguf"]


def test_two_runs_at_once(smollm2, place):
    code = CONVERT.replace("1024", "16384")
    command = [sys.executable, "-c", code, smollm2, place / "out.gguf", ""]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [run.communicate(timeout=60)[1] for run in runs]
    codes = sorted(run.returncode for run in runs)
    assert codes == [0, 1, 1], errors
    assert all(text == "" or "another run is writing it" in text or "exists" in text for text in errors)
    assert names(place) == ["out.gguf"]
    assert read_header(place / "out.gguf").get("llama.context_length") == 16384


def test_a_source_that_shrinks_while_it_is_read(source, schedule, place):
    def cut(done, total):
        with source.open("rb+") as file:
            file.truncate(read_header_start + 10)

    read_header_start = read_header(source).data_start
    with pytest.raises(GGUFError, match="became shorter"):
        embed_schedule(source, place / "out.gguf", schedule, on_progress=cut)
    assert names(place) == []


def test_progress_reaches_its_end(source, schedule, place):
    seen = []
    embed_schedule(source, place / "out.gguf", schedule, on_progress=lambda done, total: seen.append((done, total)))
    size = (place / "out.gguf").stat().st_size
    assert seen[-1] == (size, size) and seen == sorted(seen)


def test_a_name_as_long_as_the_file_system_takes(source, place):
    target = place / f"{'n' * 250}.gguf"
    with output_file(target, source=source) as output:
        output.part.write_bytes(b"ours")
    assert target.read_bytes() == b"ours" and [path.name for path in place.iterdir()] == [target.name]


def test_messages_name_the_output(source, place):
    with pytest.raises(UserError) as error, output_file(place / "out.gguf", source=source) as output:
        raise UserError(f"{output.scratch}: broken")
    assert str(error.value) == f"{place / 'out.gguf'}: broken"
