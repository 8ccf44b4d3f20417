"""Models to GGUF files that carry a schedule: read, plan, embed, requantise; written whole or not at all."""

from .embed import embed_schedule
from .model import convert_model
from .plan import EXISTING, Plan, plan_extension, plan_given
from .requantise import WEIGHT_TYPES, quantised_types

__all__ = [
    "EXISTING",
    "WEIGHT_TYPES",
    "Plan",
    "convert_model",
    "embed_schedule",
    "plan_extension",
    "plan_given",
    "quantised_types",
]
