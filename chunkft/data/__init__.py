"""Where records come from, and how they share a row."""

from chunkft.data.lengths import Lengths, check_lengths
from chunkft.data.packing import Isolation, check_isolation
from chunkft.data.sources import load_records
from chunkft.data.tasks import ReasoningGymTask

__all__ = [
    "Isolation",
    "Lengths",
    "ReasoningGymTask",
    "check_isolation",
    "check_lengths",
    "load_records",
]
