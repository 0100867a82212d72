"""Which chunk is active at step t: a pure function of (seed, step), so a resumed run knows it.

    k(t) = order_c[floor(t / T) mod K],   c = floor(t / (K T)) the cycle

`cyclic` takes the chunks in index order, `reversed` backwards, `shuffled` draws a new order for
every cycle (ChunkFT, arXiv 2605.21177, section 3; BAdam calls the last one random).
"""

from dataclasses import dataclass
from random import Random

from chunkft.errors import InputError

ORDERS = ("cyclic", "shuffled", "reversed")


@dataclass(frozen=True)
class Schedule:
    """step -> chunk.

    Raises:
        InputError: chunks or interval below 1, or an unknown order.
    """

    chunks: int
    """K, chunks in a cycle."""
    interval: int = 20
    """T, optimizer steps of one visit."""
    order: str = "cyclic"
    """cyclic | shuffled | reversed."""
    seed: int = 0
    """Of the shuffled order."""
    start: int = 0
    """The step at which cycle 0 began; moves when a state is loaded into another K."""

    def __post_init__(self) -> None:
        for name, value in (("chunks", self.chunks), ("interval", self.interval)):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if self.order not in ORDERS:
            raise InputError(f"order={self.order!r} is not one of {', '.join(ORDERS)}")

    def chunk(self, step: int) -> int:
        """Index of the chunk that step `step` (0-based) trains."""
        visit = (step - self.start) // self.interval
        cycle, place = divmod(visit, self.chunks)
        if self.order == "cyclic":
            return place
        if self.order == "reversed":
            return self.chunks - 1 - place
        order = list(range(self.chunks))
        Random(f"{self.seed}/{cycle}").shuffle(order)
        return order[place]

    def cycle(self, step: int) -> int:
        """Completed cycles before step `step`."""
        return (step - self.start) // (self.interval * self.chunks)

    def last_step_of_visit(self, step: int) -> bool:
        return (step - self.start + 1) % self.interval == 0
