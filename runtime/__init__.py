"""llama-cpp-python made long: rope callback, band switching, KV cache, memory, evaluation."""

from .llama import Llama

__all__ = ["Llama"]
