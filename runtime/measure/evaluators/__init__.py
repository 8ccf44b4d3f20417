"""Evaluators for the search: a band's loss, by llama.cpp on the file itself or by torch on its weights."""

from .choice import EvaluatorRecipe, faster, make_evaluator
from .spec import EvaluatorSpec, Kind

__all__ = ["EvaluatorRecipe", "EvaluatorSpec", "Kind", "faster", "make_evaluator"]
