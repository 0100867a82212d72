"""Did every trainable element get the optimizer steps it was due?

"Updated" means: took part in a step of its visit with a gradient, zeros included. A parameter that
the forward pass does not use has no gradient; it is listed, never hidden.
"""

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from chunkft.core.partition import Chunk, Partition, Slice
from chunkft.core.schedule import Schedule
from chunkft.errors import CoverageError


@dataclass
class Record:
    """What a slice went through."""

    steps: int = 0
    """Optimizer steps while it was active."""
    updates: int = 0
    """Those with a gradient."""
    last: int = -1
    """Index of the last step with a gradient."""


Book = dict[Slice, Record]


def note(book: Book, pieces: Iterable[Slice], used: Collection[Slice], step: int) -> None:
    """Write down that `pieces` took part in a step, those `used` with a gradient."""
    for piece in pieces:
        record = book[piece]
        record.steps += 1
        if piece in used:
            record.updates += 1
            record.last = step


def warn_unused(book: Book, pieces: Iterable[Slice], known: set[str]) -> set[str]:
    """Warn of parameters that got no gradient in a whole visit; returns their names."""
    unused = {piece.name for piece in pieces if not book[piece].updates}
    if fresh := sorted(unused - known):
        warnings.warn(
            f"no gradient in a whole visit, so not trained: {', '.join(fresh)}", stacklevel=4
        )
    return unused


@dataclass(frozen=True)
class Audit:
    """What a run has trained so far."""

    steps: int
    cycles: int
    waiting: int
    """Elements whose chunk has not been active yet."""
    without_gradient: tuple[str, ...]
    """Parameters that were active but got no gradient: the forward pass does not use them."""
    updates: dict[Slice, int]
    """Optimizer steps with a gradient, per slice."""


def audit(
    partition: Partition,
    own: Sequence[Chunk],
    schedule: Schedule,
    steps: int,
    book: Book,
    exact: bool = False,
) -> Audit:
    """Check the book against what the schedule owed; in exact mode every step owes every chunk.

    Args:
        own: of each chunk what this rank holds.

    Raises:
        CoverageError: a chunk that was active was not stepped, or got no gradient at all.
    """
    owed = steps - schedule.start
    if exact and (late := [p for p, record in book.items() if record.steps < owed]):
        raise CoverageError(f"{late[0]} took {book[late[0]].steps} of {owed} steps")
    cycle = schedule.start + schedule.chunks * schedule.interval
    due = set() if exact else {schedule.chunk(s) for s in range(schedule.start, min(steps, cycle))}
    for k in sorted(due):
        records = [book[piece] for piece in own[k]]
        if not records:  # of a chunk with few rows this rank may have none
            continue
        names = sorted({piece.name for piece in partition[k]})
        if not all(record.steps for record in records):
            raise CoverageError(f"a slice of chunk {k} ({names[0]}, ...) was due but not stepped")
        if not any(record.updates for record in records):
            raise CoverageError(
                f"chunk {k} ({', '.join(names[:3])}, ...) was active but got no gradient: the "
                f"forward pass does not use it; freeze it before building the optimizer"
            )
    unused = {piece.name for piece, record in book.items() if record.steps and not record.updates}
    used = {piece.name for piece, record in book.items() if record.updates}
    return Audit(
        steps,
        steps if exact else schedule.cycle(steps),
        sum(partition.elements(piece) for piece, record in book.items() if not record.steps),
        tuple(sorted(unused - used)),
        {piece: record.updates for piece, record in book.items()},
    )
