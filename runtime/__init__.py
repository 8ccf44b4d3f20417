"""llama-cpp-python made long: rope callback, band switching, KV cache, memory, evaluation."""

from .llama import BandChange, Llama
from .memory import KV_TYPES, MemoryPlan, choose_kv, plan_memory

__all__ = ["KV_TYPES", "BandChange", "Llama", "MemoryPlan", "choose_kv", "plan_memory"]
