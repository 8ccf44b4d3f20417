"""Hugging Face checkpoints: what is in their folders, and what their config and weights become in GGUF."""

from .architectures import ARCHITECTURES, Architecture, architecture_of
from .config import Config, read_config
from .folder import Checkpoint, StoredTensor, open_checkpoint
from .hub import checkpoint_folder, is_checkpoint

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Checkpoint",
    "Config",
    "StoredTensor",
    "architecture_of",
    "checkpoint_folder",
    "is_checkpoint",
    "open_checkpoint",
    "read_config",
]
