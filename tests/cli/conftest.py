"""Fixtures to run a command in this process, where torch is loaded only once.

Loading it in another process takes about three seconds of CPU time. Tests that kill, send signals or need a terminal
start one nevertheless.
"""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from ropewalk.cli.main import main


@contextmanager
def standard_streams(*files):
    """Use these files as standard input, output and error, for Python and for what C prints."""
    saved, streams = [os.dup(number) for number in range(3)], (sys.stdin, sys.stdout, sys.stderr)
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
    options = {"encoding": "utf-8", "closefd": False}
    try:
        with (
            open(0, **options) as sys.stdin,
            open(1, "w", **options) as sys.stdout,
            open(2, "w", **options) as sys.stderr,
        ):
            yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, file in enumerate(saved):
            os.dup2(file, number)
            os.close(file)


def run_here(*arguments, cwd=".", stdin=b""):
    argv, folder, handler = sys.argv, Path.cwd(), signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryFile() as input_file, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        input_file.write(stdin)
        input_file.seek(0)
        try:
            os.chdir(cwd)
            sys.argv = ["ropewalk", *map(str, arguments)]
            with standard_streams(input_file, out, err), pytest.raises(SystemExit) as ended:
                main()
        finally:
            sys.argv = argv
            os.chdir(folder)
            signal.signal(signal.SIGTERM, handler)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, ended.value.code, out.read().decode(), err.read().decode())


@pytest.fixture(scope="session")
def ropewalk_command():
    """``ropewalk_command(*arguments, cwd=…, stdin=b"…")`` is a `subprocess.CompletedProcess`, its output as text."""
    return run_here


@pytest.fixture(scope="session")
def mistake():
    """``mistake(*arguments)`` is the one-line error message that `ropewalk` prints for a user error."""

    def message(*arguments, **options):
        done = run_here(*arguments, **options)
        assert done.returncode == 2 and done.stdout == "", done
        assert done.stderr.startswith("ropewalk: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    return message
