"""Suites of questions about long texts whose answers are known: RULER's tasks, and two more kinds."""

from .asking import Answered, SuitePlan, band_key, tokens_to_read
from .caches import CacheLoss
from .journal import Journal
from .report import AtDepth, Cell, Effective, Report, Row, ShortText
from .run import CACHE_TOKENS, Run, Setting, run_suite
from .scoring import KEPT, Estimate
from .tasks import QUICK, SUITE, TASKS, VERSION, Task, named_tasks

__all__ = [
    "CACHE_TOKENS",
    "KEPT",
    "QUICK",
    "SUITE",
    "TASKS",
    "VERSION",
    "Answered",
    "AtDepth",
    "CacheLoss",
    "Cell",
    "Effective",
    "Estimate",
    "Journal",
    "Report",
    "Row",
    "Run",
    "Setting",
    "ShortText",
    "SuitePlan",
    "Task",
    "band_key",
    "named_tasks",
    "run_suite",
    "tokens_to_read",
]
