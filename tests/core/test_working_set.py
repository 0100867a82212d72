"""The model while a chunk is attached, and after: copies, forward passes, modules, coverage."""

import copy
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn, optim

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.sliced_ops import SlicedEmbedding, SlicedLinear
from chunkft.errors import CoverageError, UnsupportedError
from tests.conftest import assert_close, tiny, weights
from tests.core.test_real_life import (
    BF16,
    FP32,
    IDS,
    Net,
    assert_same,
    build,
    leaves,
    loss_of,
    snapshot,
    train,
)

# -- copies -------------------------------------------------------------------------------------


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> Any:
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, by_pickle, by_torch_save]


@pytest.mark.parametrize("steps", [0, 3, 4])
@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_is_stock_and_independent(duplicate: Callable[[Any], Any], steps: int) -> None:
    model, optimizer = build()
    twin, other = build()
    train(model, optimizer, steps)
    train(twin, other, steps)
    copied = duplicate(model)
    assert torch.equal(copied(IDS), model(IDS))
    assert copied.head.weight is copied.embed.weight
    for name, module in copied.named_modules():
        forward = module.__dict__.get("forward")
        assert forward is None or forward.__self__ is module, name
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in copied.parameters())
    assert all(p.requires_grad for p in copied.parameters())
    loss_of(copied).backward()
    assert all(leaf.grad is None for leaf in leaves(optimizer))
    copied.zero_grad()
    before = weights(copied)
    assert train(model, optimizer, 7) == train(twin, other, 7)
    assert_same(before, weights(copied))


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_can_be_trained_by_slices(duplicate: Callable[[Any], Any]) -> None:
    model, optimizer = build()
    copied = duplicate(duplicate(model))
    second = ChunkedOptimizer(copied, optim.AdamW, lr=1e-2, chunks=3, interval=2)
    with patch.object(SlicedLinear, "apply", wraps=SlicedLinear.apply) as sliced:
        losses = train(copied, second, 9)
    assert sliced.call_count
    assert losses == train(model, optimizer, 9)
    second.detach()
    loss_of(copied).backward()
    assert all(p.grad is not None for p in copied.parameters())


def test_save_pretrained_sees_a_stock_model(tmp_path: Path) -> None:
    model, batch = tiny("qwen3")
    optimizer = ChunkedOptimizer(model, optim.AdamW, lr=1e-2, chunks=3, interval=1)
    for _ in range(4):
        model(**batch).loss.backward()
        optimizer.step()
    saved: Any = model
    saved.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path)
    assert_same(weights(model), weights(loaded))
    assert torch.equal(loaded.eval()(**batch).logits, saved.eval()(**batch).logits)


# -- forward passes that are not training -------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_autograd_the_stock_forward_runs(mode: Any, training: bool) -> None:
    model, optimizer = build(chunks=5)
    model.train(training)
    for _ in range(5):
        with (
            mode(),
            patch.object(SlicedLinear, "apply", side_effect=AssertionError),
            patch.object(SlicedEmbedding, "apply", side_effect=AssertionError),
        ):
            free = model(IDS)
        assert torch.equal(free, model(IDS).detach())
        train(model, optimizer, 2)


def test_eval_in_between_changes_nothing() -> None:
    plain, stock = build()
    model, optimizer = build()
    expected, losses = train(plain, stock, 9), []
    for _ in range(9):
        with torch.inference_mode():
            loss_of(model.eval())
        losses += train(model.train(), optimizer, 1)
    assert losses == expected


def test_functional_call_with_other_weights() -> None:
    """Meta-learning and LoRA merges do it: nothing of it is ours, nothing reaches our leaves."""
    model, optimizer = build()
    other = {name: p.detach().clone().requires_grad_() for name, p in Net(1).named_parameters()}
    stock = Net(1)
    for _ in range(3):
        logits = torch.func.functional_call(model, other, (IDS,))
        assert torch.equal(logits, stock(IDS))
        logits.sum().backward()
        stock(IDS).sum().backward()
        assert all(leaf.grad is None for leaf in leaves(optimizer))
        assert all(torch.equal(p.grad, stock.get_parameter(n).grad) for n, p in other.items())
        train(model, optimizer, 2)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_over_twelve_chunks(whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    """`torch.compile` of the model and given the wrapper or the model itself."""
    torch._dynamo.reset()
    plain, stock = build(chunks=12, interval=1)
    expected = train(plain, stock, 13)
    model = Net()
    compiled: Any = torch.compile(model, backend="aot_eager")
    given = compiled if whole else model
    optimizer = ChunkedOptimizer(given, optim.AdamW, lr=1e-2, chunks=12, interval=1)
    names = {piece.name for chunk in optimizer.partition for piece in chunk}
    assert names == {name for name, _ in model.named_parameters()}
    with caplog.at_level(logging.WARNING):
        losses = train(compiled, optimizer, 13)
    assert sum("recompile_limit" in record.getMessage() for record in caplog.records) == 1
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, p in weights(plain).items():
        assert torch.allclose(p, model.get_parameter(name), atol=1e-5), name


# -- leaving the model --------------------------------------------------------------------------


def own_forward(x: Tensor) -> Tensor:
    return x


def furnished() -> Any:
    """A model with frozen parts, hooks and a forward of somebody else's."""
    model: Any = Net()
    model.norm.requires_grad_(False)
    model.outer.bias.requires_grad_(False)
    model.extra = nn.Linear(2, 2)
    model.extra.forward = own_forward
    model.inner.register_forward_hook(lambda *_: None)
    model.inner.weight.register_post_accumulate_grad_hook(lambda _: None)
    model.head.weight.register_hook(lambda g: g)
    return model


def furniture(model: nn.Module) -> Any:
    """All that can be found on a model, by identity."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = {
        name: [id(m), id(m.__dict__.get("forward")), *(list(m.__dict__[h].items()) for h in hooks)]
        for name, m in model.named_modules()
    }
    found = {
        name: [
            id(p),
            p.requires_grad,
            p.grad,
            *map(attached, (p, p), ("_post_accumulate", "_backward")),
        ]
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    return [modules, found, sorted(vars(model))]


def attached(parameter: nn.Parameter, kind: str) -> list[Any]:
    name = {"_post_accumulate": "_post_accumulate_grad_hooks", "_backward": "_backward_hooks"}[kind]
    return list((getattr(parameter, name) or {}).items())


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("chunks", [1, 4])
def test_detach_gives_back_the_model_it_was_given(chunks: int, steps: int) -> None:
    model = furnished()
    before = furniture(model)
    optimizer = ChunkedOptimizer(model, optim.AdamW, lr=1e-2, chunks=chunks, interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, steps)
    trained = weights(model)
    loss_of(model).backward()
    optimizer.detach()
    assert furniture(model) == before
    assert_same(trained, weights(model))
    optimizer.detach()  # twice is once


def test_after_detach_the_model_trains_without_us() -> None:
    model, optimizer = build()
    train(model, optimizer, 5)
    state = optimizer.state_dict()
    optimizer.detach()
    assert_same(state, optimizer.state_dict())
    with pytest.raises(UnsupportedError, match="detached"):
        optimizer.step()
    stock, dense = Net(), weights(model)
    stock.load_state_dict(dense, strict=False)
    ours, theirs = optim.AdamW(model.parameters()), optim.AdamW(stock.parameters())
    assert train(model, ours, 3) == train(stock, theirs, 3)
    model.zero_grad()
    again = ChunkedOptimizer(model, optim.AdamW, lr=1e-2, chunks=3, interval=2)
    again.load_state_dict(state)
    train(model, again, 5)


@pytest.mark.parametrize("moments", ["persist", "reset", "decay"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_detached_for_a_while_changes_nothing(dtype: torch.dtype, moments: str) -> None:
    """Between micro-batches, within a visit and at borders; pending gradients are kept."""
    plain, stock = build(dtype, moments=moments)
    model, optimizer = build(dtype, moments=moments)
    for _ in range(14):
        for net in (plain, model):
            loss_of(net).backward()
        with optimizer.detached() as free:
            assert free is model
            assert not any("forward" in m.__dict__ for m in model.modules())
            assert all(p.requires_grad and p.grad is None for p in model.parameters())
            loss_of(model).backward()
            model.zero_grad()
        for net, rule in ((plain, stock), (model, optimizer)):
            loss_of(net).backward()
            rule.step()
    assert_same(weights(plain), weights(model))
    assert_same(stock.state_dict(), optimizer.state_dict())


def test_an_error_while_detached_attaches_again() -> None:
    model, optimizer = build()
    loss_of(model).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(KeyError), optimizer.detached():
        raise KeyError
    assert_same(before, snapshot(model, optimizer))
    assert all(leaf.grad is not None for leaf in leaves(optimizer))


# -- data parallel ------------------------------------------------------------------------------


def test_data_parallel_is_refused_with_the_cure() -> None:
    with pytest.raises(UnsupportedError, match=r"DataParallel knows only.*the model itself"):
        ChunkedOptimizer(nn.DataParallel(Net()), optim.AdamW, lr=1e-2, chunks=2)


@pytest.fixture
def world() -> Iterator[Callable[[int], None]]:
    """Starts a make-believe process group of that many processes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(size: int) -> None:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)

    yield start
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_processes_that_come_later_are_refused(world: Callable[[int], None]) -> None:
    model, optimizer = build()
    world(2)
    before = weights(model)
    with pytest.raises(UnsupportedError, match="has 2 ranks, 1 when the optimizer was built"):
        train(model, optimizer, 1)
    assert_same(before, weights(model))


def test_one_process_of_a_group_is_fine(world: Callable[[int], None]) -> None:
    world(1)
    train(*build(), 3)


# -- modules ------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture as transformers has it: tensors of three dimensions, one matrix an expert."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(8, 5, bias=False)
        self.up = nn.Parameter(torch.randn(5, 8, 12) / 3)
        self.down = nn.Parameter(torch.randn(5, 12, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        inner = torch.einsum("td,edh->teh", x, self.up).relu()
        return torch.einsum("te,teh,ehd->td", share, inner, self.down)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second = nn.Conv1d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x[None, None]).mean(-1))


class Spelled(nn.Module):
    """A layer that is called by keyword, and one whose weight is used before and after."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x @ self.second.weight + self.first(input=x)) @ self.second.weight


@pytest.mark.parametrize("layout", ["stream", "spread"])
@pytest.mark.parametrize("kind", [Experts, Attention, Images, Spelled])
def test_every_slice_gets_the_rows_of_the_dense_gradient(
    kind: Callable[[], nn.Module], layout: str
) -> None:
    x = torch.randn(10, 8)
    dense, model = kind(), kind()
    dense(x).square().mean().backward()
    optimizer = ChunkedOptimizer(model, optim.SGD, lr=0.0, chunks=3, interval=1, layout=layout)
    for chunk in optimizer.partition:
        model(x).square().mean().backward()
        for piece, leaf in zip(chunk, leaves(optimizer), strict=True):
            gradient = dense.get_parameter(piece.name).grad
            assert gradient is not None
            assert leaf.grad is not None
            assert_close(leaf.grad, gradient[piece.start : piece.stop], 1e-5)
        optimizer.step()
    assert set(optimizer.audit().updates.values()) == {1}


# -- coverage -----------------------------------------------------------------------------------


class Spare(Net):
    """BERT's pooler: a layer that the forward pass has no use for."""

    def __init__(self, width: int = 2):
        super().__init__()
        self.spare = nn.Linear(width, width)


def warned(model: nn.Module, optimizer: ChunkedOptimizer, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, steps)
    return [str(w.message) for w in caught if "no gradient in a whole visit" in str(w.message)]


@pytest.mark.parametrize("layout", ["stream", "spread"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_an_unused_parameter_is_listed_and_warned_of_once(chunks: int, layout: str) -> None:
    model = Spare()
    before = weights(model)
    optimizer = ChunkedOptimizer(
        model, optim.AdamW, lr=1e-2, chunks=chunks, interval=2, layout=layout
    )
    assert warned(model, optimizer, 1) == []
    messages = warned(model, optimizer, 6 * chunks)
    names = [name for name in ("spare.bias", "spare.weight") for m in messages if name in m]
    assert names == ["spare.bias", "spare.weight"]
    audit = optimizer.audit()
    assert audit.without_gradient == ("spare.bias", "spare.weight")
    moved = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert moved == set(before) - {"spare.bias", "spare.weight"}


def test_a_chunk_that_got_no_gradient_at_all_raises() -> None:
    model = Spare(80)
    optimizer = ChunkedOptimizer(model, optim.AdamW, lr=1e-2, chunks=5, interval=1)
    whole = [
        k
        for k, chunk in enumerate(optimizer.partition)
        if {p.name for p in chunk} <= {"spare.weight"}
    ]
    assert whole
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, whole[0])
        optimizer.audit()
        # torch refuses backward() of a loss that hangs on nothing trainable; here something else is
        other = torch.ones((), requires_grad=True)
        (loss_of(model) * other).backward()
        optimizer.step()
        with pytest.raises(CoverageError, match=rf"chunk {whole[0]} \(spare\.weight"):
            optimizer.audit()


def test_the_audit_counts_what_is_still_to_come() -> None:
    model, optimizer = build(chunks=4, interval=2)
    sizes = optimizer.partition.sizes()
    for steps in range(9):
        audit = optimizer.audit()
        assert audit.waiting == sum(sizes[-(-steps // 2) :])
        assert (audit.steps, audit.cycles) == (steps, steps // 8)
        train(model, optimizer, 1)
