"""How good a band is, measured on real text: passages and what is scored in them, evaluators, searches, evaluations."""

from .evaluators import EvaluatorRecipe, EvaluatorSpec, faster, make_evaluator
from .held_out import Verdict
from .passages import Passage, Text, make_passages, split_texts
from .passkey import HiddenKey, KeyReading, hide_key, read_key
from .readings import (
    BIN,
    Difference,
    KeyPassage,
    Reading,
    Readings,
    band_by_method,
    compared,
    key_passages,
    read_passage,
    reader,
    reading_key,
)
from .search_schedule import (
    FoundBand,
    Judging,
    SearchEvent,
    Searching,
    SearchPlan,
    default_contexts,
    search_schedule,
)

__all__ = [
    "BIN",
    "Difference",
    "EvaluatorRecipe",
    "EvaluatorSpec",
    "FoundBand",
    "HiddenKey",
    "Judging",
    "KeyPassage",
    "KeyReading",
    "Passage",
    "Reading",
    "Readings",
    "SearchEvent",
    "SearchPlan",
    "Searching",
    "Text",
    "Verdict",
    "band_by_method",
    "compared",
    "default_contexts",
    "faster",
    "hide_key",
    "key_passages",
    "make_evaluator",
    "make_passages",
    "read_key",
    "read_passage",
    "reader",
    "reading_key",
    "search_schedule",
    "split_texts",
]
