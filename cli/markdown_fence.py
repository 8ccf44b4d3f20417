"""The line that begins or ends a block of code in Markdown."""

from __future__ import annotations

import re

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
"""Its marks, and what stands behind them: the name of a language, or nothing at the end."""
