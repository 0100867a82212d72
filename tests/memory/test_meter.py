"""The meter against hand-counted bytes, and against torch's own record of allocations."""

import gc
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.profiler import ProfilerActivity, profile

from chunkft import ChunkedOptimizer
from chunkft.memory.meter import KINDS, Meter
from tests.conftest import NAMES, loss_of, tiny

METHODS: dict[str, dict[str, Any]] = {
    "stream": {"chunks": 3, "interval": 1},
    "spread": {"chunks": 3, "interval": 1, "layout": "spread"},
    "exact": {"chunks": 3, "exact": True},
}


def test_every_kind_of_a_small_network_by_hand() -> None:
    """Two layers of 64 x 64 in bf16, 2 chunks of one layer each, 8 rows; all sizes are known."""
    n, rows = 64 * 64, 8
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model.to(torch.bfloat16)
    optimizer = ChunkedOptimizer(model, optim.AdamW, lr=1e-3, chunks=2, interval=1, fused=True)
    x = torch.randn(rows, 64, dtype=torch.bfloat16)
    meter = Meter(model, optimizer)
    with meter:
        for _ in range(4):
            model(x).sum().backward()
            optimizer.step()
    found = meter.measured()
    assert found.highest["weights"] == 2 * n * 2
    # the leaf's in 16 bits beside its copy in 32, for a moment
    assert found.highest["gradient"] == n * 2 + n * 4
    assert found.highest["state"] == n * 8
    # awake beside the low bits it woke from
    assert n * 4 <= found.highest["master"] <= n * 6 + 100
    # m, v, low bits, two sums of the weights; both chunks rest while one goes and the other comes
    assert 2 * n * 10 <= found.resting <= 2 * n * 10 + 200
    assert found.peak.total == max(reading.total for reading in found.timeline)
    assert found.peak.total <= sum(found.highest.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_the_peak_is_what_torch_allocated(name: str, method: str) -> None:
    """torch's profiler records every allocation, those inside kernels too."""
    # the fused attention of a CPU takes buffers of its own, which no mode can see
    model, batch = tiny(name, attn_implementation="eager")
    optimizer = ChunkedOptimizer(model, optim.AdamW, lr=1e-3, fused=True, **METHODS[method])

    def step() -> None:
        loss_of(model, batch).backward()
        optimizer.step()

    for _ in range(3):
        step()
    meter = Meter(model, optimizer, getattr(model.config, "vocab_size", None))
    with meter:
        held = sum(e.size for e in meter._events)  # weights and state that were there before
        step()
    measured = meter.measured()
    for _ in range(2):
        step()  # the same chunk again
    # the profiler knows blocks of earlier profiles: one that a cycle kept until now would count as
    # given back when the collector comes by
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now, most = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    added = max(r.total + r.resting for r in measured.timeline) - held
    assert added == pytest.approx(most, rel=0.05)


def test_other_optimizers_and_logits() -> None:
    model, batch = tiny("llama")
    masters = [p.detach().double() for p in model.parameters()]
    optimizer = optim.SGD(masters, lr=1e-2, momentum=0.9)
    meter = Meter(model, optimizer, vocabulary=96)
    with meter:
        loss_of(model, batch).backward()
        for master, weight in zip(masters, model.parameters(), strict=True):
            master.grad, weight.grad = weight.grad.double(), None
        optimizer.step()
    found = meter.measured().highest
    elements = sum(p.numel() for p in model.parameters())
    assert found["weights"] == sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    assert found["master"] == found["state"] == 8 * elements
    assert found["gradient"] >= 8 * elements
    rows = batch["labels"].numel()
    assert found["logits"] >= 2 * rows * 96 * 4
    assert set(found) == set(KINDS)


def test_it_goes_when_it_is_switched_off() -> None:
    model, batch = tiny("gpt2")
    optimizer = ChunkedOptimizer(model, optim.AdamW, chunks=3)
    meter = Meter(model, optimizer)
    with meter:
        loss_of(model, batch).backward()
        optimizer.step()
    count = len(meter._events)
    loss_of(model, batch).backward()
    optimizer.step()
    assert [event.size > 0 for event in meter._events[count:]].count(True) == 0
    assert not optimizer._optimizer_step_pre_hooks and not optimizer.rule._optimizer_step_post_hooks
