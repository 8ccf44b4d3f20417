"""The one kind of error a user can mend.

Every message is one line: what, where, what was expected. The command line prints it and exits with 2;
anything else that is raised is a fault of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: a file, an option, a request the machine cannot meet."""
