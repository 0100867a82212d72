"""Every error this package raises on purpose, one tree.

The leaves are also `ValueError` (something you gave is wrong) or `RuntimeError` (something went
wrong while it ran), so code that knows nothing of chunkft catches them as it would any other.
A message carries the value, the bound and the cure.
"""

from collections.abc import Iterator
from contextlib import contextmanager

WHERE = " (CHUNKFT_TRACEBACK=1 shows where)"
TOLD = 400  # characters of another package's message


class ChunkFTError(Exception):
    """Root of the tree."""


class InputError(ChunkFTError, ValueError):
    """A setting, file or argument is wrong; the command line turns it into exit code 2."""


class NoLayersError(InputError):
    """The model has nothing that could visit the device part by part."""


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


class DriftError(ChunkFTError, RuntimeError):
    """Ranks that must have the same weights have parted."""


class CoverageError(ChunkFTError, RuntimeError):
    """Some trainable element did not get the steps it was due."""


class UnsupportedError(ChunkFTError, RuntimeError):
    """A surrounding (data parallel, reentrant checkpointing, ...) that would train wrongly."""


class ContaminationError(ChunkFTError, RuntimeError):
    """Packed sequences see each other."""


class ReferenceMismatchError(ChunkFTError, RuntimeError):
    """The reference of a preference or RL run is not the model that it begins with."""


class RewardError(ChunkFTError, RuntimeError):
    """A reward raised, took too long, or returned something else than a number a completion."""


class CheckpointError(ChunkFTError, RuntimeError):
    """A checkpoint is torn, or belongs to another run."""


# what transformers, trl, peft and torch raise on settings that do not fit
FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def as_input_error(doing: str) -> Iterator[None]:
    """Turn what another package raises while `doing` into an InputError of one line.

    Its traceback is kept as the cause; the command line shows it on demand.
    """
    try:
        yield
    except ChunkFTError:
        raise
    except FOREIGN as error:
        raise InputError(f"{doing}: {type(error).__name__}: {one_line(error)}{WHERE}") from error


def one_line(error: BaseException) -> str:
    """What `error` says, or its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= TOLD else text[: TOLD - 3] + "..."
