"""Hugging Face checkpoints: what lies in their folders, and what their weights and words become in GGUF."""

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
