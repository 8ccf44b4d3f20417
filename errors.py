"""The one kind of error a user can mend, and how its messages give sizes.

Every message is one line: what, where, what was expected. The command line prints it and exits with 2;
anything else that is raised is a fault of ours and keeps its traceback.
"""

from __future__ import annotations


def mib(n_bytes: float) -> str:
    """A number of bytes as messages give it: ``1,234 MiB``."""
    return f"{n_bytes / 2**20:,.0f} MiB"


class UserError(ValueError):
    """A mistake in what the user gave: a file, an option, a request the machine cannot meet."""
