"""The innermost loops in C: attention, products, cached keys and the graph callback, compiled with the installation.

`library` loads them. Of ggml they know what `ggml_tensor.h` says, and of λ what a node is set to; nothing of models or
caches.
"""

from .library import (
    Context,
    InstructionSet,
    KeyCache,
    KeyRotation,
    NearWindow,
    RopeSetting,
    exact_by_default,
    instruction_sets,
    instructions_in_use,
    what_is_used,
    why_missing,
)

__all__ = [
    "Context",
    "InstructionSet",
    "KeyCache",
    "KeyRotation",
    "NearWindow",
    "RopeSetting",
    "exact_by_default",
    "instruction_sets",
    "instructions_in_use",
    "what_is_used",
    "why_missing",
]
