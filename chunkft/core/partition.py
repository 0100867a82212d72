"""Cut the trainable tensors of a model into K chunks of equal training cost.

The tensors p_1..p_M, in module order and tied ones once, form one stream of bytes of length B.
Rows along axis 0 are its atoms. Two layouts:

    stream   chunk k holds the bytes [kB/K, (k+1)B/K), each cut rounded to a row. Contiguous, so
             backward stops early (ChunkFT, arXiv 2605.21177, section 3).
    spread   every tensor of at least K rows gives each chunk its K-th part, smaller ones are dealt
             out by size. Every layer moves in every step.

Whole stay tensors of fewer than two dimensions and tensors under 1/8 of a chunk: cutting them
saves nothing. No chunk is empty, and imbalance stays near one row per cut.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import gcd, prod
from typing import NamedTuple, overload

from chunkft.errors import PartitionError

LAYOUTS = ("stream", "spread")
WHOLE_BELOW = 1 / 8  # of a chunk's bytes


class Slice(NamedTuple):
    """Rows [start, stop) along axis 0 of the parameter `name`; a 0-d tensor is one row."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


Chunk = tuple[Slice, ...]
Shapes = Mapping[str, tuple[int, ...]]
Block = dict[Slice, Slice]
"""Slices that rest and wake together, each with the slice of the chunk in which it lies."""


class Tensor(NamedTuple):
    """What the cut needs to know of a parameter: its shape and its training cost in bytes."""

    name: str
    shape: tuple[int, ...]
    cost: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_cost(self) -> float:
        return self.cost / self.rows


class Partition(Sequence[Chunk]):
    """Chunks that cover every trainable element exactly once.

    Args:
        shapes: full shape of each trainable parameter, in module order.
        chunks: the slices of each chunk, in module order.

    Raises:
        PartitionError: a row is covered twice or not at all, or a chunk is empty.
    """

    def __init__(self, shapes: Shapes, chunks: Sequence[Sequence[Slice]]):
        position = {name: i for i, name in enumerate(shapes)}
        self.shapes = dict(shapes)
        self._chunks = tuple(
            tuple(sorted(chunk, key=lambda s: (position[s.name], s.start))) for chunk in chunks
        )
        self._check()
        self._sizes = tuple(sum(map(self.elements, chunk)) for chunk in self._chunks)

    def _check(self) -> None:
        covered = dict.fromkeys(self.shapes, 0)
        for piece in sorted(piece for chunk in self._chunks for piece in chunk):
            if piece.start != covered[piece.name] or piece.stop <= piece.start:
                raise PartitionError(
                    f"{piece.name}: rows [{piece.start}, {piece.stop}) follow row "
                    f"{covered[piece.name]}; every row must be in exactly one chunk"
                )
            covered[piece.name] = piece.stop
        for name, stop in covered.items():
            if stop != (rows := self.rows(name)):
                raise PartitionError(f"{name}: {stop} of {rows} rows are in a chunk")
        if empty := [k for k, chunk in enumerate(self._chunks) if not chunk]:
            raise PartitionError(f"chunks {empty} of {len(self._chunks)} are empty")

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Chunk, ...]: ...
    def __getitem__(self, index: int | slice) -> Chunk | tuple[Chunk, ...]:
        return self._chunks[index]

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks)

    def rows(self, name: str) -> int:
        shape = self.shapes[name]
        return shape[0] if shape else 1

    def elements(self, piece: Slice) -> int:
        """Number of elements of a slice."""
        return piece.rows * prod(self.shapes[piece.name][1:])

    def sizes(self) -> list[int]:
        """Elements of each chunk."""
        return list(self._sizes)

    def is_whole(self, piece: Slice) -> bool:
        return piece.rows == self.rows(piece.name)


def cut(
    tensors: Sequence[Tensor],
    chunks: int,
    layout: str,
    whole: bool = False,
    grain: int = 1,
    shards: int = 1,
) -> Partition:
    """Cut `tensors` into `chunks` chunks; with `whole`, at their borders only.

    Within a tensor cuts lie where a multiple of `grain` elements precedes them. Of tensors whose
    rows `shards` ranks share in equal parts, each part is cut alike: every rank has an equal part
    of every chunk.

    Raises:
        PartitionError: nothing to train, chunks < 1, or more chunks than there are atoms.
    """
    tensors = [t for t in tensors if t.cost > 0]
    if not tensors:
        raise PartitionError(
            "the model has no trainable element: set requires_grad before building the optimizer"
        )
    if layout not in LAYOUTS:
        raise PartitionError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
    shapes, full = {t.name: t.shape for t in tensors}, tensors
    if shards > 1:
        tensors = [_shard(t, shards) for t in tensors]
    total = sum(t.cost for t in tensors)
    whole_below = WHOLE_BELOW * total / max(chunks, 1)
    uncut = [whole or len(t.shape) < 2 or t.cost < whole_below for t in tensors]
    heights = [  # rows of an atom
        t.rows if one else grain // gcd(grain, prod(t.shape[1:]))
        for one, t in zip(uncut, tensors, strict=True)
    ]
    atoms = [-(-t.rows // height) for t, height in zip(tensors, heights, strict=True)]
    if not 1 <= chunks <= sum(atoms):
        places = (
            "tensors of this model, within which this rule allows no cut"
            if whole
            else ("rows this model can be cut at")
        )
        raise PartitionError(
            f"chunks={chunks} is outside 1..{sum(atoms)}, the {places}; "
            f"choose a number in that range"
        )
    deal = _stream if layout == "stream" else _spread
    found = deal(tensors, atoms, heights, chunks)
    if shards > 1:
        rows = {t.name: t.rows for t in full}
        found = [_on_all(chunk, rows, shards) for chunk in found]
    return Partition(shapes, found)


def _shard(tensor: Tensor, shards: int) -> Tensor:
    """The rows of the first rank, who has the most."""
    rows = -(-tensor.rows // shards)
    return Tensor(tensor.name, (rows, *tensor.shape[1:]), -(-tensor.cost * rows // tensor.rows))


def _on_all(chunk: list[Slice], rows: Mapping[str, int], shards: int) -> list[Slice]:
    """The slices of the first rank, and those of all others that have as many rows."""
    found: list[Slice] = []
    for name, start, stop in chunk:
        each = -(-rows[name] // shards)
        for first in range(0, rows[name], each):
            last = min(first + stop, first + each, rows[name])
            if last > first + start:
                found.append(Slice(name, first + start, last))
    return found


def blocks(
    chunk: Chunk,
    shapes: Shapes,
    size: int,
    whole: bool = False,
    grain: int = 1,
) -> list[Block]:
    """`chunk` in parts of at most `size` elements, or of one atom where that is more.

    Atoms are as in `cut`: whole slices with `whole`, and of tensors of fewer than two dimensions.
    """
    found: list[Block] = [{}]
    room = size
    for piece in chunk:
        shape = shapes[piece.name]
        row = prod(shape[1:])
        atom = piece.rows if whole or len(shape) < 2 else grain // gcd(grain, row)
        start = piece.start
        while start < piece.stop:
            rows = max(room // row // atom * atom, 0 if found[-1] else atom)
            stop = min(start + rows, piece.stop)
            if stop > start:
                found[-1][Slice(piece.name, start, stop)] = piece
                room -= (stop - start) * row
                start = stop
            if start < piece.stop:
                found.append({})
                room = size
    return found


def _stream(
    tensors: Sequence[Tensor], atoms: list[int], heights: list[int], chunks: int
) -> list[list[Slice]]:
    offsets = [0, *accumulate(t.cost for t in tensors)]  # O_i, bytes before tensor i
    firsts = [0, *accumulate(atoms)]  # atoms before tensor i
    total, cuts = offsets[-1], [0]
    for k in range(1, chunks):
        limit = k * total / chunks
        i = min(bisect_right(offsets, limit), len(tensors)) - 1
        atom = firsts[i] + round((limit - offsets[i]) / (tensors[i].cost / atoms[i]))
        # one atom at least for this chunk and for each that is still to come
        cuts.append(min(max(atom, cuts[-1] + 1), firsts[-1] - (chunks - k)))
    cuts.append(firsts[-1])

    result: list[list[Slice]] = []
    for low, high in pairwise(cuts):
        chunk: list[Slice] = []
        for i in range(bisect_right(firsts, low) - 1, len(tensors)):
            if firsts[i] >= high:
                break
            start, stop = max(low - firsts[i], 0), min(high - firsts[i], atoms[i])
            last = min(stop * heights[i], tensors[i].rows)  # the last atom may be lower
            chunk.append(Slice(tensors[i].name, start * heights[i], last))
        result.append(chunk)
    return result


def _spread(
    tensors: Sequence[Tensor], atoms: list[int], heights: list[int], chunks: int
) -> list[list[Slice]]:
    result: list[list[Slice]] = [[] for _ in range(chunks)]
    filled = [0.0] * chunks
    # Largest atoms first: what follows is small enough to even out what came before. An empty
    # chunk is the emptiest, so none stays so.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].cost / atoms[i])
    for i in order:
        tensor, parts = tensors[i], min(atoms[i], chunks)
        least, extra = divmod(atoms[i], parts)
        emptiest = sorted(range(chunks), key=lambda k: (filled[k], k))
        generous = set(emptiest[:extra])  # these get one atom more
        start = 0
        for k in sorted(emptiest[:parts]):
            stop = min(start + (least + (k in generous)) * heights[i], tensor.rows)
            result[k].append(Slice(tensor.name, start, stop))
            filled[k] += (stop - start) * tensor.row_cost
            start = stop
    return result
