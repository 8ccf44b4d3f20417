"""The search for λ and n̂: seeded, and independent of models and of what evaluates a band."""

from .journal import Journal
from .local import InProcess, Processes
from .protocol import Engine, Evaluator, Fidelity, Result, Task
from .run import ALGORITHMS, Event, Note, Outcome, Progress, carried, search
from .settings import Budget, CmaSettings, Evolution, GradientSettings, Racing, Screening, Settings
from .space import Candidate, Space, band_key, usual_near_tokens

__all__ = [
    "ALGORITHMS",
    "Budget",
    "CmaSettings",
    "GradientSettings",
    "Engine",
    "Evaluator",
    "Event",
    "Evolution",
    "Fidelity",
    "Candidate",
    "InProcess",
    "Journal",
    "Note",
    "Outcome",
    "Processes",
    "Progress",
    "Racing",
    "Result",
    "Screening",
    "Settings",
    "Space",
    "Task",
    "band_key",
    "carried",
    "search",
    "usual_near_tokens",
]
