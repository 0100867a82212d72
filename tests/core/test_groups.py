"""Parameter groups with settings of their own, and the schedulers that change them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.errors import InputError
from tests.conftest import weights
from tests.core.test_optimizers import IDS, Net, assert_stock, train


def two_groups(model: Net) -> list[dict[str, Any]]:
    plain = [p for n, p in model.named_parameters() if p.dim() < 2]
    decayed = [p for n, p in model.named_parameters() if p.dim() >= 2]
    return [
        {"params": decayed, "weight_decay": 0.5, "lr": 1e-2},
        {"params": plain, "weight_decay": 0.0, "lr": 1e-3},
    ]


@pytest.mark.parametrize("chunks", [1, 3])
def test_groups_keep_their_own_settings(chunks: int) -> None:
    """With zero gradients only decoupled weight decay moves: by 1 - lr * decay a step."""
    model = Net()
    before = weights(model)
    optimizer = ChunkedOptimizer(
        model, optim.AdamW, groups=two_groups(model), chunks=chunks, interval=1
    )
    for _ in range(2 * chunks):
        (0 * model(IDS).sum()).backward()
        optimizer.step()
    for name, value in weights(model).items():
        shrunk = before[name] * (1 - 1e-2 * 0.5) ** 2 if value.dim() >= 2 else before[name]
        assert torch.allclose(value, shrunk, rtol=1e-6, atol=0), name


def test_a_group_of_its_own_learns_at_its_own_rate() -> None:
    model = Net()
    before = weights(model)
    optimizer = ChunkedOptimizer(
        model, optim.AdamW, groups=two_groups(model), chunks=3, interval=1, eps=1e-12
    )
    train(model, optimizer, 3)
    shrunk = {n: v * (1 - 1e-2 * 0.5) if v.dim() >= 2 else v for n, v in before.items()}
    for name, value in weights(model).items():
        moved = (value - shrunk[name]).abs().max()
        assert float(moved) == pytest.approx(1e-2 if value.dim() >= 2 else 1e-3, rel=1e-3), name


WRONG_GROUPS: dict[str, tuple[Callable[[Net], list[Any]], str]] = {
    "in none": (lambda m: [[p for p in m.parameters() if p is not m.head.bias]], r"head\.bias"),
    "in two": (
        lambda m: [list(m.parameters()), [m.inner.weight]],
        r"inner\.weight is in groups 0 and 1",
    ),
    "of another model": (
        lambda m: [[*m.parameters(), nn.Parameter(torch.ones(5, 4))]],
        r"groups\[0\] .* \(5, 4\)",
    ),
}


@pytest.mark.parametrize("case", list(WRONG_GROUPS))
def test_wrong_groups_raise_by_name(case: str) -> None:
    build, message = WRONG_GROUPS[case]
    model = Net()
    with pytest.raises(InputError, match=message):
        groups = [{"params": members} for members in build(model)]
        ChunkedOptimizer(model, optim.AdamW, groups=groups, chunks=2)
    assert_stock(model)


def test_frozen_parameters_may_be_in_a_group_and_stay_frozen() -> None:
    model = Net()
    model.embed.requires_grad_(False)
    before = weights(model)
    groups = [{"params": iter(list(model.parameters()))}]
    optimizer = ChunkedOptimizer(model, optim.AdamW, lr=0.1, groups=groups, chunks=2, interval=1)
    train(model, optimizer, 4)
    assert torch.equal(model.embed.weight, before["embed.weight"])
    assert "embed.weight" not in {p.name for chunk in optimizer.partition for p in chunk}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_empty_groups_stay_and_dicts_keep_their_identity(place: int) -> None:
    model = Net()
    groups = two_groups(model)
    groups.insert(place, {"params": [], "lr": 7.0})
    optimizer = ChunkedOptimizer(model, optim.AdamW, groups=groups, chunks=4, interval=1)
    outer = [id(group) for group in optimizer.param_groups]
    container = optimizer.param_groups
    seen: set[int] = set()
    for _ in range(6):
        train(model, optimizer, 1)
        assert [id(group) for group in optimizer.param_groups] == outer
        assert optimizer.param_groups is container
        assert optimizer.param_groups[place]["params"] == []
        assert optimizer.param_groups[place]["lr"] == 7.0
        seen |= {id(p) for group in optimizer.param_groups for p in group["params"]}
        leaves = [p for group in optimizer.param_groups for p in group["params"]]
        assert sum(p.numel() for p in leaves) == optimizer.partition.sizes()[optimizer.active]
    optimizer.load_state_dict(optimizer.state_dict())
    with optimizer.detached():
        pass
    assert [id(group) for group in optimizer.param_groups] == outer


def test_settings_changed_in_the_group_reach_the_rule() -> None:
    model = Net()
    optimizer = ChunkedOptimizer(model, optim.SGD, lr=1.0, chunks=2, interval=2)
    before = weights(model)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 4)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, optimizer, 4)
    assert all(not torch.equal(p, before[name]) for name, p in weights(model).items())


# -- schedulers ---------------------------------------------------------------------------------

STEPS = 24


def hf(name: str) -> Callable[[optim.Optimizer], Any]:
    def build(optimizer: optim.Optimizer) -> Any:
        from transformers import get_scheduler

        return get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=STEPS)

    return build


lr = optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "LinearLR": lambda o: lr.LinearLR(o, 1.0, 0.0, total_iters=STEPS),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, STEPS, eta_min=1e-9),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, max_lr=1e-2, total_steps=STEPS + 1),
    "linear of transformers": hf("linear"),
    "cosine of transformers": hf("cosine"),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("chunks", [4, 5])
def test_the_last_lr_is_the_end_of_the_schedule(name: str, chunks: int) -> None:
    """Ours goes through the very numbers that a dense optimizer goes through, to the end."""
    model, dense = Net(), Net()
    ours = ChunkedOptimizer(model, optim.AdamW, lr=1e-2, chunks=chunks, interval=2)
    theirs = optim.AdamW(dense.parameters(), lr=1e-2)
    scheduler, other = SCHEDULERS[name](ours), SCHEDULERS[name](theirs)
    for _ in range(STEPS):
        train(model, ours, 1)
        train(dense, theirs, 1)
        scheduler.step()
        other.step()
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]
    assert ours.param_groups[0]["lr"] <= 1e-6
    before = weights(model)
    train(model, ours, 2 * chunks)
    assert all(torch.allclose(p, before[n], atol=1e-4) for n, p in weights(model).items())


def test_a_learning_rate_that_is_a_tensor() -> None:
    model, dense = Net(), Net()
    ours = ChunkedOptimizer(model, optim.AdamW, lr=torch.tensor(1e-2), chunks=1)
    theirs = optim.AdamW(dense.parameters(), lr=torch.tensor(1e-2))
    for optimizer, net in ((ours, model), (theirs, dense)):
        scheduler = lr.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
        for _ in range(4):
            train(net, optimizer, 1)
            scheduler.step()
    assert all(torch.equal(model.get_parameter(n), p) for n, p in dense.named_parameters())
