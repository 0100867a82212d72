"""Models by name."""

from chunkft.models.gguf import EMBEDDED
from chunkft.models.load import load_model, resolve_model

__all__ = ["EMBEDDED", "load_model", "resolve_model"]
