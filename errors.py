"""The error that a user can fix, and how sizes are written in its messages.

Every message is one line: what, where, what was expected. The command line prints it and exits with 2;
any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


def mib(n_bytes: float) -> str:
    """A number of bytes as text for a message: ``1,234 MiB``."""
    return f"{n_bytes / 2**20:,.0f} MiB"


class UserError(ValueError):
    """An error in the user's input: a file, an option, or a request that the machine cannot meet."""
