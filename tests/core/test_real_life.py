"""What happens around an optimizer in real life, as method.md, section 4 lists it.

Here what other people do to gradients, numbers and weights; `test_working_set` has what they do to
the model and its modules.
"""

import copy
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.errors import NonFiniteGradientError, ReplacedParameterError
from tests.conftest import assert_close, assert_same, weights

IDS = torch.arange(24).reshape(4, 6)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Net(nn.Module):
    """Tied ends, a layer with bias, a norm, and a weight that is read by attribute too."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(24, 12)
        self.inner = nn.Linear(12, 40)
        self.norm = nn.LayerNorm(40)
        self.outer = nn.Linear(40, 12)
        self.head = nn.Linear(12, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.inner(self.embed(ids)).tanh())
        return self.head(self.outer(x)) + (x @ self.outer.weight.T) @ self.head.weight.T


def loss_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.roll(1).flatten())


def build(
    dtype: torch.dtype = FP32, rule: Any = optim.AdamW, **settings: Any
) -> tuple[Net, ChunkedOptimizer]:
    model = Net().to(dtype)
    settings = {"lr": 1e-2, "chunks": 3, "interval": 2} | settings
    return model, ChunkedOptimizer(model, rule, **settings)


def train(model: nn.Module, optimizer: Any, steps: int) -> list[float]:
    losses: list[float] = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def leaves(optimizer: ChunkedOptimizer) -> list[Tensor]:
    return [leaf for group in optimizer.param_groups for leaf in group["params"]]


def snapshot(model: nn.Module, optimizer: ChunkedOptimizer) -> Any:
    return copy.deepcopy([weights(model), optimizer.state_dict()])


# -- loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_loop_that_zeroes_the_model_only(dtype: torch.dtype) -> None:
    losses: dict[str, list[float]] = {}
    for who in ("model", "optimizer", "nobody"):
        model, optimizer = build(dtype)
        zero = {"model": model.zero_grad, "optimizer": optimizer.zero_grad}.get(who, lambda: None)
        losses[who] = [x for _ in range(14) for x in [*train(model, optimizer, 1), zero()] if x]
        assert all(leaf.grad is None for leaf in leaves(optimizer))
        assert all(p.grad is None for p in model.parameters())
    assert losses["model"] == losses["optimizer"] == losses["nobody"]
    assert losses["model"][-1] < losses["model"][0]


def test_parameters_carry_no_gradient_outside_backward() -> None:
    model, optimizer = build()
    for _ in range(7):
        loss_of(model).backward()
        assert all(p.grad is None for p in model.parameters())
        assert all(leaf.grad is not None for leaf in leaves(optimizer))
        optimizer.step()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_accumulation_adds_up_and_does_not_switch(dtype: torch.dtype) -> None:
    """Four micro-batches that are alike: the gradient of one, times four."""
    model, optimizer = build(dtype, optim.SGD, interval=1)
    single = []
    for _ in range(4):
        active = optimizer.active
        loss_of(model).backward()
        single = [leaf.grad.clone() for leaf in leaves(optimizer) if leaf.grad is not None]
        for _ in range(3):
            loss_of(model).backward()
            assert optimizer.active == active
        for leaf, one in zip(leaves(optimizer), single, strict=True):
            assert_close(leaf.grad, 4 * one, 1e-6 if dtype == FP32 else 0.02)
        optimizer.step()
        assert optimizer.active != active


def test_gradients_may_be_discarded() -> None:
    model, optimizer = build()
    before = snapshot(model, optimizer)
    loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert_same(before[0], weights(model))


# -- GradScaler ---------------------------------------------------------------------------------


def test_grad_scaler_refuses_to_unscale_fp16() -> None:
    """Of any optimizer; it must be the same error, and nothing of the gradient may be gone."""
    model, optimizer = build(FP16)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model)).backward()
    before = [leaf.grad.clone() for leaf in leaves(optimizer) if leaf.grad is not None]
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)
    after = [leaf.grad for leaf in leaves(optimizer) if leaf.grad is not None]
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "dtype, unscale", [(FP32, False), (FP32, True), (BF16, False), (BF16, True), (FP16, False)]
)
def test_grad_scaler_with_an_injected_inf(dtype: torch.dtype, unscale: bool) -> None:
    """A power of two as scale: the run is the one without a scaler, the bad step left out."""
    plain, stock = build(dtype, max_grad_norm=0.5)
    expected = train(plain, stock, 14)
    model, optimizer = build(dtype, max_grad_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    losses: list[float] = []
    for step in range(16):
        bad = step in (3, 4)  # in a visit, and at its last step
        loss = loss_of(model)
        scaler.scale(loss * (float("inf") if bad else 1)).backward()
        before = (snapshot(model, optimizer), optimizer.active)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert_same(before, (snapshot(model, optimizer), optimizer.active))
            assert all(leaf.grad is None for leaf in leaves(optimizer))
        else:
            losses.append(float(loss.detach()))
    assert scaler.get_scale() == 2.0
    if dtype == FP16:  # unscaled gradients lose bits below the smallest number
        assert losses == pytest.approx(expected, rel=1e-3)
    else:
        assert losses == expected
        assert_same(weights(plain), weights(model))
    assert not hasattr(optimizer, "found_inf")


def test_grad_scaler_with_autocast() -> None:
    """fp32 weights, fp16 arithmetic: as without chunks, K=1 to the bit."""
    found = []
    for ours in (True, False):
        model = Net()
        rule = {"lr": 1e-2}
        optimizer: Any = (
            ChunkedOptimizer(model, optim.AdamW, chunks=1, **rule)
            if ours
            else optim.AdamW(model.parameters(), **rule)
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # overflows at first
        for _ in range(12):
            with torch.autocast("cpu", FP16):
                loss = loss_of(model)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append([scaler.get_scale(), weights(model)])
    assert found[0][0] < 2.0**20
    assert_same(*found)


# -- numbers that are none ----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_gradient_that_is_no_number_writes_nothing(
    dtype: torch.dtype, bad: float, limit: float | None
) -> None:
    model, optimizer = build(dtype, max_grad_norm=limit)
    reference, other = build(dtype, max_grad_norm=limit)
    for steps in (0, 3, 5):  # fresh, within a visit, within a later one
        train(model, optimizer, steps)
        before = snapshot(model, optimizer)
        (loss_of(model) * bad).backward()
        with pytest.raises(NonFiniteGradientError, match=f"step {optimizer.steps}, chunk"):
            optimizer.step()
        assert_same(before, snapshot(model, optimizer))
        assert all(leaf.grad is None for leaf in leaves(optimizer))
    assert train(model, optimizer, 6) == train(reference, other, 14)[8:]


# -- models that move ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float64])
def test_to_before_the_first_step_is_as_if_built_so(dtype: torch.dtype) -> None:
    moved, optimizer = build()
    moved.to(dtype)
    straight = Net().to(dtype)
    other = ChunkedOptimizer(straight, optim.AdamW, lr=1e-2, chunks=3, interval=2)
    assert list(other.partition) == list(optimizer.partition)
    assert train(moved, optimizer, 14) == train(straight, other, 14)
    assert_same(weights(moved), weights(straight))


@pytest.mark.parametrize("made_ready", [True, False])
@pytest.mark.parametrize(("old", "new"), [(FP32, BF16), (BF16, FP32), (FP32, FP16), (BF16, FP16)])
@pytest.mark.parametrize("steps", [3, 4])
def test_to_in_the_middle_keeps_the_state(
    steps: int, old: torch.dtype, new: torch.dtype, made_ready: bool
) -> None:
    """With and without the call to train() that Trainer makes before a forward pass."""
    model, optimizer = build(old)
    train(model, optimizer, steps)
    before = snapshot(model, optimizer)[1]["state"]
    loss_of(model).backward()
    model.to(new)
    if made_ready:
        optimizer.train()
    loss_of(model).backward()
    optimizer.step()
    losses = train(model, optimizer, 11)
    assert all(p.dtype == new for p in model.parameters())
    assert losses[-1] < losses[0]
    for name, entries in optimizer.state_dict()["state"].items():
        counts = {e["start"]: e["updates"] for e in before.get(name, [])}
        for entry in entries:
            assert entry["updates"] > counts.get(entry["start"], 0)
            assert entry["values"]["step"] == entry["updates"]
            assert entry["values"]["exp_avg_sq"].dtype == FP32
            assert ("master_low" in entry["values"]) == (new == BF16)
            assert ("master" in entry["values"]) == (new == FP16)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_storage_that_is_pointed_elsewhere_is_followed(dtype: torch.dtype) -> None:
    """`p.data = p.data.clone()`, as `.to(device)` does it, between any two steps."""
    still, optimizer = build(dtype)
    moving, other = build(dtype)
    for _ in range(14):
        train(still, optimizer, 1)
        for p in moving.parameters():
            p.data = p.data.clone()
        train(moving, other, 1)
    assert_same(weights(still), weights(moving))


# -- weights written by others ------------------------------------------------------------------


def by_load(model: nn.Module, source: dict[str, Tensor]) -> None:
    model.load_state_dict(source, strict=False)


def by_copy(model: nn.Module, source: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(source[name])


def by_data(model: nn.Module, source: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data.copy_(source[name])


def by_pointer(model: nn.Module, source: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data = source[name].clone()


@pytest.mark.parametrize("write", [by_load, by_copy, by_data, by_pointer])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("steps", [3, 4, 8])
def test_weights_loaded_in_place_are_the_weights(
    steps: int, dtype: torch.dtype, write: Callable[..., None]
) -> None:
    """Under SGD without momentum nothing of the past is left: a fresh run from there agrees.

    Attached and resting chunks alike; 3 is within a visit, 4 and 8 at borders.
    """
    model, optimizer = build(dtype, optim.SGD, lr=0.1)
    train(model, optimizer, steps)
    loaded = weights(Net(seed=1).to(dtype))
    write(model, loaded)
    fresh, other = build(dtype, optim.SGD, lr=0.0)
    by_copy(fresh, loaded)
    train(fresh, other, steps)  # to the same place in the schedule
    other.param_groups[0]["lr"] = 0.1
    assert train(model, optimizer, 9) == train(fresh, other, 9)
    assert_same(weights(fresh), weights(model))


def test_weights_loaded_while_detached_are_the_weights() -> None:
    model, optimizer = build(BF16, optim.SGD, lr=1e-3)
    train(model, optimizer, 3)
    with optimizer.detached() as stock:
        by_data(stock, {name: torch.full_like(p, 0.25) for name, p in weights(stock).items()})
    train(model, optimizer, 1)
    assert all(float((p - 0.25).abs().max()) < 2e-3 for p in weights(model).values())


def test_an_active_master_survives_a_load_of_the_same_weights() -> None:
    """Updates under half an ulp: the low bits must not be lost to a load that changes nothing."""
    losses = []
    for load in (False, True):
        model, optimizer = build(BF16, optim.SGD, lr=1e-3)
        for _ in range(20):
            train(model, optimizer, 1)
            if load:
                by_load(model, copy.deepcopy(model.state_dict()))
        losses.append(weights(model))
    assert_same(*losses)


@pytest.mark.parametrize("via", ["state_dict", "detached"])
def test_a_load_before_the_state_is_kept_is_seen(via: str) -> None:
    """The master that goes to the state must not be the one of the weights before."""
    model, optimizer = build(BF16, optim.SGD, lr=1e-3)
    train(model, optimizer, 3)
    by_data(model, {name: torch.full_like(p, 0.25) for name, p in weights(model).items()})
    if via == "detached":
        with optimizer.detached():
            pass
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)
    assert all(float((p - 0.25).abs().max()) < 2e-3 for p in weights(model).values())


def new_parameter(model: Any) -> None:
    model.inner.weight = nn.Parameter(model.inner.weight.detach().clone())


def new_module(model: Any) -> None:
    model.inner = nn.Linear(12, 40)


def untied(model: Any) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def resized(model: Any) -> None:
    model.embed.weight.data = torch.zeros(30, 12)


def parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.inner)


REPLACED = [
    (new_parameter, r"inner\.weight"),
    (new_module, r"inner\.(weight|bias)"),
    (untied, r"embed\.weight"),
    (resized, r"embed\.weight has shape \(30, 12\), \(24, 12\) when"),
    (parametrized, r"inner\.weight"),
]


@pytest.mark.parametrize("steps", [0, 2, 4])
@pytest.mark.parametrize(("change", "name"), REPLACED)
def test_a_replaced_parameter_raises_by_name(
    change: Callable[[Any], None], name: str, steps: int
) -> None:
    """At once, whether its chunk is active or not."""
    model, optimizer = build()
    train(model, optimizer, steps)
    change(model)
    with pytest.raises(ReplacedParameterError, match=name):
        optimizer.train()
    if change is resized and steps == 0:
        return  # torch itself refuses the gradient's new shape
    before = weights(model)
    with pytest.raises(ReplacedParameterError, match=name):
        train(model, optimizer, 1)
    assert_same(before, weights(model))


# -- accelerate ---------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:  # they live as long as the process, with the last run's precision
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    reset()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_accelerate(accelerator: Any, dtype: torch.dtype) -> None:
    plain, stock = build(dtype)
    expected = []
    for _ in range(7):
        losses = [loss_of(plain), loss_of(plain)]
        for loss in losses:
            (loss / 2).backward()
        expected += [float(loss.detach()) for loss in losses]
        stock.step()
    model, optimizer = build(dtype)
    scheduler = optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    prepared, wrapped, scheduler = accelerator.prepare(model, optimizer, scheduler)
    found = []
    for _ in range(14):
        with accelerator.accumulate(prepared):
            loss = loss_of(prepared)
            accelerator.backward(loss)
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
            found.append(float(loss.detach()))
    assert found == expected
    assert_same(weights(plain), weights(model))


def test_a_fresh_state_holds_no_tensor_and_goes_round() -> None:
    model, optimizer = build(BF16)
    reference = train(*build(BF16), 9)
    state = optimizer.state_dict()
    assert state["state"] == {}
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert train(model, optimizer, 9) == reference
