"""A resumed run is the uninterrupted one to the bit; with another K every value finds its row."""

from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.partition import Slice
from chunkft.core.precision import LOW
from chunkft.errors import StateError
from tests.conftest import assert_same, weights

IDS = torch.arange(24).reshape(4, 6)
SETTINGS: dict[str, Any] = {"lr": 1e-2, "chunks": 4, "interval": 3, "max_grad_norm": 0.5}


class Net(nn.Module):
    """Tensors of 0, 1 and 2 dimensions, the first and the last layer tied."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(24, 12)
        self.inner = nn.Linear(12, 40)
        self.norm = nn.LayerNorm(40)
        self.outer = nn.Linear(40, 12)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(12, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.scale * self.outer(self.norm(self.inner(self.embed(ids)).tanh())))


def train(model: nn.Module, optimizer: optim.Optimizer, first: int, last: int) -> list[float]:
    """Steps [first, last), each with a batch of its own."""
    losses: list[float] = []
    for step in range(first, last):
        target = (torch.arange(24) * (3 + step % 5) % 24).flatten()
        logits = model(IDS.roll(step, 1)).float().flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def through_a_file(value: Any) -> Any:
    file = BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def build(dtype: torch.dtype, init: int = 0, **settings: Any) -> tuple[Net, ChunkedOptimizer]:
    model = Net(init).to(dtype)
    settings = {"rule": optim.AdamW} | SETTINGS | settings
    return model, ChunkedOptimizer(model, settings.pop("rule"), **settings)


def assert_resumes(
    stop: int, dtype: torch.dtype, load: str = "weights first", end: int = 30, **settings: Any
) -> None:
    """Stop after `stop` steps, go on in other objects, compare with a run that never stopped."""
    whole, optimizer = build(dtype, **settings)
    losses = train(whole, optimizer, 0, end)
    model, first = build(dtype, **settings)
    train(model, first, 0, stop)
    saved = through_a_file({"weights": model.state_dict(), "optimizer": first.state_dict()})
    resumed, second = build(dtype, init=1, **settings)
    train(resumed, second, 0, 2)  # a used optimizer forgets what it was
    if load == "weights first":
        resumed.load_state_dict(saved["weights"])
    second.load_state_dict(saved["optimizer"])
    if load == "state first":
        resumed.load_state_dict(saved["weights"])
    assert (second.steps, second.active) == (stop, first.active)
    assert train(resumed, second, stop, end) == losses[stop:]
    for (name, a), b in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(a, b), name
    assert second.audit() == optimizer.audit()


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", ["persist", "reset", "decay"])
@pytest.mark.parametrize("stop", [0, 1, 12, 14, 15, 17])
def test_resume_to_the_bit(stop: int, moments: str, dtype: torch.dtype) -> None:
    """Fresh; in the first visit; at the border of a cycle; within a visit, at its border, after."""
    assert_resumes(stop, dtype, moments=moments)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("stop", [14, 15])
def test_weights_loaded_after_the_state(stop: int, dtype: torch.dtype) -> None:
    """The low bits of the masters wait for the weights they belong to."""
    assert_resumes(stop, dtype, load="state first")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["stream", "spread"])
@pytest.mark.parametrize("order", ["cyclic", "shuffled", "reversed"])
@pytest.mark.parametrize("stop", [13, 15])
def test_layouts_and_orders(stop: int, order: str, layout: str, dtype: torch.dtype) -> None:
    settings = {"layout": layout, "order": order, "seed": 5, "moments": "decay"}
    assert_resumes(stop, dtype, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"chunks": 1},
        {"interval": 1},
        {"master": "none"},
        {"max_grad_norm": None},
        {"rule": optim.SGD, "momentum": 0.9, "moments": "decay"},
        {"rule": optim.Adafactor},
        {"rule": optim.NAdam},
        {"rule": optim.AdamW, "fused": True},
    ],
    ids=str,
)
def test_other_settings(settings: dict[str, Any]) -> None:
    assert_resumes(14, torch.bfloat16, **settings)


@pytest.mark.parametrize("stop", [13, 15])
def test_disk(stop: int, tmp_path: Any) -> None:
    assert_resumes(stop, torch.bfloat16, store=tmp_path)


def test_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    assert_resumes(14, torch.bfloat16, rule=bnb.optim.AdamW8bit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_may_be_loaded_into_the_optimizer_it_came_from(dtype: torch.dtype) -> None:
    whole, optimizer = build(dtype)
    losses = train(whole, optimizer, 0, 30)
    model, first = build(dtype)
    train(model, first, 0, 14)
    first.load_state_dict(first.state_dict())
    assert train(model, first, 14, 30) == losses[14:]


def test_two_optimizers_loaded_from_one_state_share_nothing() -> None:
    model, first = build(torch.float32)
    train(model, first, 0, 14)
    state, twin = first.state_dict(), build(torch.float32)
    twin[1].load_state_dict(state)
    twin[0].load_state_dict(model.state_dict())
    expected = through_a_file(first.state_dict())
    train(*twin, 14, 30)
    assert_same(expected, first.state_dict())


def test_the_learning_rate_comes_back() -> None:
    model, first = build(torch.float32)
    scheduler = optim.lr_scheduler.LinearLR(first, 1.0, 0.1, total_iters=20)
    for step in range(7):
        train(model, first, step, step + 1)
        scheduler.step()
    saved = through_a_file([first.state_dict(), scheduler.state_dict()])
    _, second = build(torch.float32)
    other = optim.lr_scheduler.LinearLR(second, 1.0, 0.1, total_iters=20)
    second.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    scheduler.step()
    other.step()
    assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"] < 1e-2


# -- another K ----------------------------------------------------------------------------------


def by_element(optimizer: ChunkedOptimizer, key: str) -> dict[tuple[str, int], Any]:
    """A value of every row by parameter and row: all of it, or the slice's one number."""
    found: dict[tuple[str, int], Any] = {}
    for name, entries in optimizer.state_dict()["state"].items():
        for entry in entries:
            value = entry.get(key, entry["values"].get(key))
            if value is None:
                continue
            alike = isinstance(value, Tensor) and value.dim() > 0
            for row in range(entry["start"], entry["stop"]):
                number = value[row - entry["start"]] if alike else torch.as_tensor(value)
                assert (name, row) not in found
                found[name, row] = number.clone()
    return found


def masters(model: nn.Module, optimizer: ChunkedOptimizer) -> dict[str, Tensor]:
    """fp32 values whose low bits are in the state, made of the parts by hand; bf16 models."""
    found = {name: p.float() for name, p in weights(model).items()}
    for name, entries in optimizer.state_dict()["state"].items():
        for entry in entries:
            low = entry["values"].get(LOW)
            if low is None:
                continue
            rows = slice(entry["start"], entry["stop"])
            target = found[name][rows] if found[name].dim() else found[name]
            upper = target.contiguous().view(torch.int32).reshape(-1) >> 16
            high = upper - (low < 0).int()
            high[entry["values"]["master_index"]] = entry["values"]["master_high"].int()
            bits = (high << 16) | (low.int() & 0xFFFF)
            target.copy_(bits.view(torch.float32).reshape(target.shape))
    return found


RECUTS = [
    ({"chunks": 4}, {"chunks": 7}),
    ({"chunks": 6}, {"chunks": 2}),
    ({"chunks": 5}, {"chunks": 1}),
    ({"chunks": 1}, {"chunks": 5}),
    ({"chunks": 4}, {"chunks": 4, "layout": "spread"}),
    ({"chunks": 4, "layout": "spread"}, {"chunks": 3}),
    ({"chunks": 3, "layout": "spread"}, {"chunks": 5, "layout": "spread", "order": "shuffled"}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stop", [5, 31])
@pytest.mark.parametrize(("old", "new"), RECUTS, ids=str)
def test_recut(old: Any, new: Any, stop: int, dtype: torch.dtype) -> None:
    """In the first cycle, so that counts differ and some rows have none, and in a later one."""
    model, first = build(dtype, **old)
    train(model, first, 0, stop)
    saved = through_a_file({"weights": model.state_dict(), "optimizer": first.state_dict()})
    resumed, second = build(dtype, init=1, **new)
    resumed.load_state_dict(saved["weights"])
    second.load_state_dict(saved["optimizer"])
    for key in ("exp_avg", "exp_avg_sq", "step", "updates"):
        assert_same(by_element(first, key), by_element(second, key))
    if dtype == torch.bfloat16:
        assert_same(masters(model, first), masters(resumed, second))
    assert len(second.partition) == new["chunks"]
    assert_cycle(resumed, second, stop)


def assert_cycle(model: Net, optimizer: ChunkedOptimizer, start: int) -> None:
    """A new cycle begins, in which every row is stepped T times more, each by its own count."""
    before, counts = weights(model), by_element(optimizer, "updates")
    chunks, interval = len(optimizer.partition), optimizer.schedule.interval
    order = [optimizer.schedule.chunk(start + visit * interval) for visit in range(chunks)]
    assert sorted(order) == list(range(chunks))
    assert optimizer.active == order[0]
    losses = train(model, optimizer, start, start + chunks * interval)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(not torch.equal(p, before[name]) for name, p in weights(model).items())
    for key, count in by_element(optimizer, "updates").items():
        assert count == counts.get(key, 0) + interval, key
        assert by_element_step(optimizer, key) == count, key
    optimizer.audit()


def by_element_step(optimizer: ChunkedOptimizer, key: tuple[str, int]) -> Any:
    name, row = key
    entries = optimizer.state_dict()["state"][name]
    return next(e for e in entries if e["start"] <= row < e["stop"])["values"]["step"]


def test_rows_with_counts_of_their_own_stay_slices_of_one_chunk() -> None:
    """K=7 stopped within the second visit, into K=1: several leaves of one tensor."""
    model, first = build(torch.float32, chunks=7, interval=2)
    train(model, first, 0, 3)
    state = through_a_file(first.state_dict())
    resumed, second = build(torch.float32, chunks=1, interval=2)
    resumed.load_state_dict(model.state_dict())
    second.load_state_dict(state)
    pieces = [p for p in second.partition[0] if p.name == "embed.weight"]
    assert (pieces[0].start, pieces[-1].stop) == (0, 24)
    assert len(pieces) > 1
    counts = {second.audit().updates[p] for chunk in second.partition for p in chunk}
    assert counts == {0, 1, 2}
    train(resumed, second, 3, 5)
    again, third = build(torch.float32, chunks=3, interval=2)
    again.load_state_dict(resumed.state_dict())
    third.load_state_dict(through_a_file(second.state_dict()))
    assert_same(by_element(second, "step"), by_element(third, "step"))
    assert_same(by_element(second, "exp_avg_sq"), by_element(third, "exp_avg_sq"))
    assert_cycle(again, third, 5)


def test_rows_keep_their_counts_under_a_rule_that_counts_nothing() -> None:
    settings: dict[str, Any] = {"rule": optim.SGD, "momentum": 0.9, "interval": 2}
    model, first = build(torch.float32, chunks=7, **settings)
    train(model, first, 0, 15)
    resumed, second = build(torch.float32, chunks=1, **settings)
    resumed.load_state_dict(model.state_dict())
    second.load_state_dict(through_a_file(first.state_dict()))
    for key in ("updates", "momentum_buffer"):
        assert_same(by_element(first, key), by_element(second, key))
    assert {int(x) for x in by_element(second, "updates").values()} == {2, 3}


def test_recut_and_back_is_the_state_it_was() -> None:
    model, first = build(torch.bfloat16)
    train(model, first, 0, 24)
    between, second = build(torch.bfloat16, chunks=7)
    between.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    other, third = build(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    third.load_state_dict(second.state_dict())
    for key in ("exp_avg", "exp_avg_sq", "step", "updates"):
        assert_same(by_element(first, key), by_element(third, key))
    assert_same(masters(model, first), masters(other, third))
    assert list(first.partition) == list(third.partition)


@pytest.mark.parametrize("change", [{"interval": 2}, {"order": "reversed"}, {"seed": 9}], ids=str)
def test_another_schedule_begins_a_new_cycle(change: dict[str, Any]) -> None:
    model, first = build(torch.float32, order="shuffled" if "seed" in change else "cyclic")
    train(model, first, 0, 7)
    settings = {"order": first.schedule.order} | change
    resumed, second = build(torch.float32, **settings)
    resumed.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    assert_same(by_element(first, "exp_avg"), by_element(second, "exp_avg"))
    assert (second.steps, second.schedule.start) == (7, 7)
    assert_cycle(resumed, second, 7)


# -- what is refused ----------------------------------------------------------------------------


def non_elementwise(rule: str) -> tuple[Any, str]:
    if rule == "adafactor":
        return optim.Adafactor, "'(row|col)_var'"
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit, "'(state|qmap|absmax)[12]'"


class Wide(nn.Module):
    """256 rows of 256: one block of 8-bit state a row, and as many rows as its code book has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(1024, 256))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (4, 3)])
@pytest.mark.parametrize("rule", ["adafactor", "bitsandbytes"])
def test_state_that_is_not_elementwise_raises_by_key(rule: str, old: int, new: int) -> None:
    kind, key = non_elementwise(rule)
    model = Wide()
    first = ChunkedOptimizer(model, kind, lr=1e-2, chunks=old, interval=1)
    step_wide(model, first, old)
    fresh = Wide()
    second = ChunkedOptimizer(fresh, kind, lr=1e-2, chunks=new, interval=1)
    step_wide(fresh, second, new)
    before = through_a_file(second.state_dict())
    with pytest.raises(StateError, match=f"weight: state {key}"):
        second.load_state_dict(first.state_dict())
    assert_same(before, second.state_dict())  # a refused state changes nothing


def step_wide(model: nn.Module, optimizer: ChunkedOptimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.arange(1024)).square().mean().backward()
        optimizer.step()


def test_single_rows_of_adafactor_are_not_joined() -> None:
    """A slice of one row has a column state of one row too: it looks elementwise."""
    model = nn.Linear(3, 4, bias=False)
    states = []
    for chunks in (4, 2):
        optimizer = ChunkedOptimizer(model, optim.Adafactor, lr=1e-2, chunks=chunks, interval=1)
        for _ in range(4):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        states.append(optimizer)
        if chunks == 4:
            saved = optimizer.state_dict()
            optimizer.detach()
    with pytest.raises(StateError, match=r"'(row|col)_var'"):
        states[1].load_state_dict(saved)


def other_shape() -> nn.Module:
    model = Net()
    model.outer = nn.Linear(40, 12, bias=False)
    return model


def frozen() -> nn.Module:
    model = Net()
    model.norm.requires_grad_(False)
    return model


@pytest.mark.parametrize("other", [other_shape, frozen, lambda: nn.Linear(12, 24)])
def test_the_state_of_another_model_raises(other: Any) -> None:
    model, optimizer = build(torch.float32)
    train(model, optimizer, 0, 5)
    before = weights(model)
    target = ChunkedOptimizer(theirs := other(), optim.AdamW, lr=1e-2, chunks=2)
    untouched = weights(theirs)
    with pytest.raises(StateError, match=r"(outer|norm|^)\.?(weight|bias) has shape"):
        target.load_state_dict(optimizer.state_dict())
    assert target.steps == 0
    assert_same(untouched, weights(theirs))
    assert_same(before, weights(model))


def broken(state: dict[str, Any], how: str) -> dict[str, Any]:
    if how == "of torch":
        model = Net()
        return optim.AdamW(model.parameters()).state_dict()
    if how == "groups":
        names = state["param_groups"][0]["params"]
        return state | {"param_groups": [{"params": names[1:]}, {"params": names[:1]}]}
    if how == "another rule":
        return state | {"rule": "SGD"}
    if how == "format":
        return state | {"format": 99}
    return state | {"partition": state["partition"][1:]}


@pytest.mark.parametrize("how", ["of torch", "groups", "format", "another rule", "partition"])
def test_a_state_that_is_none_of_ours_raises(how: str) -> None:
    model, optimizer = build(torch.float32)
    train(model, optimizer, 0, 5)
    before = through_a_file(optimizer.state_dict())
    with pytest.raises(StateError):
        optimizer.load_state_dict(broken(optimizer.state_dict(), how))
    assert_same(before, optimizer.state_dict())


def test_pieces_are_named_by_parameter_and_rows() -> None:
    model, optimizer = build(torch.float32)
    train(model, optimizer, 0, 12)
    state = optimizer.state_dict()["state"]
    found = {Slice(name, e["start"], e["stop"]) for name, parts in state.items() for e in parts}
    assert found == {piece for chunk in optimizer.partition for piece in chunk}
    assert "head.weight" not in state  # tied: once, by its first name
