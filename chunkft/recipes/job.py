"""What one `chunkft` command line asks for."""

from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig

from chunkft.train.config import ChunkArguments


@dataclass
class Job:
    """One command line, parsed."""

    script: Any
    """TRL's, of the command's script."""
    training: Any
    """TRL's configuration of the command's trainer."""
    model: ModelConfig
    mixture: Any
    chunk: ChunkArguments
    given: set[str] = field(default_factory=set)
    """Names of the settings that the user wrote down."""
    command: str = "chunkft sft"
    """As it was typed, for the report and the line that resumes."""
