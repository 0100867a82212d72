"""A dry run: real training steps on tensors that have no memory, seen by the meter.

Model, loss, ChunkedOptimizer and its rule are the very ones of the run, and so are streamed
weights; torch's fake tensors have shapes and lifetimes but no bytes. What a step asks of its data
is answered here: comparisons hold, norms are finite, no element of a master is an exception, every
position has a label.
"""

import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from chunkft.core.exact import cuts_of
from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.partition import Slice
from chunkft.core.passes import rests
from chunkft.core.ranks import world_size
from chunkft.core.residence import residence_of
from chunkft.core.store import State, nbytes
from chunkft.memory.meter import Measured, Meter
from chunkft.memory.streaming import WeightStream

aten: Any = torch.ops.aten


class _Answers(TorchDispatchMode):
    """What operations say whose result depends on the data.

    Args:
        labels: how many positions of a mask of this shape have a label, where that is not all.
    """

    def __init__(self, labels: Mapping[tuple[int, ...], int]):
        super().__init__()
        self.labels = labels

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
            args = (args[0], [p for i in args[1] for p in self._positions(i)], *args[2:])
        result = func(*args, **(kwargs or {}))
        if func is aten.any.default:
            result.answer = False  # `while any of them is out of range: draw anew` must end
        return result

    def _positions(self, index: Tensor | None) -> list[Tensor | None]:
        """A mask as the positions, one tensor a dimension, of all that it covers."""
        if index is None or index.dtype != torch.bool:
            return [index]
        count = self.labels.get(tuple(index.shape), index.numel())
        return [index.new_empty(count, dtype=torch.long) for _ in range(index.dim())]


@contextmanager
def fake(labels: Mapping[tuple[int, ...], int] | None = None) -> Generator[None]:
    """Tensors made within have no memory.

    Args:
        labels: as of `_Answers`.
    """
    with warnings.catch_warnings():
        # addresses are compared by the working set, and equal ones are what it wants to see
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        with FakeTensorMode(allow_non_fake_inputs=True), _Answers(labels or {}):
            yield


def real() -> Any:
    """Within `fake()`: tensors made within have memory after all."""
    return unset_fake_temporarily()


def as_fake(module: nn.Module) -> nn.Module:
    """Within `fake()`: the module with every real tensor in it made fake, shared ones once."""
    made: dict[int, Tensor] = {}

    def to_fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return made[id(tensor)]

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                fake_one = nn.Parameter(to_fake(parameter), parameter.requires_grad)
                part._parameters[name] = fake_one
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):
                part._buffers[name] = to_fake(buffer)
    return module


def counting_flops() -> FlopCounterMode:
    """torch's counter, which knows bitsandbytes' product with 4-bit weights too."""
    mapping = {}
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):  # where it has been imported
        mapping[torch.ops.bitsandbytes.gemm_4bit] = _flops_4bit
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _flops_4bit(a: Any, packed: Any, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(a[:-1]) * prod(shape)


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
    at_once: int
    """Elements of what rests and wakes together: the largest chunk, or the largest block."""
    offloaded: int = 0
    """Most bytes of checkpointed layers' inputs that wait on the host at once."""
    homes: int = 0
    """Bytes of streamed weights where they rest."""
    copied: int = 0
    """Bytes of streamed weights that are brought to the device in a step."""
    units: int = 0
    """Layers, and embedding, that visit the device."""
    read: int = 0
    """Bytes of weights that are read for tokens written one after another."""
    gathered: int = 0
    """Bytes of weights that a rank sends to the others in a step, where they share them."""
    averaged: int = 0
    """Bytes that a rank sends for the means of gradients in a step, the most."""
    group: int = 0
    """Bytes of the weights that are gathered together, the most."""

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
    beside: Sequence[nn.Module] = (),
) -> DryRun:
    """Take steps on `chunks` as they are in a later cycle; to be called within `fake()`.

    Args:
        backward: the forward and backward passes of one optimizer step.
        vocabulary: width of the logits.
        offload: inputs of checkpointed layers wait on the host.
        beside: other models on the device; their weights are streamed if the model's are.
    """
    away = _Away()
    if offload:
        away.attach(model)
    streams = [s for m in (model, *beside) if isinstance(s := residence_of(m), WeightStream)]
    copied = 0
    traffic = Traffic()
    chunks = [0] if optimizer.exact else list(chunks)
    found: list[Measured] = []
    flops: list[int] = []
    for k in chunks:
        _visit(optimizer, k)
        traffic.begin()
        with traffic if world_size() > 1 else nullcontext():
            with counting_flops() as counter:  # it takes some operations apart
                backward()
            optimizer.step()
        # back to the same chunk, whose state comes from the store now
        _visit(optimizer, k)
        meter = Meter(model, optimizer, vocabulary, beside)
        before = sum(stream.arena.copied for stream in streams)
        with meter:
            backward()
            optimizer.step()
        copied = max(copied, sum(stream.arena.copied for stream in streams) - before)
        found.append(meter.measured())
        flops.append(counter.get_total_flops())
    sizes = [sum(map(optimizer.partition.elements, chunk)) for chunk in optimizer.own]
    if optimizer.exact:
        resting = float(optimizer.store.nbytes)
    else:
        resting = _resting(optimizer) * sum(sizes) / sum(sizes[k] for k in set(chunks))
        if len(sizes) == 1 and not optimizer.store.block:  # it never rests
            resting = 0.0
    homes = sum(unit.nbytes for stream in streams for unit in stream.units)
    units = len(streams[0].units) if streams else 0
    counted = max(sizes), sum(sizes), _at_once(optimizer)
    visiting, sent = (away.most, homes, copied, units), (traffic.gathered, traffic.averaged)
    return DryRun(found, flops, resting, *counted, *visiting, 0, *sent, traffic.group)


def _at_once(optimizer: ChunkedOptimizer) -> int:
    """Elements of the largest block; of rules that are not elementwise it has whole slices."""
    partition, size = optimizer.partition, optimizer.store.block
    cuts, shapes = cuts_of(type(optimizer.rule), optimizer.defaults), partition.shapes
    own = enumerate(optimizer.own)
    parts = [x for k, chunk in own for x in rests(chunk, k, shapes, size, cuts)]
    return max(sum(map(partition.elements, part.block)) for part in parts)


@torch.no_grad()  # where `_Answers` takes nonzero for exceptions
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


class Traffic(TorchDispatchMode):
    """What this rank sends to others, who pass parts on in a ring: all of a tensor but its own
    part, and that twice where it is added up and handed out again (all-reduce)."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.averaged = self.group = 0
        self._step = {"gathered": 0, "averaged": 0}

    def begin(self) -> None:
        """A step; what is told is the most of all."""
        self._step = {"gathered": 0, "averaged": 0}

    def _sent(self, kind: str, size: int) -> None:
        self._step[kind] += size * (world_size() - 1) // world_size()
        setattr(self, kind, max(getattr(self, kind), self._step[kind]))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            sizes = [x.numel() * x.element_size() for x in tree_iter(args) if torch.is_tensor(x)]
            whole, name = max(sizes, default=0), str(func)
            if "allgather_base" in name:  # not fingerprints
                self.group = max(self.group, whole)
                self._sent("gathered", whole)
            elif "reduce_scatter" in name:
                self._sent("averaged", whole)
            elif "allreduce" in name:
                self._sent("averaged", 2 * whole)
        return func(*args, **(kwargs or {}))


class _Away:
    """Inputs of checkpointed layers that leave the device until backward, their bytes counted.

    The same hooks at the same place as transformers' `activation_checkpointing_enable(
    offload=True)`, whose host memory the meter would take for the device's here.
    """

    def __init__(self) -> None:
        self.now = self.most = 0

    def attach(self, model: nn.Module) -> None:
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                module.__dict__["_gradient_checkpointing_func"] = partial(self._around, function)

    def _around(self, checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> "_Kept":
        kept = _Kept(tensor.shape, tensor.dtype)
        size = tensor.numel() * tensor.element_size()
        weakref.finalize(kept, self._count, -size)
        self._count(size)
        return kept

    def _unpack(self, kept: "_Kept") -> Tensor:
        return torch.empty(kept.shape, dtype=kept.dtype)

    def _count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@dataclass(frozen=True)
class _Kept:
    """What backward must know of a tensor that is away."""

    shape: torch.Size
    dtype: torch.dtype


@torch.no_grad()  # as in `_resting`
def _visit(optimizer: ChunkedOptimizer, chunk: int) -> None:
    """Begin a visit to `chunk` as if it were its turn."""
    if optimizer.exact:
        return
    state = optimizer.state_dict()
    schedule = state["schedule"]
    schedule["start"] = state["steps"] - chunk * schedule["interval"]
    optimizer.load_state_dict(state)
