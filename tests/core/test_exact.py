"""Exact mode is the dense optimizer: to the bit where the rule is elementwise."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from chunkft import ChunkedOptimizer
from chunkft.core.exact import ELEMENTWISE
from chunkft.errors import InputError, NonFiniteGradientError, PartitionError, UnsupportedError
from tests.conftest import NAMES, loss_of, tiny, weights


class Dense:
    """Mixed precision as everybody writes it: `rule` on fp32 masters, global clipping."""

    def __init__(self, model: nn.Module, rule: Any, max_grad_norm: float | None, **kwargs: Any):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype.itemsize > 2 else p.detach().float() for p in self.weights]
        self.rule, self.max_grad_norm = rule(self.masters, **kwargs), max_grad_norm
        self.norm = torch.tensor(0.0)

    @torch.no_grad()
    def step(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight and weight.grad is not None:
                master.grad, weight.grad = weight.grad.float(), None
        self.norm = nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.masters, self.max_grad_norm, self.norm)
        self.rule.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.copy_(master)
            master.grad = None


def pair(name: str, dtype: torch.dtype, seed: int = 0) -> tuple[nn.Module, nn.Module, Any]:
    model, batch = tiny(name, seed)
    twin, _ = tiny(name, seed)
    if dtype == torch.bfloat16 and "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return model.to(dtype), twin.to(dtype), batch


def micro_batches(batch: dict[str, Tensor], sizes: Iterable[int]) -> list[dict[str, Tensor]]:
    parts = {key: value.split(list(sizes)) for key, value in batch.items()}
    return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]


def equal(model: nn.Module, twin: nn.Module) -> bool:
    theirs = weights(twin)
    return all(torch.equal(value, theirs[name]) for name, value in weights(model).items())


def run(model: nn.Module, optimizer: Any, parts: list[dict[str, Tensor]], steps: int) -> None:
    for _ in range(steps):
        for part in parts:
            loss_of(model, part).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_dense_adamw(name: str, dtype: torch.dtype) -> None:
    """Clipped, accumulated, over parameters that get no gradient (BERT's pooler) and tied ones."""
    model, twin, batch = pair(name, dtype)
    rows = len(next(iter(batch.values())))
    parts = micro_batches(batch, [rows - 2, 2])
    settings = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5}
    exact = ChunkedOptimizer(model, optim.AdamW, chunks=7, exact=True, **settings)
    dense = Dense(twin, optim.AdamW, **settings)
    for _ in range(5):
        run(model, exact, parts, 1)
        run(twin, dense, parts, 1)
        assert exact.grad_norm == float(dense.norm) > 0.5
        assert equal(model, twin)
    audit = exact.audit()
    assert set(audit.updates.values()) <= {0, 5} and audit.waiting == 0


class Ragged(nn.Module):
    """Rows of odd lengths: slices begin and end anywhere within a vector register."""

    def __init__(self, widths: list[int], dtype: torch.dtype):
        super().__init__()
        pairs = pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=dtype) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


RULES: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.1},
    "Adam": {"amsgrad": True},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"momentum": 0.5, "centered": True},
} | {name: {} for name in ("Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop")}


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 41), min_size=2, max_size=5),
    chunks=st.integers(1, 12),
    layout=st.sampled_from(["stream", "spread"]),
    splits=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    rule=st.sampled_from(sorted(RULES)),
    kernel=st.sampled_from(["for-loop", "foreach", "fused"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    max_grad_norm=st.sampled_from([None, 0.1, 1e3]),
    seed=st.integers(0, 9),
)
def test_any_model_k_and_split(
    widths: list[int],
    chunks: int,
    layout: str,
    splits: list[int],
    rule: str,
    kernel: str,
    dtype: torch.dtype,
    max_grad_norm: float | None,
    seed: int,
) -> None:
    kwargs: dict[str, Any] = {"lr": 1e-2} | RULES[rule]
    if kernel == "foreach":
        kwargs["foreach"] = True
    elif kernel == "fused" and rule in ("Adam", "AdamW", "SGD", "Adagrad"):
        kwargs["fused"] = True
    torch.manual_seed(seed)
    model = Ragged(widths, dtype)
    twin = Ragged(widths, dtype)
    twin.load_state_dict(model.state_dict())
    try:
        exact = ChunkedOptimizer(
            model,
            getattr(optim, rule),
            chunks=chunks,
            layout=layout,
            exact=True,
            max_grad_norm=max_grad_norm,
            **kwargs,
        )
    except PartitionError:  # more chunks than rows
        return
    dense = Dense(twin, getattr(optim, rule), max_grad_norm, **kwargs)
    for step in range(4):
        for i, rows in enumerate(splits):
            x = torch.randn(rows, widths[0], dtype=dtype)
            for net in (model, twin):
                (net(x) - i - step).pow(2).sum().backward()
        exact.step()
        dense.step()
        assert exact.grad_norm == float(dense.norm)
        assert equal(model, twin)


def test_the_rules_that_are_cut_within_tensors_are_all_tested() -> None:
    assert {rule.__name__ for rule in ELEMENTWISE} == set(RULES)


@pytest.mark.parametrize("rule", ["Adafactor", "Muon"])
def test_other_rules_are_cut_at_tensor_borders(rule: str) -> None:
    """Adafactor's factors and Muon's orthogonal steps belong to a whole matrix."""
    widths = [9, 33, 17, 5]
    model, twin = Ragged(widths, torch.float32), Ragged(widths, torch.float32)
    if rule == "Muon":  # takes matrices only
        for net in (model, twin):
            for layer in net.layers:
                layer.bias.requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    cls = getattr(optim, rule)
    exact = ChunkedOptimizer(model, cls, chunks=3, exact=True, max_grad_norm=1.0, lr=1e-2)
    assert all(exact.partition.is_whole(piece) for chunk in exact.partition for piece in chunk)
    dense = Dense(twin, cls, 1.0, lr=1e-2)
    for _ in range(4):
        x = torch.randn(6, 9)
        for net, optimizer in ((model, exact), (twin, dense)):
            net(x).pow(2).sum().backward()
            optimizer.step()
        assert equal(model, twin)
    with pytest.raises(PartitionError, match="this rule allows no cut"):
        ChunkedOptimizer(Ragged(widths, torch.float32), optim.Adafactor, chunks=7, exact=True)


class Counting(optim.SGD):
    """A rule that knows one step size for all, as Prodigy does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


def test_a_rule_that_counts_for_all_is_refused() -> None:
    model = Ragged([4, 8, 3], torch.bfloat16)
    before = weights(model)
    optimizer = ChunkedOptimizer(model, Counting, lr=0.1, chunks=2, exact=True)
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(UnsupportedError, match="'k' for all parameters"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize(
    "setting", [{"interval": 3}, {"order": "shuffled"}, {"moments": "decay"}, {"seed": 1}]
)
def test_schedule_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(setting))}=.*leave it out"):
        ChunkedOptimizer(Ragged([4, 4], torch.float32), optim.SGD, chunks=2, exact=True, **setting)


@pytest.mark.parametrize("store", ["host", "device", "disk"])
def test_stores_and_resume_follow_one_trajectory(store: str, tmp_path: Any) -> None:
    """Also with the gradients accumulated in files, and taken up by another optimizer half-way."""
    model, twin, batch = pair("llama", torch.bfloat16)
    parts = micro_batches(batch, [2, 1, 1])
    settings: dict[str, Any] = {"lr": 1e-2, "max_grad_norm": 0.5}
    dense = Dense(twin, optim.AdamW, **settings)
    settings |= {"exact": True, "store": tmp_path if store == "disk" else store}
    first = ChunkedOptimizer(model, optim.AdamW, chunks=5, **settings)
    run(model, first, parts, 2)
    saved = first.state_dict()
    assert saved["exact"] and saved["steps"] == 2
    first.detach()
    for chunks in (5, 3):  # another K cuts and joins the state anew
        second = ChunkedOptimizer(model, optim.AdamW, chunks=chunks, **settings)
        second.load_state_dict(saved)
        run(model, second, parts, 2)
        second.audit()
        saved = second.state_dict()
        second.detach()
    run(twin, dense, parts, 6)
    assert equal(model, twin)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_from_chunks_to_exact_and_back() -> None:
    """Step counts that differ between slices stay each slice's own."""
    model, batch = tiny("gpt2")
    chunked = ChunkedOptimizer(model, optim.AdamW, chunks=4, interval=1)
    run(model, chunked, [batch], 3)
    saved = chunked.state_dict()
    chunked.detach()
    exact = ChunkedOptimizer(model, optim.AdamW, chunks=4, exact=True)
    exact.load_state_dict(saved)
    run(model, exact, [batch], 2)
    assert set(exact.audit().updates.values()) == {2, 3}
    saved = exact.state_dict()
    exact.detach()
    again = ChunkedOptimizer(model, optim.AdamW, chunks=4, interval=1)
    again.load_state_dict(saved)
    assert again.active == 0 and again.steps == 5
    run(model, again, [batch], 4)
    assert set(again.audit().updates.values()) == {3, 4}


def test_what_is_on_the_model_meanwhile() -> None:
    model, batch = tiny("llama")
    optimizer = ChunkedOptimizer(model, optim.AdamW, chunks=3, exact=True)
    assert optimizer.active is None and optimizer.exact
    loss_of(model, batch).backward()
    assert all(p.grad is None for p in model.parameters())
    carried = [p.grad for group in optimizer.param_groups for p in group["params"]]
    assert all(gradient is not None for gradient in carried)
    with pytest.raises(InputError, match="belongs to a ChunkedOptimizer already"):
        ChunkedOptimizer(model, optim.AdamW, chunks=3)
    with optimizer.detached() as stock:
        loss_of(stock, batch).backward()
        assert all(p.grad is not None for p in stock.parameters())
        stock.zero_grad()
    optimizer.step()
    assert optimizer.nbytes["gradient"] < sum(p.nbytes for p in model.parameters()) / 2
    optimizer.zero_grad()
    with pytest.raises(UnsupportedError, match="detached"):
        optimizer.detach()
        optimizer.step()


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, batch = tiny("llama")
    optimizer = ChunkedOptimizer(model, optim.AdamW, chunks=3, exact=True)
    before = weights(model)
    (loss_of(model, batch) * torch.inf).backward()
    with pytest.raises(NonFiniteGradientError, match="at step 0: nothing"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    run(model, optimizer, [batch], 1)
    assert optimizer.steps == 1


@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_scaler(unscale: bool) -> None:
    """Scaled by a power of two, the same weights to the bit; an overflow takes no step."""
    model, batch = tiny("llama")
    twin, _ = tiny("llama")
    settings: dict[str, Any] = {"lr": 1e-2, "max_grad_norm": 0.5}
    optimizer = ChunkedOptimizer(model, optim.AdamW, chunks=3, exact=True, **settings)
    dense = Dense(twin, optim.AdamW, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for factor in (1.0, torch.inf, 1.0):
        scaler.scale(loss_of(model, batch) * factor).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            run(twin, dense, [batch], 1)
        assert equal(model, twin)
    assert optimizer.steps == 2
