"""What happens around streamed weights: the meter, copies, writes, resuming, loading, refusals."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn, optim

from chunkft.errors import InputError, ReplacedParameterError, UnsupportedError
from chunkft.memory.arena import Arena, Slot
from chunkft.memory.meter import Meter
from chunkft.memory.streaming import stream_weights
from chunkft.memory.units import Unit
from tests.conftest import NAMES, loss_of, weights
from tests.memory.test_streaming import (
    METHODS,
    Block,
    Stack,
    X,
    adamw,
    assert_same,
    at_home,
    family,
    gradients,
    stacks,
    train,
)

# -- what is on the device ------------------------------------------------------------------------


def layers(model: nn.Module) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    inner = {m for one in lists for layer in one for m in layer.modules()}
    return [layer for one in lists if one not in inner for layer in one]


def size(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in dict.fromkeys(parameters))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_never_more_than_two_layers_and_the_head(name: str, method: str) -> None:
    """By the meter, and counted anew whenever a unit comes."""
    model, batch = family(name)
    largest = max(size(layer.parameters()) for layer in layers(model))
    inside = {id(p) for layer in layers(model) for p in layer.parameters()}
    head = size(p for p in model.parameters() if id(p) not in inside)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    room = 2 * (largest + 64 * 30) + head  # weights begin on 64-byte lines
    stream = stream_weights(model)
    fill, seen = Arena._fill, list[int]()

    def counting(self: Arena, slot: Slot, unit: Unit) -> None:
        home = {x.untyped_storage().data_ptr() for one in stream.units for x in one.homes}
        away = [p for p in model.parameters() if p.untyped_storage().data_ptr() not in home]
        seen.append(size(p for p in away if stream.home(p) is None))
        seen[-1] += sum(one.nbytes for one in {*self.held, unit})
        fill(self, slot, unit)

    optimizer = adamw(model, **METHODS[method])
    meter = Meter(model, optimizer)
    with patch.object(Arena, "_fill", counting), meter:
        train(model, batch, optimizer)
    measured = meter.measured()
    assert seen and max(seen) <= room
    assert measured.highest["weights"] <= room + buffers
    on_device = stream.nbytes["slots"] + stream.nbytes["resident"]
    assert measured.highest["weights"] == on_device + buffers
    assert stream.arena.peak <= stream.nbytes["slots"]
    assert measured.resting >= stream.nbytes["host"]


def test_each_layer_comes_twice_a_step() -> None:
    model, batch = family("llama")
    stream = stream_weights(model)
    loss_of(model, batch).backward()
    layer, table = stream.units[-1].nbytes, stream.units[0].nbytes
    # and the first table once, and perhaps once in vain at the end of backward
    assert 10 * layer + table <= stream.arena.copied <= 10 * layer + 2 * table


def test_the_next_unit_comes_ahead() -> None:
    model, batch = family("llama")
    stream = stream_weights(model)
    with patch.object(stream.arena._clerk, "submit", wraps=stream.arena._clerk.submit) as ahead:
        loss_of(model, batch).backward()
    coming = [call.args[2].index for call in ahead.call_args_list]
    assert coming == [1, 2, 3, 4, 5, 4, 3, 2, 1, 0]


def test_files_leave_nothing_behind(tmp_path: Path) -> None:
    model, batch = family("gpt2")
    twin, _ = family("gpt2")
    stream = stream_weights(model, rest=tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []  # also after kill -9
    train(model, batch, optimizer := adamw(model, **METHODS["spread"]))
    train(twin, batch, adamw(twin, **METHODS["spread"]))
    optimizer.detach()
    stream.detach()
    del stream
    gc.collect()
    assert_same(model, twin)  # detached weights go on living in their mapping


def test_a_stream_goes_with_its_model() -> None:
    model, batch = family("llama")
    stream = stream_weights(model)
    train(model, batch, adamw(model, **METHODS["spread"]), 1)
    gone, home = weakref.ref(stream.arena), weakref.ref(stream.units[0].bytes)
    del model, stream
    gc.collect()
    assert gone() is None and home() is None


# -- copies ---------------------------------------------------------------------------------------


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> Any:
    file = BytesIO()
    torch.save(model, file)
    assert file.tell() < 2 * size(model.parameters()) + 200_000
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_is_stock(duplicate: Callable[[Any], Any], attached: bool) -> None:
    model, batch = family("qwen3")
    stream = stream_weights(model)
    optimizer = adamw(model, **METHODS["spread"])
    train(model, batch, optimizer)
    if not attached:
        optimizer.detach()
    copied = duplicate(model)
    assert_same(copied, model)
    before, brought = weights(model), stream.arena.copied
    stock = optim.SGD(copied.parameters(), lr=1.0)
    loss_of(copied.to(torch.float32), batch).backward()
    stock.step()
    assert all(p.grad is not None for p in copied.parameters())
    assert stream.arena.copied == brought, "the copy visits the slots of the original"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    # and may be streamed and trained itself
    copied.zero_grad()
    second = stream_weights(copied)
    train(copied, batch, adamw(copied, **METHODS["stream"]))
    assert at_home(second) and at_home(stream)


def test_saved_files_hold_all_weights(tmp_path: Path) -> None:
    model, batch = family("llama")
    stream_weights(model)
    train(model, batch, adamw(model, **METHODS["stream"]))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(loaded, model)
    assert (tmp_path / "model.safetensors").stat().st_size < size(model.parameters()) + 10_000


def test_detach_gives_back_a_stock_model() -> None:
    model, _ = family("llama", checkpointing=False)
    stock, _ = family("llama", checkpointing=False)
    stream = stream_weights(model)
    stream.detach()
    stream.detach()  # nothing more to do
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert not ours._forward_hooks and not ours._forward_pre_hooks
    stream_weights(model.to(torch.float32))


# -- writes ---------------------------------------------------------------------------------------


def in_place(model: Any, new: dict[str, Tensor]) -> None:
    model.load_state_dict(new, strict=False)


def through_data(model: Any, new: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data.copy_(new[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("write", [in_place, through_data])
def test_foreign_writes_are_followed(write: Callable[..., None], method: str) -> None:
    """Loaded after an evaluation has filled the slots; and between backward and step."""
    found: list[Any] = []
    for streamed in (False, True):
        model, batch = family("llama")
        if streamed:
            stream_weights(model)
        start = {name: x + 0.5 for name, x in weights(model).items()}
        optimizer = adamw(model, **METHODS[method])
        losses = train(model, batch, optimizer, 3)
        with torch.no_grad():
            losses.append(loss_of(model, batch).item())
        write(model, start)
        losses += train(model, batch, optimizer, 3)
        loss_of(model, batch).backward()
        write(model, start)
        optimizer.step()
        losses += train(model, batch, optimizer, 3)
        found.append((losses, weights(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(x, found[1][1][name]) for name, x in found[0][1].items())


def test_an_exception_inside_a_layer_leaves_all_at_home() -> None:
    resident, streamed = stacks("layer")
    stream = stream_weights(streamed)

    def fail(*_: Any) -> None:
        raise KeyError("told to")

    handle = streamed.blocks[3].up.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        streamed(X)
    assert at_home(stream)
    handle.remove()
    loss = streamed(X).square().sum()
    handle = streamed.blocks[3].up.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        loss.backward()
    handle.remove()
    with torch.no_grad():
        for model in (resident, streamed):
            for p in model.parameters():
                p.mul_(2)  # some are still in a slot
    expected = gradients(resident, resident(X).square().sum())
    assert all(map(torch.equal, gradients(streamed, streamed(X).square().sum()), expected))
    assert at_home(stream)
    assert_same(streamed, resident)


@pytest.mark.parametrize("call", range(1, 13))
def test_a_copy_that_fails_is_never_read(call: int) -> None:
    """On its way ahead or when it is needed, in forward or backward."""
    resident, streamed = stacks("layer")
    stream = stream_weights(streamed)
    fill, count = Arena._fill, iter(range(1, 1000))

    def failing(self: Arena, slot: Slot, unit: Unit) -> None:
        if next(count) == call:
            raise OSError("bus error")
        fill(self, slot, unit)

    expected = gradients(resident, resident(X).square().sum())
    with patch.object(Arena, "_fill", failing):
        try:
            found = gradients(streamed, streamed(X).square().sum())
            assert all(map(torch.equal, found, expected))  # it came ahead and was never needed
        except OSError:
            streamed.zero_grad()
        found = gradients(streamed, streamed(X).square().sum())
    assert all(map(torch.equal, found, expected))
    assert at_home(stream)


def test_a_layer_called_by_itself() -> None:
    resident, streamed = stacks()
    stream_weights(streamed)
    for _ in range(2):
        for model in (resident, streamed):
            model.blocks[2](X).sum().backward()
            optim.SGD(model.blocks[2].parameters(), lr=0.1).step()
    assert torch.equal(streamed(X), resident(X))
    assert_same(streamed, resident)


# -- the optimizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["streamed", "resident"])
@pytest.mark.parametrize("chunks", [3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_streamed_or_not(method: str, chunks: int, then: str) -> None:
    settings = METHODS[method]
    found: list[Any] = []
    for first in ("streamed", "resident"):
        model, batch = family("llama")
        if first == "streamed":
            stream_weights(model)
        optimizer = adamw(model, **settings)
        train(model, batch, optimizer, 4)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model, _ = family("llama")
        if then == "streamed":
            stream_weights(model)
        model.load_state_dict(saved[0])
        optimizer = adamw(model, **settings | {"chunks": chunks})
        optimizer.load_state_dict(saved[1])
        found.append((train(model, batch, optimizer, 5), weights(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(x, found[1][1][name]) for name, x in found[0][1].items())


def test_detached_for_a_while() -> None:
    found: list[list[float]] = []
    for streamed in (False, True):
        model, batch = family("llama")
        stream = stream_weights(model) if streamed else None
        optimizer = adamw(model, **METHODS["stream"])
        losses = train(model, batch, optimizer, 2)
        loss_of(model, batch).backward()
        with optimizer.detached() as stock:
            assert all(p.requires_grad for p in stock.parameters())
            losses.append(loss_of(stock.eval(), batch).item())
            if stream:
                stream.detach()
                stream = stream_weights(model)
        optimizer.step()
        found.append(losses + train(model.train(), batch, optimizer, 2))
    assert found[0] == found[1]


@pytest.mark.parametrize("method", METHODS)
def test_leaves_are_counted(method: str) -> None:
    """A leaf of its own is two bytes an element of the chunk beside the master."""
    resident, batch = family("llama")
    streamed, _ = family("llama")
    stream_weights(streamed)
    sizes = []
    for model in (resident, streamed):
        optimizer = adamw(model, **METHODS[method])
        train(model, batch, optimizer)
        sizes.append(optimizer.nbytes["master"])
    assert sizes[0] < sizes[1] <= sizes[0] * 1.5


# -- loading --------------------------------------------------------------------------------------


def from_name(name: str, room: Tensor) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    room.copy_(torch.randn(room.shape, generator=generator) / 10)


def test_a_model_on_the_meta_device_is_filled() -> None:
    with torch.device("meta"):
        model = Stack("layer")
    model.blocks[1].up.weight = model.leave.weight = nn.Parameter(
        torch.empty(32, 16, device="meta")
    )
    tied = model.leave.weight
    stream_weights(model, fill=from_name)
    assert model.blocks[1].up.weight is tied and not tied.is_meta
    for name, parameter in model.named_parameters():
        expected = torch.empty(parameter.shape)
        from_name(name, expected)
        assert torch.equal(parameter, expected), name


# -- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    model, _ = family("llama")
    optimizer = adamw(model, chunks=2)
    with pytest.raises(InputError, match="call detach"):
        stream_weights(model)
    optimizer.detach()
    stream = stream_weights(model)
    with pytest.raises(InputError, match="streamed already"):
        stream_weights(model)
    optimizer = adamw(model, chunks=2)
    with pytest.raises(InputError, match="detach"):
        stream.detach()
    with pytest.raises(InputError, match="no ModuleList"):
        stream_weights(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="not a part"):
        stream_weights(Stack(), units=[nn.Linear(2, 2)])
    stack = Stack()
    with pytest.raises(InputError, match="share"):
        stream_weights(stack, units=[stack.blocks[0], stack.blocks[0].up])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="name a writable directory"):
        stream_weights(Stack(), rest=tmp_path / "file")
    with pytest.raises(InputError, match="fill="), torch.device("meta"):
        stream_weights(Stack())
    stack(X).sum().backward()
    with pytest.raises(InputError, match="zero_grad"):
        stream_weights(stack)
    compiled: Any = torch.compile(Stack())
    with pytest.raises(UnsupportedError, match="compiled"):
        stream_weights(compiled)


def test_a_full_disk_is_told_before_a_page_is_missing(tmp_path: Path) -> None:
    stack, twin = stacks()
    full = OSError(28, "No space left on device")
    with (
        patch("chunkft.memory.units.os.posix_fallocate", side_effect=full),
        pytest.raises(InputError, match=r"GiB for one layer: No space"),
    ):
        stream_weights(stack, rest=tmp_path)
    assert torch.equal(stack(X), twin(X))


def test_moves_and_casts() -> None:
    model, batch = family("llama")
    stream_weights(model)
    assert model.to("cpu") is model and model.to(torch.bfloat16) is model
    for move in (model.float, lambda: model.to("meta")):
        with pytest.raises(UnsupportedError, match="cannot become"):
            move()
    model.model.layers[2].float()
    with pytest.raises(UnsupportedError, match="not where it rests"):
        loss_of(model, batch)


def test_replaced_parameters_are_told() -> None:
    model, batch = family("llama")
    stream_weights(model)
    optimizer = adamw(model, **METHODS["stream"])
    loss_of(model, batch).backward()
    model.load_state_dict(weights(model), assign=True, strict=False)
    with pytest.raises(ReplacedParameterError):
        optimizer.step()


def test_a_layer_that_works_outside_its_forward() -> None:
    class Odd(Stack):
        def span(self, x: Tensor, first: int, last: int) -> Tensor:
            for block in self.blocks[first:last]:
                x = block.inner(x)  # pyright: ignore[reportCallIssue]
            return x

    odd = Odd()
    stream = stream_weights(odd)
    with torch.no_grad():
        odd(X)
    with pytest.raises(UnsupportedError, match="outside of its forward"):
        odd(X)
    stream.detach()
    plain = gradients(odd, odd(X).sum())
    stream_weights(odd, units=[m for block in odd.blocks for m in (block.up, block.down)])
    assert all(map(torch.equal, gradients(odd, odd(X).sum()), plain))


def test_a_layer_that_returns_its_weights() -> None:
    class Latents(Block):
        def __init__(self) -> None:
            super().__init__(16)
            self.latents = nn.Parameter(torch.ones(1, 16))

        def forward(self, x: Tensor) -> Any:
            return {"latents": self.latents.expand(5, 16), "x": super().forward(x)}

    stack = Stack()
    stack.blocks[5] = Latents()
    stream_weights(stack)
    with pytest.raises(UnsupportedError, match=r"blocks\.5 returns its own weights"):
        stack(X)


def test_private_names_of_torch_that_we_rely_on() -> None:
    assert torch._C._current_graph_task_id() == -1
    top = torch._C._autograd._top_saved_tensors_default_hooks
    assert top(True) is None
    with torch.autograd.graph.saved_tensors_hooks(abs, len):
        assert top(True) == (abs, len)
    seen: list[Any] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 1
    y.register_hook(lambda g: seen.append(torch._C._current_graph_task_id()))
    queue = torch.autograd.Variable._execution_engine.queue_callback
    y.register_hook(lambda g: queue(lambda: seen.append("end")))
    x.register_post_accumulate_grad_hook(lambda p: seen.append("leaf"))
    y.backward()
    assert seen[0] >= 0 and seen[1:] == ["leaf", "end"]
