"""What tests of the commands share."""

import signal
import sys

import pytest
from ropewalk.cli.main import main


@pytest.fixture
def mistake(monkeypatch, capsys):
    """``mistake(*arguments)`` is the one line that `ropewalk` says; in this process, which is faster."""
    terminated = signal.getsignal(signal.SIGTERM)

    def said(*arguments):
        monkeypatch.setattr(sys, "argv", ["ropewalk", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == 2 and printed.out == "", printed
        assert printed.err.startswith("ropewalk: ") and printed.err.count("\n") == 1, printed.err
        return printed.err

    yield said
    signal.signal(signal.SIGTERM, terminated)
