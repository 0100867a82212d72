"""Every error this package raises on purpose, one tree.

The leaves are also `ValueError` (something you gave is wrong) or `RuntimeError` (something went
wrong while it ran), so code that knows nothing of chunkft catches them as it would any other.
A message carries the value, the bound and the cure.
"""


class ChunkFTError(Exception):
    """Root of the tree."""


class InputError(ChunkFTError, ValueError):
    """A setting, file or argument is wrong; the command line turns it into exit code 2."""


class PartitionError(InputError):
    """The model cannot be cut as asked (no trainable tensor, more chunks than rows)."""


class StateError(ChunkFTError, ValueError):
    """A saved state does not belong to this model or cannot be cut this way."""


class ReplacedParameterError(ChunkFTError, RuntimeError):
    """A Parameter object of the model was replaced after the optimizer was built."""


class NonFiniteGradientError(ChunkFTError, RuntimeError):
    """The gradient norm is NaN or infinite; nothing was written."""


class LostGradientError(ChunkFTError, RuntimeError):
    """An active slice took part in the forward pass but its gradient was lost."""


class CoverageError(ChunkFTError, RuntimeError):
    """Some trainable element did not get the steps it was due."""


class UnsupportedError(ChunkFTError, RuntimeError):
    """A surrounding (data parallel, reentrant checkpointing, ...) that would train wrongly."""


class ContaminationError(ChunkFTError, RuntimeError):
    """Packed sequences see each other."""


class CheckpointError(ChunkFTError, RuntimeError):
    """A checkpoint is torn, or belongs to another run."""
