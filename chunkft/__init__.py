"""Full-parameter fine-tuning in the memory of an adapter."""

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.partition import Chunk, Partition, Slice
from chunkft.core.schedule import Schedule
from chunkft.core.store import Store
from chunkft.errors import ChunkFTError

__version__ = "0.1.0"
__all__ = ["Chunk", "ChunkFTError", "ChunkedOptimizer", "Partition", "Schedule", "Slice", "Store"]
