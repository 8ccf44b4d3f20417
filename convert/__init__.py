"""Models to GGUF files that carry a schedule: read, embed, requantise; written whole or not at all."""

from .embed import embed_schedule

__all__ = ["embed_schedule"]
