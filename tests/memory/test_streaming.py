"""Streamed against resident training, to the bit, whatever checkpointing and hooks do."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from chunkft import ChunkedOptimizer
from chunkft.core.store import Store
from chunkft.errors import InputError
from chunkft.memory.streaming import WeightStream, stream_weights
from chunkft.memory.units import find_units
from tests.conftest import NAMES, loss_of, tiny, weights

METHODS: dict[str, dict[str, Any]] = {
    "stream": {"chunks": 3, "interval": 1},
    "spread": {"chunks": 3, "interval": 1, "layout": "spread", "moments": "decay"},
    "exact": {"chunks": 3, "exact": True},
}
DEEP = {
    "gpt2": {"n_layer": 4},
    "t5": {"num_layers": 3},
    "llama": {"num_hidden_layers": 5},
}
STEPS = 4


def family(name: str, dtype: torch.dtype = torch.bfloat16, checkpointing: bool = True) -> Any:
    model, batch = tiny(name, **DEEP.get(name, {"num_hidden_layers": 4}))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}
    return model.to(dtype), batch


def adamw(model: nn.Module, **settings: Any) -> ChunkedOptimizer:
    return ChunkedOptimizer(model, optim.AdamW, lr=1e-2, **settings)


def train(model: Any, batch: Any, optimizer: ChunkedOptimizer, steps: int = STEPS) -> list[float]:
    """Two micro-batches a step."""
    losses: list[float] = []
    for _ in range(steps):
        for _ in range(2):
            loss = loss_of(model, batch)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def at_home(stream: WeightStream) -> bool:
    return all(
        p.data_ptr() == home.data_ptr()
        for unit in stream.units
        for p, home in zip(unit.parameters.values(), unit.homes, strict=True)
    )


# -- to the bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", DEEP)
def test_resident_layers_and_blocks(name: str, checkpointing: bool) -> None:
    """Some layers stay, the state visits in the step only: still the same."""
    resident, batch = family(name, checkpointing=checkpointing)
    streamed, _ = family(name, checkpointing=checkpointing)
    whole = len(find_units(streamed, None))
    stream = stream_weights(streamed, resident=2)
    assert len(stream.units) == whole - 2
    more: dict[str, Any] = {"chunks": 3, "interval": 2, "layout": "spread"}
    first, second = adamw(resident, **more), adamw(streamed, store=Store(block=500), **more)
    assert train(streamed, batch, second, 8) == train(resident, batch, first, 8)
    assert_same(streamed, resident)


@pytest.mark.parametrize("count", [5, -1])
def test_one_layer_is_streamed_at_least(count: int) -> None:
    with pytest.raises(InputError, match=rf"resident={count} of 5 layers: leave one"):
        stream_weights(family("llama")[0], resident=count)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_streamed_is_resident_to_the_bit(name: str, method: str, checkpointing: bool) -> None:
    dtype = torch.float32 if method == "stream" else torch.bfloat16
    resident, batch = family(name, dtype, checkpointing)
    streamed, _ = family(name, dtype, checkpointing)
    stream = stream_weights(streamed)
    optimizers = [adamw(model, **METHODS[method]) for model in (resident, streamed)]
    assert train(streamed, batch, optimizers[1]) == train(resident, batch, optimizers[0])
    assert_same(streamed, resident)
    assert at_home(stream)
    for optimizer in optimizers:
        optimizer.detach()
    stream.detach()
    assert_same(streamed, resident)
    assert torch.equal(loss_of(streamed, batch), loss_of(resident, batch))


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("rule", [optim.SGD, optim.Adafactor, optim.AdamW])
def test_any_rule_on_disk(rule: Any, chunks: int, tmp_path: Path) -> None:
    resident, batch = family("llama")
    streamed, _ = family("llama")
    stream_weights(streamed, rest=tmp_path)
    settings: dict[str, Any] = {"lr": 1e-2, "chunks": chunks, "interval": 1, "max_grad_norm": 0.5}
    ours = ChunkedOptimizer(streamed, rule, store=tmp_path, **settings)
    theirs = ChunkedOptimizer(resident, rule, **settings)
    assert train(streamed, batch, ours) == train(resident, batch, theirs)
    assert_same(streamed, resident)


@pytest.mark.parametrize("training", [True, False])
def test_a_plain_optimizer_works_too(training: bool) -> None:
    """Nothing of ours is needed where the weights rest beside the device."""
    resident, batch = family("gpt2")
    streamed, _ = family("gpt2")
    stream_weights(streamed)
    for model in (resident, streamed):
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            loss_of(model.train(training), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(streamed, resident)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.part = False  # checkpoint one part of the layer

    def inner(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())

    def forward(self, x: Tensor) -> Tensor:
        return x + (checkpoint(self.inner, x, use_reentrant=False) if self.part else self.inner(x))


class Stack(nn.Module):
    """Six layers, checkpointed by `style`."""

    def __init__(self, style: str = "none", width: int = 16):
        super().__init__()
        self.style = style
        self.enter = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(6))
        for block in self.blocks:
            block.part = style == "part"
        self.leave = nn.Linear(width, 1)

    def span(self, x: Tensor, first: int, last: int) -> Tensor:
        for block in self.blocks[first:last]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        step = {"layer": 1, "pair": 2, "triple": 3, "all": 6}.get(self.style)
        if step is None:
            return self.leave(self.span(x, 0, 6))
        for first in range(0, 6, step):
            x = checkpoint(self.span, x, first, first + step, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        return self.leave(x)


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
STYLES = ("none", "layer", "part", "pair", "triple", "all")


def stacks(style: str = "none") -> tuple[Stack, Stack]:
    torch.manual_seed(0)
    stack = Stack(style)
    return stack, copy.deepcopy(stack)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    model.zero_grad()
    return found


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_checkpointing(style: str) -> None:
    """Also those that recompute more layers at once than there are slots."""
    resident, streamed = stacks(style)
    stream = stream_weights(streamed)
    expected = gradients(resident, resident(X).square().sum())
    for _ in range(2):
        found = gradients(streamed, streamed(X).square().sum())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert at_home(stream)


@pytest.mark.parametrize("style", STYLES)
def test_checkpointing_still_frees_activations(style: str) -> None:
    """Our saved-tensor hooks pass on to those of checkpointing; what is kept counts the same."""

    def kept(model: Stack) -> int:
        counted: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (counted.append(x.numel()), x)[1], lambda x: x
        ):
            loss = model(X).square().sum()
        gradients(model, loss)
        return len(counted)

    resident, streamed = stacks(style)
    before = kept(resident)
    stream_weights(streamed)
    # weights are kept by place, not handed on
    outside = kept(streamed)
    assert outside <= before
    if style in ("layer", "pair", "triple", "all"):
        assert outside == before


def test_hooks_outside_are_asked() -> None:
    resident, streamed = stacks()
    stream_weights(streamed)
    expected = gradients(resident, resident(X).square().sum())
    with save_on_cpu():
        loss = streamed(X).square().sum()
    assert all(map(torch.equal, gradients(streamed, loss), expected))


def test_two_passes_before_one_backward() -> None:
    resident, streamed = stacks("layer")
    stream_weights(streamed)
    expected = gradients(resident, resident(X).sum() * resident(-X).sum())
    found = gradients(streamed, streamed(X).sum() * streamed(-X).sum())
    assert all(map(torch.equal, found, expected))


def test_second_derivatives_are_refused_by_torch() -> None:
    """The first backward's own graph keeps slots; their version counter tells."""
    _, streamed = stacks()
    stream_weights(streamed)
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(streamed(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        slope.square().sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode: Any) -> None:
    resident, batch = family("llama")
    streamed, _ = family("llama")
    stream = stream_weights(streamed)
    optimizers = adamw(resident, **METHODS["spread"]), adamw(streamed, **METHODS["spread"])
    for _ in range(2):
        with mode():
            assert torch.equal(loss_of(streamed, batch), loss_of(resident, batch))
        ids = batch["input_ids"][:, :4]
        settings = {"max_new_tokens": 3, "do_sample": False}
        ours, theirs = (m.eval().generate(ids, **settings) for m in (streamed, resident))
        assert torch.equal(ours, theirs) and at_home(stream)
        for model, optimizer in zip((resident, streamed), optimizers, strict=True):
            train(model.train(), batch, optimizer, 2)
    assert_same(streamed, resident)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_autocast_over_wider_weights(checkpointing: bool) -> None:
    found: list[Any] = []
    for streamed in (False, True):
        model, batch = family("llama", torch.float32, checkpointing)
        if streamed:
            stream_weights(model)
        optimizer = adamw(model, **METHODS["spread"])
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
        found.append(weights(model))
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


@pytest.mark.parametrize("style", ["none", "layer", "pair"])
def test_compiled_afterwards(style: str) -> None:
    torch._dynamo.reset()
    resident, streamed = stacks(style)
    stream = stream_weights(streamed)
    compiled = torch.compile(streamed, backend="aot_eager")
    expected = gradients(resident, resident(X).square().sum())
    for _ in range(2):
        found = gradients(streamed, compiled(X).square().sum())
        assert all(map(torch.equal, found, expected)) and at_home(stream)


def test_max_norm_writes_in_forward() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            tables = [nn.Embedding(8, 16, max_norm=0.5) for _ in range(3)]
            self.tables = nn.ModuleList(tables)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.stack([table(ids) for table in self.tables]).sum()

    resident = Lookup()
    streamed = copy.deepcopy(resident)
    stream_weights(streamed)
    assert torch.equal(streamed(torch.arange(5)), resident(torch.arange(5)))
    assert_same(streamed, resident)
