"""Forward passes of plain layers whose weight gradient is one slice.

For y = x W^T + b with x [N, I], g = dL/dy [N, O] and the active rows [s, e) of W [O, I]:

    Linear      dx = g W          dW[s:e] = g[:, s:e]^T x
    HF Conv1D   dx = g W^T        dW[s:e] = x[:, s:e]^T g          (W is [I, O], y = x W + b)
    Embedding                     dW[s:e] = scatter-add of g at tokens with s <= id < e

The products of the rows outside [s, e) are never formed: 2 N (e-s) I FLOPs instead of 2 N O I, and
no dense gradient. (ChunkFT, arXiv 2605.21177, section 3.2.)

A slice may consist of several leaves, adjacent in rows, when their step counts differ. The
functions see W detached; its gradient reaches the leaves and nothing else. Everything kept for
backward goes through `save_for_backward`, so activation checkpointing and offloading see it. They
have no `setup_context`, for which torch looks at the signature of `forward` in every call: 7B has
224 linear layers, and a step at 1 x 1024 tokens waits for the host.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Under torch's type stubs autograd contexts are opaque.
Context = Any


class SlicedLinear(Function):
    """y = x W^T + b; gradient for x, b and the rows [start, ...) of W that the leaves hold.

    Args:
        x: [..., I], any rank from 1.  weight: [O, I], detached.  bias: [O] or None.
        start: first active row.  leaves: [r_j, I], adjacent rows from `start` on.
    Returns: [..., O].
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, start: int, *leaves: Tensor
    ) -> Tensor:
        ctx.start, ctx.rows = start, [leaf.shape[0] for leaf in leaves]
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        dx = (g2 @ weight).reshape(x.shape) if ctx.needs_input_grad[0] else None
        db = g2.sum(0) if ctx.needs_input_grad[2] else None
        stop = ctx.start + sum(ctx.rows)
        dw = g2[:, ctx.start : stop].T @ x.reshape(-1, x.shape[-1])
        return dx, None, db, None, *dw.split(ctx.rows)


class SlicedConv1D(Function):
    """y = x W + b of transformers' Conv1D (GPT-2), whose weight is [I, O].

    Arguments as in `SlicedLinear`, except weight: [I, O] and leaves: [r_j, O].
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, bias: Tensor, start: int, *leaves: Tensor
    ) -> Tensor:
        ctx.start, ctx.rows = start, [leaf.shape[0] for leaf in leaves]
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).reshape(
            *x.shape[:-1], weight.shape[1]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        dx = (g2 @ weight.T).reshape(x.shape) if ctx.needs_input_grad[0] else None
        db = g2.sum(0) if ctx.needs_input_grad[2] else None
        stop = ctx.start + sum(ctx.rows)
        dw = x.reshape(-1, x.shape[-1])[:, ctx.start : stop].T @ g2
        return dx, None, db, None, *dw.split(ctx.rows)


class SlicedEmbedding(Function):
    """Rows of an embedding table; gradient for the rows that the leaves hold.

    Args:
        ids: integer, any shape.  weight: [V, D], detached.  padding: row without gradient, or None.
        start: first active row.  leaves: [r_j, D], adjacent rows from `start` on.
    Returns: [*ids.shape, D].
    """

    @staticmethod
    def forward(
        ctx: Context, ids: Tensor, weight: Tensor, padding: int | None, start: int, *leaves: Tensor
    ) -> Tensor:
        ctx.padding, ctx.start, ctx.rows = padding, start, [leaf.shape[0] for leaf in leaves]
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        rows = sum(ctx.rows)
        # Foreign tokens and padding go to one row too many, which torch's own kernel is told to
        # skip: no mask is copied to the host, and the sums round as stock autograd's do.
        inside = (ids >= ctx.start) & (ids < ctx.start + rows)
        if ctx.padding is not None:
            inside &= ids != ctx.padding
        local = torch.where(inside, ids - ctx.start, rows)
        dw = torch.ops.aten.embedding_dense_backward(g, local, rows + 1, rows, False)
        return None, None, None, None, *dw[:rows].split(ctx.rows)


def rule_of(module: nn.Module) -> str | None:
    """Which sliced rule is exact for `module`: "linear", "conv1d", "embedding" or None.

    Only a stock forward qualifies. Subclasses with a forward of their own, wrapped instances and
    computed weights keep their forward and take the hook of `working_set`.
    """
    own = module.__dict__.get("forward")
    stock = type(module).forward
    if own is not None and not (
        isinstance(own, MethodType) and own.__func__ is stock and own.__self__ is module
    ):
        return None
    if "weight" not in module._parameters:
        return None
    if stock is nn.Linear.forward:
        return "linear"
    if stock is nn.Embedding.forward:
        plain = (module.max_norm, module.scale_grad_by_freq, module.sparse) == (None, False, False)
        return "embedding" if plain else None
    # transformers' Conv1D, known by name: the core does not import transformers.
    if (stock.__module__, stock.__qualname__) == ("transformers.pytorch_utils", "Conv1D.forward"):
        return "conv1d"
    return None


class SlicedForward:
    """The forward of one module instance while a slice of its weight is active.

    With rule "stock" the hook does the work, and this only sees whether autograd was on.
    A copy or pickle of the module gets the stock forward back: a copy is independent.
    """

    def __init__(self, module: Any, rule: str, start: int, leaves: Sequence[Tensor]):
        self.module, self.rule, self.start, self.leaves = module, rule, start, tuple(leaves)
        self.weight: Tensor = module.weight
        self.seen_grad = self.seen_no_grad = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        module = self.module
        # functional_call and swapped weights are not ours to slice
        ours = module.weight is self.weight and bool(self.leaves)
        if ours and torch.is_grad_enabled():
            self.seen_grad = True
        elif ours:
            self.seen_no_grad |= module.training
        if not (ours and torch.is_grad_enabled()) or self.rule == "stock" or kwargs:
            return type(module).forward(module, *args, **kwargs)
        (x,) = args
        weight = self.weight.detach()
        leaf = self.leaves[0]
        if leaf.device != weight.device or leaf.dtype != weight.dtype:
            self._follow(weight)
        if self.rule == "embedding":
            return SlicedEmbedding.apply(x, weight, module.padding_idx, self.start, *self.leaves)
        x, weight, bias = cast_for_autocast(x, weight, module.bias)
        function = SlicedLinear if self.rule == "linear" else SlicedConv1D
        return function.apply(x, weight, bias, self.start, *self.leaves)

    def _follow(self, weight: Tensor) -> None:
        """model.to(...) since the last step: gradients must find their leaf there."""
        start = self.start
        for leaf in self.leaves:
            stop = start + leaf.shape[0]
            repoint(leaf, weight[start:stop])
            start = stop

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.module), self.module)
        return MethodType(type(self.module).forward, copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "forward")


def repoint(leaf: Tensor, storage: Tensor) -> None:
    """Make `leaf` share `storage`, of whatever dtype and device; its gradient comes along."""
    gradient, leaf.grad = leaf.grad, None
    leaf.data = storage
    leaf.grad = None if gradient is None else gradient.to(storage)


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What autocast does to the operands of a matrix product, outside an autograd Function."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
