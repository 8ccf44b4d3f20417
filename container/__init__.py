"""GGUF files: a bounds-checked reader of the header, what it says about RoPE, and the schedule that a file carries."""

from .architectures import (
    ARCHITECTURES_WITHOUT_ROPE,
    NATIVE_FACTOR_ARCHITECTURES,
    has_rope,
    takes_native_factors,
)
from .certificate import Certificate, certificate_of, certificate_values, schedule_digest
from .digest import model_digest, uncertified_digest
from .facts import FREQS, LONG, SHORT, freq_scale, native_schedule, plain_context, rope_facts
from .header import Entry, GGUFError, Header, Tensor
from .kinds import check_has_tensors, check_is_model
from .parts import model_parts
from .reader import read_header
from .schedule_keys import PREFIX, embedded_schedule, schedule_of, schedule_values, trained_schedule
from .stock import what_stock_does
from .tensor_types import TENSOR_TYPES, TYPE_NUMBERS, type_name
from .values import EVALUATION, Value, ValueType

__all__ = [
    "ARCHITECTURES_WITHOUT_ROPE",
    "EVALUATION",
    "FREQS",
    "LONG",
    "NATIVE_FACTOR_ARCHITECTURES",
    "PREFIX",
    "SHORT",
    "TENSOR_TYPES",
    "TYPE_NUMBERS",
    "Certificate",
    "Entry",
    "GGUFError",
    "Header",
    "Tensor",
    "Value",
    "ValueType",
    "certificate_of",
    "certificate_values",
    "check_has_tensors",
    "check_is_model",
    "embedded_schedule",
    "freq_scale",
    "has_rope",
    "model_digest",
    "model_parts",
    "native_schedule",
    "plain_context",
    "read_header",
    "rope_facts",
    "schedule_digest",
    "schedule_of",
    "schedule_values",
    "takes_native_factors",
    "trained_schedule",
    "type_name",
    "uncertified_digest",
    "what_stock_does",
]
