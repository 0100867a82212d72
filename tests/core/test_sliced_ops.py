"""The hand-written gradients against finite differences and against stock autograd."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from chunkft.core.sliced_ops import (
    SlicedConv1D,
    SlicedEmbedding,
    SlicedForward,
    SlicedLinear,
    rule_of,
)
from tests.conftest import assert_close

ROWS, OTHER = 7, 5  # of the weight
SHAPES = [(), (3,), (2, 3), (2, 1, 3)]  # of the tokens; the input's rank is one more
CUTS = [[0, 7], [0, 3], [2, 5], [6, 7], [1, 2, 4, 7]]  # borders of adjacent leaves
PARTITIONS = [[0, 3, 7], [0, 1, 2, 6, 7], [0, 2, 4, 5, 7]]

double = torch.float64


def leaves_of(weight: Tensor, borders: list[int]) -> list[Tensor]:
    """Views of `weight`, so that a nudge of a leaf is a nudge of the weight."""
    return [weight.detach()[a:b].requires_grad_() for a, b in pairwise(borders)]


def spread_out(tensor: Tensor) -> Tensor:
    """The same values with gaps in memory."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


def make(op: str, tokens: tuple[int, ...], dtype: torch.dtype = double) -> tuple[Tensor, ...]:
    """Input, weight with ROWS rows, bias."""
    weight = torch.randn(ROWS, OTHER, dtype=dtype)
    inside, outside = (OTHER, ROWS) if op == "linear" else (ROWS, OTHER)
    return torch.randn(*tokens, inside, dtype=dtype), weight, torch.randn(outside, dtype=dtype)


FUNCTIONS: dict[str, Any] = {"linear": SlicedLinear, "conv1d": SlicedConv1D}


def stock(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight if op == "linear" else weight.T, bias)


@pytest.mark.parametrize("borders", CUTS, ids=str)
@pytest.mark.parametrize("tokens", SHAPES, ids=lambda s: f"rank{len(s) + 1}")
@pytest.mark.parametrize("op", FUNCTIONS)
def test_gradcheck_of_matrix_products(op: str, tokens: tuple[int, ...], borders: list[int]) -> None:
    x, weight, bias = make(op, tokens)

    def function(x: Tensor, bias: Tensor, *leaves: Tensor) -> Tensor:
        # transposed, so that the gradient that comes back is not contiguous
        return FUNCTIONS[op].apply(x, weight, bias, borders[0], *leaves).transpose(0, -1)

    inputs = (x.requires_grad_(), bias.requires_grad_(), *leaves_of(weight, borders))
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("tokens", SHAPES, ids=lambda s: f"rank{len(s) + 1}")
@pytest.mark.parametrize("op", FUNCTIONS)
def test_gradcheck_with_gaps_in_memory(op: str, tokens: tuple[int, ...]) -> None:
    x, weight, bias = map(spread_out, make(op, tokens))
    assert not weight.is_contiguous()

    def function(x: Tensor, bias: Tensor, *leaves: Tensor) -> Tensor:
        return spread_out(FUNCTIONS[op].apply(x, weight, bias, 2, *leaves))

    inputs = (x.requires_grad_(), bias.requires_grad_(), *leaves_of(weight, [2, 3, 6]))
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("tokens", SHAPES, ids=lambda s: f"rank{len(s) + 1}")
def test_gradcheck_without_bias(tokens: tuple[int, ...]) -> None:
    x, weight, _ = make("linear", tokens)

    def function(x: Tensor, *leaves: Tensor) -> Tensor:
        return SlicedLinear.apply(x, weight, None, 1, *leaves)

    assert gradcheck(function, (x.requires_grad_(), *leaves_of(weight, [1, 4])))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_gradcheck_with_frozen_input_and_bias(op: str) -> None:
    x, weight, bias = make(op, (2, 3))

    def function(*leaves: Tensor) -> Tensor:
        return FUNCTIONS[op].apply(x, weight, bias, 1, *leaves)

    assert gradcheck(function, tuple(leaves_of(weight, [1, 4, 6])))


@pytest.mark.parametrize("integer", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("borders", CUTS, ids=str)
@pytest.mark.parametrize("tokens", [(), (6,), (3, 4), (2, 3, 2)], ids=lambda s: f"rank{len(s)}")
def test_gradcheck_of_embedding(
    tokens: tuple[int, ...], borders: list[int], integer: torch.dtype
) -> None:
    weight = torch.randn(ROWS, OTHER, dtype=double)
    ids = torch.randint(0, ROWS, tokens).to(integer)

    def function(*leaves: Tensor) -> Tensor:
        return SlicedEmbedding.apply(ids, weight, None, borders[0], *leaves).transpose(0, -1)

    assert gradcheck(function, tuple(leaves_of(weight, borders)))


def test_embedding_of_ids_with_gaps_in_memory() -> None:
    weight = torch.randn(ROWS, OTHER, dtype=double)
    ids = torch.arange(12).remainder(ROWS).reshape(3, 4).T[::2]
    assert gradcheck(
        lambda *leaves: SlicedEmbedding.apply(ids, weight, None, 2, *leaves),
        tuple(leaves_of(weight, [2, 4, 7])),
    )


@pytest.mark.parametrize("borders", PARTITIONS, ids=str)
@pytest.mark.parametrize("tokens", SHAPES, ids=lambda s: f"rank{len(s) + 1}")
@pytest.mark.parametrize("op", FUNCTIONS)
def test_slices_add_up_to_the_dense_gradient(
    op: str, tokens: tuple[int, ...], borders: list[int]
) -> None:
    x, weight, bias = make(op, tokens)
    dense = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = stock(op, *dense)
    g = torch.randn_like(y)
    y.backward(g)
    rows = []
    for start, stop in pairwise(borders):
        mine = x.clone().requires_grad_(), bias.clone().requires_grad_()
        (leaf,) = leaves_of(weight, [start, stop])
        sliced = FUNCTIONS[op].apply(mine[0], weight, mine[1], start, leaf)
        torch.testing.assert_close(sliced, y, rtol=0, atol=1e-12)
        sliced.backward(g)
        rows.append(leaf.grad)
        # the input's gradient is whole whatever the slice
        for ours, theirs in zip(mine, (dense[0], dense[2]), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(rows), dense[1].grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [None, 0, 3, 6])
@pytest.mark.parametrize("borders", PARTITIONS, ids=str)
def test_embedding_slices_add_up_and_padding_gets_nothing(
    borders: list[int], padding: int | None
) -> None:
    weight, ids = torch.randn(ROWS, OTHER, dtype=double), torch.randint(0, ROWS, (8, 9))
    dense = weight.clone().requires_grad_()
    y = F.embedding(ids, dense, padding)
    g = torch.randn_like(y)
    y.backward(g)
    rows = []
    for start, stop in pairwise(borders):
        (leaf,) = leaves_of(weight, [start, stop])
        SlicedEmbedding.apply(ids, weight, padding, start, leaf).backward(g)
        rows.append(leaf.grad)
    got = torch.cat(rows)
    torch.testing.assert_close(got, dense.grad, rtol=0, atol=1e-12)
    if padding is not None:
        assert not got[padding].any()
    assert got.any(1).sum() == ROWS - (padding is not None)


class Indices(TorchDispatchMode):
    """Rows that the scatter-add is told to write, and how many it has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.embedding_dense_backward:
            self.rows, self.count, self.skipped = args[1], args[2], args[3]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("borders", CUTS, ids=str)
def test_embedding_writes_inside_its_slice(borders: list[int]) -> None:
    """On a CPU the kernel ignores rows outside; on CUDA it would write there."""
    weight, ids = torch.randn(ROWS, OTHER), torch.arange(ROWS)
    y = SlicedEmbedding.apply(ids, weight, None, borders[0], *leaves_of(weight, borders))
    with Indices() as seen:
        y.sum().backward()
    mine = range(borders[0], borders[-1])
    expected = [i - borders[0] if i in mine else len(mine) for i in range(ROWS)]
    assert (seen.rows.tolist(), seen.count, seen.skipped) == (expected, len(mine) + 1, len(mine))


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("op", [*FUNCTIONS, "embedding"])
def test_sixteen_bit_rounds_as_stock_autograd_does(
    op: str, dtype: torch.dtype, near: float
) -> None:
    x, weight, bias = make("linear" if op == "embedding" else op, (64,), dtype)
    ids = torch.randint(0, ROWS, (64,))
    dense = weight.clone().requires_grad_()
    y = F.embedding(ids, dense) if op == "embedding" else stock(op, x, dense, bias)
    g = torch.randn_like(y)
    y.backward(g)
    (leaf,) = leaves_of(weight, [2, 6])
    if op == "embedding":
        mine = SlicedEmbedding.apply(ids, weight, None, 2, leaf)
    else:
        mine = FUNCTIONS[op].apply(x, weight, bias, 2, leaf)
    assert mine.dtype == dtype
    assert_close(mine, y, near)
    mine.backward(g)
    assert leaf.grad is not None and dense.grad is not None
    assert leaf.grad.dtype == dtype
    assert_close(leaf.grad, dense.grad[2:6], near)


# -- on modules: which rule, and what a forward meets ----------------------------------------------


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that keeps the forward."""


def wrapped() -> nn.Module:
    module: Any = nn.Linear(OTHER, ROWS)
    old = module.forward
    module.forward = lambda x: 2 * old(x)
    return module


def parametrized() -> nn.Module:
    module = nn.Linear(OTHER, ROWS)
    parametrize.register_parametrization(module, "weight", nn.Tanh())
    return module


RULES: list[tuple[Callable[[], nn.Module], str | None]] = [
    (lambda: nn.Linear(OTHER, ROWS), "linear"),
    (lambda: Renamed(OTHER, ROWS), "linear"),
    (lambda: nn.MultiheadAttention(4, 2).out_proj, "linear"),
    (lambda: nn.Embedding(ROWS, OTHER), "embedding"),
    (lambda: nn.Embedding(ROWS, OTHER, padding_idx=1), "embedding"),
    (lambda: nn.Embedding(ROWS, OTHER, max_norm=1.0), None),
    (lambda: nn.Embedding(ROWS, OTHER, sparse=True), None),
    (lambda: nn.Embedding(ROWS, OTHER, scale_grad_by_freq=True), None),
    (lambda: Scaled(ROWS, OTHER), None),
    (lambda: Conv1D(OTHER, ROWS), "conv1d"),
    (lambda: nn.Conv1d(2, 2, 1), None),
    (lambda: nn.LayerNorm(4), None),
    (wrapped, None),
    (parametrized, None),
]


@pytest.mark.parametrize(("build", "rule"), RULES)
def test_only_a_stock_forward_has_a_rule(build: Callable[[], nn.Module], rule: str | None) -> None:
    assert rule_of(build()) == rule


@contextmanager
def sliced(module: nn.Module, start: int, stop: int) -> Iterator[Tensor]:
    """`module` with rows [start, stop) active: their leaf."""
    rule = rule_of(module)
    assert rule
    (leaf,) = leaves_of(module.get_parameter("weight"), [start, stop])
    module.__dict__["forward"] = SlicedForward(module, rule, start, [leaf])
    yield leaf
    del module.__dict__["forward"]


MODULES: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(OTHER, ROWS),
    lambda: nn.Linear(OTHER, ROWS, bias=False),
    lambda: Conv1D(OTHER, ROWS),
]


def inputs_of(module: nn.Module) -> Tensor:
    return torch.randn(3, 4, ROWS if isinstance(module, Conv1D) else OTHER)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", MODULES)
def test_autocast_is_stock_autocast(build: Callable[[], nn.Module], half: torch.dtype) -> None:
    module = build()
    x = inputs_of(module).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", half):
            y = module(x)
        y.float().pow(2).sum().backward()
        assert x.grad is not None
        dx, x.grad = x.grad, None
        return y, dx

    y, dx = run()
    dense = module.get_parameter("weight").grad
    with sliced(module, 2, 5) as leaf:
        y2, dx2 = run()
    assert dense is not None and leaf.grad is not None
    assert y2.dtype == y.dtype == half and torch.equal(y2, y)
    assert dx2.dtype == dx.dtype == torch.float32 and torch.equal(dx2, dx)
    assert leaf.grad.dtype == torch.float32
    assert torch.equal(leaf.grad.to(half).float(), leaf.grad)  # rounded where stock autocast does
    assert_close(leaf.grad, dense[2:5], 2**-7 if half == torch.bfloat16 else 2**-10)


def test_autocast_leaves_double_alone() -> None:
    module, x = nn.Linear(OTHER, ROWS).double(), torch.randn(3, OTHER, dtype=double)
    with sliced(module, 0, 2), torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == double


@pytest.mark.parametrize("keyword", [False, True])
def test_the_input_may_come_by_keyword(keyword: bool) -> None:
    module, x = nn.Linear(OTHER, ROWS), torch.randn(3, OTHER)
    expected = module(x)
    with sliced(module, 0, 2):
        assert torch.equal(module(input=x) if keyword else module(x), expected)
        with pytest.raises(TypeError):
            module(inputs=x)


def test_swapped_weights_and_no_grad_take_the_stock_forward() -> None:
    module, x = nn.Linear(OTHER, ROWS), torch.randn(3, OTHER)
    other = {"weight": torch.randn(ROWS, OTHER), "bias": torch.zeros(ROWS)}
    with sliced(module, 0, 2) as leaf:
        y = torch.func.functional_call(module, other, (x,))
        assert torch.equal(y, F.linear(x, **other))
        with torch.no_grad():
            assert module(x).grad_fn is None
        with torch.inference_mode():
            assert module(x).is_inference()
    assert leaf.grad is None


@pytest.mark.parametrize("below", [False, True])
def test_nothing_is_kept_that_backward_does_not_need(below: bool) -> None:
    """The weight is kept for dx only, the output never; all of it where hooks can see it."""
    module, kept = nn.Linear(OTHER, ROWS), list[tuple[int, ...]]()
    x = torch.randn(3, OTHER, requires_grad=below)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with sliced(module, 0, 2), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    assert kept == [(3, OTHER), *([(ROWS, OTHER)] if below else [])]


@pytest.mark.parametrize("tokens", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize("op", [*FUNCTIONS, "embedding"])
def test_no_tokens_give_a_zero_gradient(op: str, tokens: tuple[int, ...]) -> None:
    x, weight, bias = make("linear" if op == "embedding" else op, tokens)
    (leaf,) = leaves_of(weight, [1, 4])
    if op == "embedding":
        y = SlicedEmbedding.apply(torch.zeros(tokens, dtype=torch.int64), weight, None, 1, leaf)
    else:
        y = FUNCTIONS[op].apply(x.requires_grad_(), weight, bias, 1, leaf)
    y.sum().backward()
    assert leaf.grad is not None and leaf.grad.shape == (3, OTHER) and not leaf.grad.any()
