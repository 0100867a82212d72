"""What several ranks save, any number of them goes on from."""

import copy
from typing import Any

import pytest
import torch

from chunkft.core import resume
from chunkft.core.optimizer import ChunkedOptimizer
from tests.conftest import assert_close, assert_same
from tests.ranks import Net, flat, full, on_ranks, shard, train

ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {
    "stream": {"chunks": 4, "interval": 2},
    "spread": {"chunks": 4, "interval": 1, "layout": "spread"},
    "exact": {"chunks": 3, "exact": True},
}
BEFORE, AFTER = 11, 19  # in the middle of a visit, of a cycle


def build(rank: int, ranks: int, settings: dict[str, Any], dtype: torch.dtype) -> Any:
    model = Net().to(dtype)
    if ranks > 1:
        shard(model)
    return model, ChunkedOptimizer(model, torch.optim.AdamW, **ADAM, **settings)


def first_half(rank: int, ranks: int, settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """Weights and state as they are saved in the middle, and weights at the end."""
    model, optimizer = build(rank, ranks, settings, dtype)
    train(model, optimizer, 0, BEFORE, rank, ranks)
    saved, state = full(model), copy.deepcopy(optimizer.state_dict())  # tensors are not copied
    train(model, optimizer, BEFORE, AFTER, rank, ranks)
    return saved, state, full(model)


def second_half(
    rank: int,
    ranks: int,
    settings: dict[str, Any],
    dtype: torch.dtype,
    weights: dict[str, Any],
    state: dict[str, Any],
) -> Any:
    model = Net().to(dtype)
    model.load_state_dict(weights, strict=False)  # the tied head is there once
    if ranks > 1:
        shard(model)
    optimizer = ChunkedOptimizer(model, torch.optim.AdamW, **ADAM, **settings)
    optimizer.load_state_dict(state)
    train(model, optimizer, BEFORE, AFTER, rank, ranks)
    optimizer.audit()
    return full(model), optimizer.state_dict()


def joined(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one, as a checkpoint of them is read."""
    return states[0] | {"state": resume.joined(state["state"] for state in states)}


@pytest.fixture(scope="module")
def halves() -> dict[Any, Any]:
    return {}


def saved_by(halves: dict[Any, Any], ranks: int, case: str, dtype: torch.dtype) -> Any:
    if (ranks, case, dtype) not in halves:
        found = (
            on_ranks(ranks, first_half, ranks, SETTINGS[case], dtype)
            if ranks > 1
            else [first_half(0, 1, SETTINGS[case], dtype)]
        )
        weights, _, end = found[0]
        halves[ranks, case, dtype] = weights, joined([state for _, state, _ in found]), end
    return halves[ranks, case, dtype]


MORE = pytest.mark.slow


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=MORE)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("case", ["stream", pytest.param("spread", marks=MORE), "exact"])
@pytest.mark.parametrize("then", [4, 2, 1])
def test_saved_on_four_goes_on_on_fewer(
    halves: dict[Any, Any], then: int, case: str, dtype: torch.dtype
) -> None:
    weights, state, end = saved_by(halves, 4, case, dtype)
    args = then, SETTINGS[case], dtype, weights, state
    found = on_ranks(then, second_half, *args) if then > 1 else [second_half(0, *args)]
    again, _ = found[0]
    if then == 4:
        assert_same(again, end)  # to the bit
    elif dtype == torch.float32:
        assert_close(flat(again), flat(end), 1e-6)
    else:
        assert_close(flat(again), flat(end), 2e-2)  # gradients round in 8 bits


@pytest.mark.parametrize("case", SETTINGS)
def test_saved_by_one_process_goes_on_on_two_ranks(halves: dict[Any, Any], case: str) -> None:
    """Slices that two ranks share are cut: the masters' low bits without the other half too."""
    weights, state, end = saved_by(halves, 1, case, torch.float32)
    found = on_ranks(2, second_half, 2, SETTINGS[case], torch.float32, weights, state)
    assert_close(flat(found[0][0]), flat(end), 1e-6)
    weights, state, _ = saved_by(halves, 1, case, torch.bfloat16)
    model, optimizer = build(0, 1, SETTINGS[case], torch.bfloat16)
    model.load_state_dict(weights, strict=False)
    optimizer.load_state_dict(state)
    halves_of_two = on_ranks(2, masters, SETTINGS[case], weights, state)
    for name, whole in masters_of(optimizer).items():
        both = torch.cat([own[name] for own in halves_of_two])
        assert_same(both, whole)


def masters_of(optimizer: ChunkedOptimizer) -> dict[str, torch.Tensor]:
    """fp32 masters by name, of the rows that were stepped and this rank holds, in their order."""
    from chunkft.core import precision

    found: dict[str, list[torch.Tensor]] = {}
    for name, entries in optimizer.state_dict()["state"].items():
        for entry in sorted(entries, key=lambda e: e["start"]):
            values = entry["values"]
            kept = {key: values[key] for key in precision.KEYS if key in values}
            piece = resume.Slice(name, entry["start"], entry["stop"])
            weight = optimizer._working_set.rows_of(piece)
            assert weight is not None
            found.setdefault(name, []).append(precision.wake(kept, weight))
    return {name: torch.cat([m.reshape(len(m), -1) for m in ms]) for name, ms in found.items()}


def masters(rank: int, settings: dict[str, Any], weights: Any, state: Any) -> Any:
    model = Net().to(torch.bfloat16)
    model.load_state_dict(weights, strict=False)
    shard(model)
    optimizer = ChunkedOptimizer(model, torch.optim.AdamW, **ADAM, **settings)
    optimizer.load_state_dict(state)
    return masters_of(optimizer)


@pytest.mark.parametrize("layout", ["stream", "spread"])
def test_another_k_is_cut_alike_on_any_number_of_ranks(halves: dict[Any, Any], layout: str) -> None:
    weights, state, _ = saved_by(halves, 4, layout, torch.float32)
    settings = {"chunks": 3, "interval": 2, "layout": layout}
    expected, header = second_half(0, 1, settings, torch.float32, weights, state)
    for ranks in (2, 4):
        found = on_ranks(ranks, second_half, ranks, settings, torch.float32, weights, state)
        assert_close(flat(found[0][0]), flat(expected), 1e-6)
        assert found[0][1]["partition"] == header["partition"]
