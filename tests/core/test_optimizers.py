"""Any torch optimizer drives the chunks: rules, moments, masters, clipping."""

import copy
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.partition import Slice
from chunkft.errors import ChunkFTError, InputError
from tests.conftest import assert_close, weights

optim = torch.optim


class Early(optim.Adagrad):
    """Makes its state when it is built, as Adagrad did before torch 2.13."""

    def __init__(self, params: Any, lr: float = 1e-2, scale: float = 1.0):
        super().__init__(params, lr=lr)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {"step": torch.tensor(0.0), "sum": torch.full_like(p, scale)}


RULES: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "adamw": (optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw-foreach": (optim.AdamW, {"lr": 1e-2, "foreach": True}),
    "adamw-fused": (optim.AdamW, {"lr": 1e-2, "fused": True}),
    "amsgrad": (optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "sgd": (optim.SGD, {"lr": 1e-2}),
    "sgd-momentum": (optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "rmsprop": (optim.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
    "nadam": (optim.NAdam, {"lr": 1e-2}),
    "adagrad": (optim.Adagrad, {"lr": 1e-2}),
    "early": (Early, {"lr": 1e-2, "scale": 0.5}),
    "adafactor": (optim.Adafactor, {"lr": 1e-2}),
}
ADAM = {"lr": 1e-2, "betas": (0.9, 0.99)}


class Net(nn.Module):
    """An embedding, two linear layers with bias, a norm: 1076 elements in 7 tensors."""

    def __init__(self, width: int = 12):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(24, width)
        self.inner = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(self.embed(ids)).tanh()))


IDS = torch.arange(24).reshape(4, 6)
TARGET = (torch.arange(24) * 7 % 16).reshape(4, 6)


def backward(model: nn.Module) -> float:
    loss = nn.functional.cross_entropy(model(IDS).float().flatten(0, 1), TARGET.flatten())
    loss.backward()
    return float(loss.detach())


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int) -> list[float]:
    losses: list[float] = []
    for _ in range(steps):
        losses.append(backward(model))
        optimizer.step()
        model.zero_grad()
    return losses


def rows(values: dict[str, Tensor], piece: Slice) -> Tensor:
    value = values[piece.name]
    return value[piece.start : piece.stop] if value.dim() else value


# -- rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", list(RULES))
def test_one_chunk_is_the_rule_itself_to_the_bit(rule: str) -> None:
    kind, settings = RULES[rule]
    ours, theirs = Net(), Net()
    train(ours, ChunkedOptimizer(ours, kind, chunks=1, interval=2, **settings), 7)
    train(theirs, kind(theirs.parameters(), **settings), 7)
    for name, value in weights(theirs).items():
        assert torch.equal(ours.get_parameter(name).detach(), value), name


@pytest.mark.parametrize("layout", ["stream", "spread"])
@pytest.mark.parametrize("rule", list(RULES))
def test_chunks_learn_under_any_rule(rule: str, layout: str) -> None:
    kind, settings = RULES[rule]
    model = Net()
    before = weights(model)
    optimizer = ChunkedOptimizer(model, kind, chunks=4, interval=3, layout=layout, **settings)
    losses = train(model, optimizer, 60)
    assert losses[-1] < 0.98 * losses[0]
    assert set(optimizer.audit().updates.values()) == {15}
    assert all(not torch.equal(p, before[name]) for name, p in weights(model).items())


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rule, torch.float64) for rule in ("adamw", "sgd-momentum", "rmsprop", "nadam", "adagrad")]
    + [(rule, torch.bfloat16) for rule in ("adamw", "sgd-momentum")],
)
def test_each_chunk_follows_the_rule_run_on_it_alone(rule: str, dtype: torch.dtype) -> None:
    """By hand: a stock rule a chunk on fp32 (fp64) copies of its rows, rounded back every step."""
    kind, settings = RULES[rule]
    ours, theirs = Net().to(dtype), Net().to(dtype)
    optimizer = ChunkedOptimizer(ours, kind, chunks=3, interval=2, layout="spread", **settings)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    masters = {name: p.to(wide) for name, p in weights(theirs).items()}
    partition = list(optimizer.partition)
    leaves = [[rows(masters, piece) for piece in chunk] for chunk in partition]
    rules = [kind(chunk, **settings) for chunk in leaves]
    for step in range(14):
        k = step // 2 % 3
        train(ours, optimizer, 1)
        theirs.zero_grad()
        backward(theirs)
        gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
        for leaf, piece in zip(leaves[k], partition[k], strict=True):
            leaf.grad = rows(gradients, piece).to(wide)
        rules[k].step()
        for name, p in theirs.named_parameters():
            p.data.copy_(masters[name])
            # where rounding turned another way a bf16 weight is an ulp off
            assert_close(ours.get_parameter(name), p, 1e-9 if dtype == wide else 0.02)


def test_bitsandbytes_8bit() -> None:
    """Tensors of 4096 elements or more get 8-bit blocks; smaller ones stay fp32."""
    bnb = pytest.importorskip("bitsandbytes")
    model, dense = Net(96), Net(96)
    optimizer = ChunkedOptimizer(model, bnb.optim.AdamW8bit, lr=1e-2, chunks=3, interval=2)
    losses = train(model, optimizer, 24)
    assert losses[-1] < 0.9 * losses[0]
    state = optimizer.state_dict()["state"]
    found = {v["state1"].dtype for parts in state.values() for x in parts for v in [x["values"]]}
    assert found == {torch.uint8, torch.float32}
    one = ChunkedOptimizer(dense, bnb.optim.AdamW8bit, lr=1e-2, chunks=1)
    stock = Net(96)
    rule = bnb.optim.AdamW8bit(stock.parameters(), lr=1e-2)
    assert train(dense, one, 6) == train(stock, rule, 6)


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["persist", "reset", "decay"])
def test_torchao_8bit(moments: str) -> None:
    low_bit = pytest.importorskip("torchao.optim", reason="torchao is optional")
    model = Net(128)
    optimizer = ChunkedOptimizer(
        model, low_bit.AdamW8bit, lr=1e-2, chunks=2, interval=2, moments=moments, layout="spread"
    )
    losses = train(model, optimizer, 2)
    before = first_moment(optimizer)
    losses += train(model, optimizer, 2)
    if moments != "reset":
        scale = 0.9**2 if moments == "decay" else 1.0
        assert_close(first_moment(optimizer), before * scale, 0.01)
    losses += train(model, optimizer, 7)
    assert losses[-1] < 0.9 * losses[0]
    resumed = Net(128)
    other = ChunkedOptimizer(
        resumed, low_bit.AdamW8bit, lr=1e-2, chunks=2, interval=2, moments=moments, layout="spread"
    )
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(model.state_dict())
    assert train(resumed, other, 5) == train(model, optimizer, 5)


def first_moment(optimizer: ChunkedOptimizer) -> Tensor:
    """Of the first rows of inner.weight, which are enough for 8 bits; as numbers."""
    state = optimizer.state_dict()["state"]["inner.weight"][0]["values"]["exp_avg"]
    assert type(state).__name__ == "OptimState8bit"
    return state.dequantize().clone()


class Counting(optim.SGD):
    """A rule that keeps its course in its group, as Prodigy and schedule-free rules do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1
        super().step(closure)


def test_a_rule_may_write_to_its_group() -> None:
    model = Net()
    optimizer = ChunkedOptimizer(model, Counting, lr=0.1, chunks=3, interval=2)
    train(model, optimizer, 5)
    assert optimizer.param_groups[0]["taken"] == 5
    other = ChunkedOptimizer(fresh := Net(), Counting, lr=0.1, chunks=3, interval=2)
    other.load_state_dict(optimizer.state_dict())
    train(fresh, other, 1)
    assert other.param_groups[0]["taken"] == 6


# -- what is refused ----------------------------------------------------------------------------


def test_lbfgs_is_refused() -> None:
    with pytest.raises(InputError, match="LBFGS"):
        ChunkedOptimizer(Net(), optim.LBFGS, lr=1.0, chunks=2)


def test_a_later_group_is_refused() -> None:
    optimizer = ChunkedOptimizer(Net(), optim.AdamW, lr=0.1, chunks=2)
    with pytest.raises(InputError, match="groups="):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "moments": ({"moments": "keep"}, "moments='keep'"),
    "master": ({"master": "bf16"}, "master='bf16'"),
    "layout": ({"layout": "rows"}, "layout='rows'"),
    "order": ({"order": "random"}, "order='random'"),
    "no chunk": ({"chunks": 0}, "chunks=0"),
    "many chunks": ({"chunks": 10**6}, "chunks=1000000"),
    "interval": ({"interval": 0}, "interval=0"),
    "clip": ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
    "clip nan": ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
    "decay": ({"moments": "decay", "rule": optim.Adagrad}, "moments='decay'"),
    "rule's lr": ({"lr": -1.0}, "Invalid learning rate"),
    "rule's keyword": ({"no_such": 1}, "no_such"),
    "decay sgd": ({"moments": "decay", "rule": optim.SGD}, "moments='decay'"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_settings_name_the_value_and_leave_the_model_alone(case: str) -> None:
    settings, message = BAD[case]
    model = Net()
    settings = {"chunks": 3, "rule": optim.AdamW, "lr": 0.1} | settings
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        ChunkedOptimizer(model, settings.pop("rule"), **settings)
    assert isinstance(caught.value, ChunkFTError) or case.startswith("rule")
    assert_stock(model)


def assert_stock(model: nn.Module) -> None:
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


# -- moments and step counts --------------------------------------------------------------------


def moments_of(optimizer: ChunkedOptimizer, k: int) -> dict[Slice, dict[str, Any]]:
    """The state of chunk k as a checkpoint would have it, copied."""
    pieces = set(optimizer.partition[k])
    state = optimizer.state_dict()["state"]
    found = {Slice(n, x["start"], x["stop"]): x["values"] for n, xs in state.items() for x in xs}
    return copy.deepcopy({piece: v for piece, v in found.items() if piece in pieces})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["persist", "reset", "decay"])
def test_moments_at_the_next_visit(moments: str, dtype: torch.dtype) -> None:
    """K=3, T=2: chunk 0 rests for four steps, so decay scales m by beta1^4 and keeps v."""
    model = Net().to(dtype)
    optimizer = ChunkedOptimizer(
        model, optim.AdamW, chunks=3, interval=2, moments=moments, layout="spread", **ADAM
    )
    train(model, optimizer, 2)
    resting = moments_of(optimizer, 0)
    assert resting
    train(model, optimizer, 4)
    assert optimizer.active == 0
    now = moments_of(optimizer, 0)
    for piece, before in resting.items():
        if moments == "reset":
            assert "exp_avg" not in now[piece]
            continue
        scale = 0.9**4 if moments == "decay" else 1.0
        assert torch.equal(now[piece]["exp_avg"], before["exp_avg"] * scale)
        assert torch.equal(now[piece]["exp_avg_sq"], before["exp_avg_sq"])
        assert float(now[piece]["step"]) == 2
    train(model, optimizer, 1)
    steps = {float(values["step"]) for values in moments_of(optimizer, 0).values()}
    assert steps == {1.0 if moments == "reset" else 3.0}


@pytest.mark.parametrize("layout", ["stream", "spread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_update_of_every_chunk_has_size_lr(dtype: torch.dtype, layout: str) -> None:
    """Adam's first step is lr * sign(gradient), if its bias correction has a count of its own."""
    model = Net().to(dtype)
    optimizer = ChunkedOptimizer(
        model, optim.AdamW, lr=0.125, weight_decay=0, eps=1e-15, chunks=5, interval=3, layout=layout
    )
    for _ in range(5):
        before, chunk = weights(model), optimizer.partition[optimizer.active]
        train(model, optimizer, 1)
        after = weights(model)
        for piece in chunk:
            moved = (rows(after, piece).float() - rows(before, piece).float()).abs()
            close = 1e-4 if dtype == torch.float32 else 0.07  # an ulp of 3.0 in bf16
            assert float(moved.max()) == pytest.approx(0.125, rel=close), piece
        train(model, optimizer, 2)


def test_v_decays_under_zero_gradients() -> None:
    """bf16 model, K=4: after 2000 zero gradients a chunk, v is beta2^2000 of what it was."""
    model = nn.Linear(8, 8, bias=False).bfloat16()
    optimizer = ChunkedOptimizer(
        model, optim.AdamW, lr=0.0, betas=(0.9, 0.999), chunks=4, interval=100
    )
    leaf = optimizer.param_groups[0]["params"][0]
    for _ in range(400):
        for leaf in optimizer.param_groups[0]["params"]:
            leaf.grad = torch.ones_like(leaf)
        optimizer.step()
    before = [moments_of(optimizer, k) for k in range(4)]
    for _ in range(8000):
        for leaf in optimizer.param_groups[0]["params"]:
            leaf.grad = torch.zeros_like(leaf)
        optimizer.step()
    for k in range(4):
        for piece, values in moments_of(optimizer, k).items():
            old = before[k][piece]["exp_avg_sq"]
            assert values["exp_avg_sq"].dtype == torch.float32
            assert torch.allclose(values["exp_avg_sq"], old * 0.999**2000, rtol=1e-3)


# -- masters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["persist", "reset"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("master", ["auto", "fp32", "none"])
def test_masters(master: str, dtype: torch.dtype, moments: str) -> None:
    """100 updates of 1e-4: with a master they add up to 1e-2, without each is rounded away."""
    model = nn.Linear(4, 4, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    optimizer = ChunkedOptimizer(
        model, optim.SGD, lr=1e-4, chunks=2, interval=2, master=master, moments=moments
    )
    for _ in range(200):
        model(torch.ones(1, 4, dtype=dtype)).sum().backward()
        optimizer.step()
    lost = master == "none" and dtype != torch.float32
    expected = torch.ones(4, 4) if lost else torch.full((4, 4), 0.99)
    assert torch.allclose(model.weight.detach(), expected.to(dtype), atol=1e-5)


@pytest.mark.parametrize("master", ["auto", "none"])
def test_the_rule_computes_in_fp32(master: str) -> None:
    model = Net().bfloat16()
    optimizer = ChunkedOptimizer(model, optim.AdamW, chunks=2, interval=2, master=master, **ADAM)
    train(model, optimizer, 5)
    for k in range(2):
        for values in moments_of(optimizer, k).values():
            assert values["exp_avg"].dtype == values["exp_avg_sq"].dtype == torch.float32
            assert ("master_low" in values) == (master == "auto")


# -- clipping, norm, closure --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["stream", "spread"])
def test_clipping_is_scaled_by_the_share_of_the_chunk(layout: str, dtype: torch.dtype) -> None:
    """SGD, lr 1: the step is the clipped gradient, of norm max_grad_norm * sqrt(n_k / n)."""
    model = Net().to(dtype)
    optimizer = ChunkedOptimizer(
        model, optim.SGD, lr=1.0, chunks=4, interval=2, layout=layout, max_grad_norm=1e-3
    )
    sizes = optimizer.partition.sizes()
    assert optimizer.grad_norm is None
    for _ in range(9):
        share = sqrt(sizes[optimizer.active] / sum(sizes))
        pieces = optimizer.partition[optimizer.active]
        backward(model)
        leaves = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(torch.cat([leaf.grad.float().flatten() for leaf in leaves]).norm())
        before = weights(model)
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(norm, rel=1e-5)
        assert norm > 1e-3
        if dtype == torch.float32:
            after = weights(model)
            moved = [(rows(after, p) - rows(before, p)).flatten() for p in pieces]
            assert float(torch.cat(moved).norm()) == pytest.approx(1e-3 * share, rel=1e-3)


def test_a_gradient_below_the_threshold_is_not_touched() -> None:
    free, clipped = Net(), Net()
    for model, limit in ((free, None), (clipped, 1e3)):
        optimizer = ChunkedOptimizer(
            model, optim.SGD, lr=1.0, chunks=3, interval=1, max_grad_norm=limit
        )
        train(model, optimizer, 6)
    assert all(torch.equal(free.get_parameter(n), p) for n, p in clipped.named_parameters())


def test_one_chunk_clips_as_torch_does_to_the_bit() -> None:
    ours, theirs = Net(), Net()
    optimizer = ChunkedOptimizer(ours, optim.AdamW, lr=1e-2, chunks=1, max_grad_norm=0.1)
    stock = optim.AdamW(theirs.parameters(), lr=1e-2)
    for _ in range(5):
        train(ours, optimizer, 1)
        theirs.zero_grad()
        backward(theirs)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        stock.step()
        assert optimizer.grad_norm == float(norm)
    assert all(torch.equal(ours.get_parameter(n), p) for n, p in theirs.named_parameters())


def test_step_with_a_closure() -> None:
    one, two = Net(), Net()
    plain = ChunkedOptimizer(one, optim.AdamW, lr=1e-2, chunks=3, interval=2)
    losses = train(one, plain, 8)
    optimizer = ChunkedOptimizer(two, optim.AdamW, lr=1e-2, chunks=3, interval=2)

    def closure() -> float:
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        return backward(two)

    assert [optimizer.step(closure) for _ in range(8)] == losses
    assert all(torch.equal(one.get_parameter(n), p) for n, p in two.named_parameters())


def test_step_hooks_run() -> None:
    model = Net()
    optimizer = ChunkedOptimizer(model, optim.AdamW, lr=1e-2, chunks=3)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 2)
    assert calls == ["before", "after"] * 2
