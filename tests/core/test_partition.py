"""Every element in exactly one chunk, chunks of equal cost, whatever the model looks like."""

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chunkft import ChunkedOptimizer
from chunkft.core.partition import LAYOUTS, WHOLE_BELOW, Partition, Slice, Tensor, cut
from chunkft.errors import InputError, PartitionError
from tests.conftest import llama_tensors

shapes = st.lists(st.integers(1, 12), max_size=3).map(tuple)
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
fast = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def models(draw: st.DrawFn) -> list[Tensor]:
    found = draw(st.lists(st.tuples(shapes, st.sampled_from([12, 14, 24])), min_size=1, max_size=9))
    return [Tensor(f"p{i}", shape, prod(shape) * cost) for i, (shape, cost) in enumerate(found)]


def is_whole(tensor: Tensor, tensors: list[Tensor], chunks: int) -> bool:
    """Whether the cut may not part this tensor."""
    chunk = sum(t.cost for t in tensors) / chunks
    return len(tensor.shape) < 2 or tensor.cost < WHOLE_BELOW * chunk


def most_chunks(tensors: list[Tensor]) -> int:
    """The largest K that every smaller K is possible with, too."""
    return sum(1 if len(t.shape) < 2 else t.rows for t in tensors if t.cost)


def cuts(draw: st.DataObject, tensors: list[Tensor], layout: str) -> tuple[int, Partition]:
    """Some K that can be, and the partition."""
    chunks = draw.draw(st.integers(1, most_chunks(tensors)))
    atoms = sum(1 if is_whole(t, tensors, chunks) else t.rows for t in tensors)
    chunks = min(chunks, atoms)
    try:
        return chunks, cut(tensors, chunks, layout)
    except PartitionError as e:  # a smaller K makes more tensors whole
        assert "is outside" in str(e)
        return 1, cut(tensors, 1, layout)


def atom_cost(tensors: list[Tensor], chunks: int) -> float:
    return max(t.cost if is_whole(t, tensors, chunks) else t.row_cost for t in tensors)


@both_layouts
@fast
@given(models(), st.data())
def test_every_row_once_and_no_chunk_empty(
    layout: str, tensors: list[Tensor], data: st.DataObject
) -> None:
    chunks, partition = cuts(data, tensors, layout)
    assert len(partition) == chunks
    seen = [(s.name, row) for chunk in partition for s in chunk for row in range(s.start, s.stop)]
    assert len(seen) == len(set(seen))
    assert set(seen) == {(t.name, row) for t in tensors for row in range(t.rows)}
    assert all(chunk and all(s.rows > 0 for s in chunk) for chunk in partition)
    assert sum(partition.sizes()) == sum(prod(t.shape) for t in tensors)


@both_layouts
@fast
@given(models(), st.data())
def test_vectors_and_small_tensors_stay_whole(
    layout: str, tensors: list[Tensor], data: st.DataObject
) -> None:
    chunks, partition = cuts(data, tensors, layout)
    pieces = [s for chunk in partition for s in chunk]
    for tensor in tensors:
        mine = [s for s in pieces if s.name == tensor.name]
        if is_whole(tensor, tensors, chunks):
            assert mine == [Slice(tensor.name, 0, tensor.rows)] and partition.is_whole(mine[0])


@fast
@given(models(), st.data())
def test_stream_is_contiguous_and_even(tensors: list[Tensor], data: st.DataObject) -> None:
    chunks, partition = cuts(data, tensors, "stream")
    order = {t.name: i for i, t in enumerate(tensors)}
    flat = [s for chunk in partition for s in chunk]
    assert flat == sorted(flat, key=lambda s: (order[s.name], s.start))
    cost = {t.name: t.row_cost for t in tensors}
    most = max(sum(s.rows * cost[s.name] for s in chunk) for chunk in partition)
    mean = sum(t.cost for t in tensors) / chunks
    assert most <= mean + atom_cost(tensors, chunks) + 1e-6


@fast
@given(models(), st.data())
def test_spread_is_even_and_shares_every_tensor(tensors: list[Tensor], data: st.DataObject) -> None:
    chunks, partition = cuts(data, tensors, "spread")
    cost = {t.name: t.row_cost for t in tensors}
    costs = [sum(s.rows * cost[s.name] for s in chunk) for chunk in partition]
    assert max(costs) - min(costs) <= atom_cost(tensors, chunks) + 1e-6
    for tensor in tensors:
        rows = [s.rows for chunk in partition for s in chunk if s.name == tensor.name]
        if not is_whole(tensor, tensors, chunks) and tensor.rows >= chunks:
            assert len(rows) == chunks and max(rows) - min(rows) <= 1


@both_layouts
@fast
@given(models(), st.data())
def test_slices_of_a_chunk_follow_the_model(
    layout: str, tensors: list[Tensor], data: st.DataObject
) -> None:
    _, partition = cuts(data, tensors, layout)
    order = [t.name for t in tensors]
    for chunk in partition:
        keys = [(order.index(s.name), s.start) for s in chunk]
        assert keys == sorted(keys)
        assert all(a.name != b.name for a, b in pairwise(chunk))  # adjacent rows are one slice


@given(st.lists(st.tuples(st.integers(8, 40), st.integers(1, 9)), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_stream_cuts_at_the_rows_of_the_formula(rows_columns: list[tuple[int, int]]) -> None:
    """method.md section 2: clamp(round((L_k - O_i) / (b_i / n_i)), previous cut, n_i)."""
    chunks = 3
    tensors = [Tensor(f"p{i}", shape, 12 * prod(shape)) for i, shape in enumerate(rows_columns)]
    if any(is_whole(t, tensors, chunks) for t in tensors):
        return
    total, partition = sum(t.cost for t in tensors), cut(tensors, chunks, "stream")
    for k in range(1, chunks):
        offset = 0
        for tensor in tensors:
            inside = min(max(k * total / chunks - offset, 0), tensor.cost)
            expected = round(inside / tensor.row_cost)
            before = [s.rows for chunk in partition[:k] for s in chunk if s.name == tensor.name]
            assert sum(before) == expected
            offset += tensor.cost


LLAMA2_7B = llama_tensors(32, 4096, 4096, 11008, 32000)


@both_layouts
@pytest.mark.parametrize(
    ("chunks", "bound"), [(4, 1.07), (16, 1.07), (32, 1.07), (64, 1.0003), (256, 1.0003)]
)
def test_llama_2_7b_is_even(layout: str, chunks: int, bound: float) -> None:
    sizes = cut(LLAMA2_7B, chunks, layout).sizes()
    assert sum(sizes) == 6_738_415_616
    assert round(max(sizes) * chunks / sum(sizes), 4) <= bound


@both_layouts
def test_the_cut_is_a_pure_function(layout: str) -> None:
    assert list(cut(LLAMA2_7B, 24, layout)) == list(cut(LLAMA2_7B, 24, layout))


def test_experts_are_cut_like_any_tensor() -> None:
    """A real layer of experts has 400M elements: whole, it would be a chunk of its own."""
    tensors = [Tensor("experts", (8, 64, 32), 8 * 64 * 32), Tensor("head", (64, 32), 64 * 32)]
    for layout in LAYOUTS:
        assert sum(s.name == "experts" for chunk in cut(tensors, 6, layout) for s in chunk) > 1


@both_layouts
@pytest.mark.parametrize("rows", [2, 14, 15])
def test_a_matrix_is_cut_from_an_eighth_of_a_chunk_on(layout: str, rows: int) -> None:
    """Two chunks of about 480 bytes: 60 is the border."""
    tensors = [Tensor("half", (1,), 450), Tensor("w", (rows, 4), 4 * rows), Tensor("b", (1,), 450)]
    pieces = [s for chunk in cut(tensors, 2, layout) for s in chunk if s.name == "w"]
    assert len(pieces) == (2 if rows == 15 else 1)


MATRIX = [Tensor("w", (6, 4), 24), Tensor("b", (6,), 6)]


@both_layouts
@pytest.mark.parametrize("chunks", [-1, 0, 8, 1000])
def test_too_few_or_too_many_chunks(chunks: int, layout: str) -> None:
    with pytest.raises(PartitionError, match=rf"chunks={chunks} is outside 1\.\.\d+.*choose"):
        cut(MATRIX, chunks, layout)
    with pytest.raises(InputError):
        model = nn.Linear(4, 6)
        ChunkedOptimizer(model, torch.optim.SGD, lr=0.1, chunks=chunks, layout=layout)


@both_layouts
def test_as_many_chunks_as_rows(layout: str) -> None:
    partition = cut(MATRIX, 7, layout)
    assert sorted(partition.sizes()) == [4] * 6 + [6]


def test_nothing_to_train() -> None:
    for tensors in ([], [Tensor("empty", (0, 4), 0)]):
        with pytest.raises(PartitionError, match=r"no trainable element.*requires_grad"):
            cut(tensors, 1, "stream")
    with pytest.raises(ValueError, match="requires_grad"):
        ChunkedOptimizer(nn.Linear(2, 2).requires_grad_(False), torch.optim.SGD, lr=1, chunks=1)


def test_unknown_layout() -> None:
    with pytest.raises(PartitionError, match="layout='rows' is not one of stream, spread"):
        cut(MATRIX, 2, "rows")


@pytest.mark.parametrize(
    ("chunks", "complaint"),
    [
        ([[Slice("w", 0, 4)], [Slice("w", 3, 6)]], r"rows \[3, 6\) follow row 4"),
        ([[Slice("w", 0, 2)], [Slice("w", 3, 6)]], r"rows \[3, 6\) follow row 2"),
        ([[Slice("w", 0, 2)], [Slice("w", 2, 2)], [Slice("w", 2, 6)]], r"rows \[2, 2\)"),
        ([[Slice("w", 0, 5)]], "5 of 6 rows"),
        ([[Slice("w", 0, 7)]], "7 of 6 rows"),
        ([[Slice("w", 0, 6)], []], r"chunks \[1\] of 2 are empty"),
    ],
)
def test_a_partition_checks_itself(chunks: list[list[Slice]], complaint: str) -> None:
    with pytest.raises(PartitionError, match=complaint):
        Partition({"w": (6, 4)}, chunks)


def test_a_partition_is_a_sequence() -> None:
    partition = cut(MATRIX, 3, "stream")
    assert partition[0] == next(iter(partition)) and partition[-1] == tuple(partition)[2]
    assert partition[:2] == tuple(partition)[:2] and partition[1] in partition
    first = partition[0][0]
    assert (first.name, first.start, first.stop) == tuple(first) == ("w", 0, first.rows)


class Tied(nn.Module):
    """One matrix under three names, a scalar, an empty tensor and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 4), nn.Linear(4, 12, bias=False)
        self.head.weight = self.again = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.zeros(5, 5), requires_grad=False)


@both_layouts
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_tied_once_and_frozen_never(layout: str, chunks: int) -> None:
    model = Tied()
    optimizer = ChunkedOptimizer(model, torch.optim.SGD, lr=0.1, chunks=chunks, layout=layout)
    assert sum(optimizer.partition.sizes()) == 12 * 4 + 1
    assert {s.name for chunk in optimizer.partition for s in chunk} == {"again", "scale"}
    optimizer.detach()
    assert not model.frozen.requires_grad and model.empty.requires_grad
