"""Convert models to GGUF files with a schedule: plan, embed, requantise, split; written whole or not at all."""

from .certify import certify, check_certifiable
from .checkpoint import checkpoint_folder, is_checkpoint
from .embed import embed_schedule, write_embedded
from .from_checkpoint import convert_checkpoint
from .from_gguf import convert_model
from .load_trial import load_problem
from .plan import EXISTING, Plan, plan_extension, plan_given
from .requantise import WEIGHT_TYPES, quantised_types
from .split import in_parts, parse_size, split_model

__all__ = [
    "EXISTING",
    "WEIGHT_TYPES",
    "Plan",
    "certify",
    "check_certifiable",
    "checkpoint_folder",
    "convert_checkpoint",
    "convert_model",
    "embed_schedule",
    "in_parts",
    "is_checkpoint",
    "load_problem",
    "parse_size",
    "plan_extension",
    "plan_given",
    "quantised_types",
    "split_model",
    "write_embedded",
]
