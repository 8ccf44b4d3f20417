"""llama-cpp-python with long contexts: rope callback, band switching, KV cache, memory, evaluation."""

from . import threads as threads  # first: it sets how the engines' threads wait, before they are loaded
from .graph.rope import BandChange
from .llama import Llama
from .memory import KV_TYPES, MemoryPlan, choose_kv, plan_memory

__all__ = ["KV_TYPES", "BandChange", "Llama", "MemoryPlan", "choose_kv", "plan_memory"]
