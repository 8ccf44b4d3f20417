"""Tab completion in the shells that have it: the script that installs it, and what it then offers."""

import os
import subprocess
import sys

import pytest

ASKED = {
    "bash": lambda typed: {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)},
    "zsh": lambda typed: {"_TYPER_COMPLETE_ARGS": typed},
    "fish": lambda typed: {"_TYPER_COMPLETE_ARGS": typed, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


def complete(shell, typed):
    environment = {**os.environ, "_ROPEWALK_COMPLETE": f"complete_{shell}", **ASKED[shell](typed)}
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'ropewalk'; from ropewalk.cli.main import main; main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done
    return done.stdout


@pytest.mark.parametrize("shell", ASKED)
def test_commands_and_options_are_offered(shell):
    commands = complete(shell, "ropewalk s")
    assert "summarize" in commands and "search" in commands and "convert" not in commands
    options = complete(shell, "ropewalk eval --p")
    assert "--passages" in options and "--plot" in options and "--text" not in options


@pytest.mark.parametrize("shell", ASKED)
def test_the_script_that_installs_it_is_shown(shell):
    environment = {**os.environ, "_ROPEWALK_COMPLETE": f"source_{shell}"}
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'ropewalk'; from ropewalk.cli.main import main; main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "_ROPEWALK_COMPLETE" in done.stdout and "ropewalk" in done.stdout


@pytest.mark.parametrize("shell", ASKED)
def test_what_an_option_or_an_argument_may_be_is_offered(shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "state/ropewalk/conversations/monday").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    for name in ("a.gguf", "b.gguf", "notes.txt"):
        (tmp_path / "models" / name).touch()
    models = complete(shell, "ropewalk chat mod")
    assert "models/a.gguf" in models and "models/b.gguf" in models and "notes" not in models
    assert "models/a.gguf" in complete(shell, "ropewalk chat --model models/a")
    assert "q8_0" in complete(shell, "ropewalk chat --kv q8")
    assert "monday" in complete(shell, "ropewalk chat --load mon")
