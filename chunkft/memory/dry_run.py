"""A dry run: real training steps on tensors that have no memory, seen by the meter.

Model, loss, ChunkedOptimizer and its rule are the very ones of the run; torch's fake tensors have
shapes and lifetimes but no bytes. What a step asks of its data is answered here: comparisons hold,
norms are finite, no element of a master is an exception, every position has a label.
"""

import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.partition import Slice
from chunkft.core.store import State, nbytes
from chunkft.memory.meter import Measured, Meter

aten: Any = torch.ops.aten


class _Answers(TorchDispatchMode):
    """What operations say whose result depends on the data."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is aten._local_scalar_dense.default:
            return getattr(args[0], "answer", 1.0 if args[0].is_floating_point() else 1)
        if func in (aten.equal.default, aten.is_nonzero.default):
            return True
        if func is aten.nonzero.default:
            # labels in the forward pass; exceptions of the master's low bits in the step
            rows = args[0].numel() if torch.is_grad_enabled() else 0
            return args[0].new_empty((rows, args[0].dim()), dtype=torch.long)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [p for i in args[1] for p in _positions(i)], *args[2:])
        result = func(*args, **(kwargs or {}))
        if func is aten.any.default:
            result.answer = False  # `while any of them is out of range: draw anew` must end
        return result


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the positions, one tensor a dimension, of all that it covers."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]


@contextmanager
def fake() -> Generator[None]:
    """Tensors made within have no memory."""
    with warnings.catch_warnings():
        # addresses are compared by the working set, and equal ones are what it wants to see
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        with FakeTensorMode(allow_non_fake_inputs=True), _Answers():
            yield


@dataclass(frozen=True)
class DryRun:
    """What steps on some chunks take."""

    measured: list[Measured]
    """Of each chunk visited."""
    flops: list[int]
    """Of matrix products and attention in one step on each."""
    resting: float
    """Bytes that the state of all chunks takes between visits."""
    largest: int
    """Elements of the largest chunk."""
    elements: int
    """Of all chunks."""
    offloaded: int = 0
    """Bytes of saved tensors that wait on the host during backward."""

    @property
    def highest(self) -> dict[str, int]:
        """The most of each kind."""
        return {k: max(m.highest[k] for m in self.measured) for k in self.measured[0].highest}

    @property
    def peak(self) -> Measured:
        return max(self.measured, key=lambda m: m.peak.total)


def dry_run(
    model: nn.Module,
    optimizer: ChunkedOptimizer,
    backward: Callable[[], Any],
    chunks: Iterable[int] = (0,),
    vocabulary: int | None = None,
    offload: bool = False,
) -> DryRun:
    """Take steps on `chunks` as they are in a later cycle; to be called within `fake()`.

    Args:
        backward: the forward and backward passes of one optimizer step.
        vocabulary: width of the logits.
        offload: what backward needs waits on the host.
    """
    away = _Away(model)
    if offload:
        stay, backward = backward, lambda: away.around(stay)
    chunks = [0] if optimizer.exact else list(chunks)
    found: list[Measured] = []
    flops: list[int] = []
    for k in chunks:
        _visit(optimizer, k)
        with FlopCounterMode(display=False) as counter:  # it takes some operations apart
            backward()
        optimizer.step()
        # back to the same chunk, whose state comes from the store now
        _visit(optimizer, k)
        meter = Meter(model, optimizer, vocabulary)
        with meter:
            backward()
            optimizer.step()
        found.append(meter.measured())
        flops.append(counter.get_total_flops())
    sizes = optimizer.partition.sizes()
    if optimizer.exact:
        resting = float(optimizer.store.nbytes)
    else:
        resting = _resting(optimizer) * sum(sizes) / sum(sizes[k] for k in set(chunks))
        if len(sizes) == 1:  # it never rests
            resting = 0.0
    return DryRun(found, flops, resting, max(sizes), sum(sizes), away.most)


def _resting(optimizer: ChunkedOptimizer) -> float:
    """Bytes of the state that there is, the active chunk's too, if all of it rested."""
    state, codec = optimizer.state_dict()["state"], optimizer.store.codec
    kept: State = {
        (Slice(name, entry["start"], entry["stop"]), key): value
        for name, entries in state.items()
        for entry in entries
        for key, value in entry["values"].items()
    }
    return float(nbytes((codec.encode(kept) if codec else kept).values()))


class _Away:
    """Saved tensors that leave the device between forward and backward, their bytes counted."""

    def __init__(self, model: nn.Module):
        self.weights = {id(p.untyped_storage()) for p in model.parameters()}
        self.now = self.most = 0

    def around(self, backward: Callable[[], Any]) -> Any:
        self.now = 0
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return backward()

    def _pack(self, tensor: Tensor) -> Any:
        if id(tensor.untyped_storage()) in self.weights:
            return tensor
        self.now += tensor.numel() * tensor.element_size()
        self.most = max(self.most, self.now)
        return tensor.shape, tensor.stride(), tensor.dtype

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        shape, strides, dtype = kept
        return torch.empty_strided(shape, strides, dtype=dtype)


def _visit(optimizer: ChunkedOptimizer, chunk: int) -> None:
    """Begin a visit to `chunk` as if it were its turn."""
    if optimizer.exact:
        return
    state = optimizer.state_dict()
    schedule = state["schedule"]
    schedule["start"] = state["steps"] - chunk * schedule["interval"]
    optimizer.load_state_dict(state)
