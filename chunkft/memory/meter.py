"""The meter: bytes by kind, measured as training steps run.

A dispatch mode sees what every operation makes, and a weak reference on each storage tells when its
memory is free again. Tensors are counted to the byte and each storage once, under fake tensors too,
which is how `plan` predicts; what a kernel takes for itself and gives back is not seen.

Kinds on the device:

    weights      parameters and buffers; of streamed ones the slots that they visit; of sharded
                 ones this rank's share, and what is gathered
    gradient     of the active slices, in 16 and in 32 bits, and those accumulated by exact mode
    master       fp32 copies of the active slices, or their low bits before they wake; the leaves
                 of streamed weights, which are copies too
    state        of the rule, for the active chunk
    logits       anything as wide as the vocabulary
    activations  what else forward and backward make
    workspace    what else the optimizer's step makes

`resting` is the state of the other chunks, wherever the store keeps it, and streamed weights.

A tensor gets its kind when the optimizer shows it to be a gradient, master or state; one that was
counted as activation or workspace until then gets it from its beginning.
"""

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.ranks import held
from chunkft.core.residence import residence_of
from chunkft.core.store import plain

KINDS: tuple[str, ...] = (
    *("weights", "gradient", "master", "state"),
    *("activations", "logits", "workspace"),
)
RESTING = "resting"
PLACES: tuple[str, ...] = (*KINDS, RESTING)
PASSING = ("activations", "logits", "workspace")


class Reading(NamedTuple):
    """What the device held at one moment, by kind."""

    seconds: float
    """Since the meter was first switched on."""
    bytes: dict[str, int]
    resting: int

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Measured:
    """What a meter has seen."""

    peak: Reading
    """When the device held most."""
    highest: dict[str, int]
    """The most of each kind, at whatever moment."""
    resting: int
    """The most that the store and the homes of streamed weights kept."""
    timeline: list[Reading]


class _Storage(NamedTuple):
    number: int
    size: int
    alive: Any
    """A weak reference that reports the end."""


class _Event(NamedTuple):
    seconds: float
    number: int
    size: int
    """Negative when the memory is given back."""
    kind: str
    """The new one, where only that changes."""


class Meter(TorchDispatchMode):
    """Counts while it is on: `with meter:` around one or more training steps.

    Args:
        model: parameters and buffers are its weights.
        optimizer: a ChunkedOptimizer, or any other of torch: then gradients are those of its
            parameters, and a parameter that is none of the model's is a master.
        vocabulary: width of the logits; None counts them as activations.
        beside: other models on the device, such as a reference.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        vocabulary: int | None = None,
        beside: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self.model, self.optimizer, self.vocabulary = model, optimizer, vocabulary
        self.beside = beside
        self._known: dict[int, _Storage] = {}
        self._kinds: dict[int, str] = {}  # at first
        self._now: dict[int, str] = {}
        self._events: list[_Event] = []
        self._count, self._began = 0, time.perf_counter()
        self._stepping = False
        self._handles: list[Any] = []
        self._gathered: dict[int, Any] = {}  # storages that change their size

    def __enter__(self) -> "Meter":
        for model in (self.model, *self.beside):
            self._see_weights(model)
        self._look()
        rule = self.optimizer.rule if isinstance(self.optimizer, ChunkedOptimizer) else None
        for optimizer in [self.optimizer] if rule is None else [self.optimizer, rule]:
            self._handles += [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._look()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fsdp":
            self._see_gathered(args, kwargs or {})
        self._follow_gathered()
        for value in tree_iter(result):
            for tensor in plain(value) if isinstance(value, Tensor) else ():
                self._see(tensor, self._passing(tensor))
        return result

    def _see_weights(self, model: nn.Module) -> None:
        stream = residence_of(model)
        if stream is not None:
            stream.settle()
            for tensor in stream.tensors():
                self._see(tensor, "weights")
        for parameter in model.parameters():
            home = None if stream is None else stream.home(parameter)
            self._see(held(parameter), "weights" if home is None else RESTING)
            for tensor in scales_of(parameter):
                self._see(tensor, "weights")
        for tensor in model.buffers():
            self._see(tensor, "weights")

    def _see_gathered(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Whole weights that FSDP has put together: storages that it empties and fills anew."""
        for tensor in tree_iter(kwargs.get("out")):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                number = self._see(tensor, "weights")
                self._kinds[number] = self._now[number] = "weights"
                self._gathered[id(storage)] = weakref.ref(storage)

    def _follow_gathered(self) -> None:
        """Those that are filled: an empty one is seen when it is filled again."""
        for key, alive in list(self._gathered.items()):
            storage, known = alive(), self._known.get(key)
            size = 0 if storage is None else storage.nbytes()
            if known is not None and size != known.size:
                change = size - known.size
                self._events.append(_Event(time.perf_counter(), known.number, change, ""))
                self._known[key] = known._replace(size=size)
            if not size:
                del self._gathered[key]

    def _passing(self, tensor: Tensor) -> str:
        if self._stepping:
            return "workspace"
        wide = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        return "logits" if wide and tensor.is_floating_point() else "activations"

    def _see(self, tensor: Tensor, kind: str) -> int:
        storage = tensor.untyped_storage()
        known = self._known.get(id(storage))
        if known is not None:
            return known.number
        self._count += 1
        number, key, size = self._count, id(storage), storage.nbytes()
        end = weakref.ref(storage, lambda _: self._gone(key))
        self._known[key] = _Storage(number, size, end)
        self._kinds[number] = self._now[number] = kind
        self._events.append(_Event(time.perf_counter(), number, size, ""))
        return number

    def _gone(self, key: int) -> None:
        number, size, _ = self._known.pop(key)
        self._events.append(_Event(time.perf_counter(), number, -size, ""))

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._stepping = True
        self._look()

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._look()
        # the rule's step lies within the chunked optimizer's
        self._stepping = optimizer is not self.optimizer

    def _look(self) -> None:
        """Give kinds to what the optimizer holds now."""
        have = holdings(self.optimizer, self.model)
        found: dict[int, str] = {}
        # what has gone to rest first: it makes room for what comes
        for kind, tensors in sorted(have.items(), key=lambda item: item[0] != RESTING):
            # beside a card the slab of a chunk has low bits of its masters, too: it is state
            found |= {self._see(tensor, kind): kind for tensor in tensors}
        for number, kind in found.items():
            if self._kinds[number] in PASSING:  # it was on its way to be this
                self._kinds[number] = self._now[number] = kind
            elif self._now[number] not in ("weights", kind):
                self._now[number] = kind
                self._events.append(_Event(time.perf_counter(), number, 0, kind))

    def measured(self, points: int = 400) -> Measured:
        """What was seen so far, with a timeline of at most `points` readings."""
        sizes: dict[int, int] = {}
        kinds = dict(self._kinds)
        now, highest = dict.fromkeys(PLACES, 0), dict.fromkeys(PLACES, 0)
        timeline: list[Reading] = []
        peak = fullest = Reading(0.0, dict.fromkeys(KINDS, 0), 0)
        every = max(1, -(-len(self._events) // points))
        for i, (seconds, number, size, kind) in enumerate(self._events):
            if kind:
                now[kinds[number]] -= sizes[number]
                now[kind] += sizes[number]
                kinds[number] = kind
            else:
                sizes[number] = sizes.get(number, 0) + size
                now[kinds[number]] += size
            for name, bytes_now in now.items():
                highest[name] = max(highest[name], bytes_now)
            total = sum(now.values()) - now[RESTING]
            if total >= fullest.total or i % every == 0:
                by_kind = {name: now[name] for name in KINDS}
                reading = Reading(seconds - self._began, by_kind, now[RESTING])
                fullest = reading if i % every == 0 or total > fullest.total else fullest
                peak = max(peak, reading, key=lambda r: r.total)
            if (i + 1) % every == 0 or i + 1 == len(self._events):
                timeline.append(fullest)
        return Measured(peak, {k: highest[k] for k in KINDS}, highest[RESTING], timeline)


def scales_of(parameter: nn.Parameter) -> list[Tensor]:
    """What bitsandbytes keeps beside a weight of 4 bits: an fp32 number for each 64 of them."""
    found, state = list[Tensor](), getattr(parameter, "quant_state", None)
    while state is not None:  # nested ones have scales of scales
        found += [value for value in vars(state).values() if isinstance(value, Tensor)]
        state = state.state2
    return found


def holdings(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, list[Tensor]]:
    """Tensors by kind that an optimizer holds beside the weights of `model`."""
    if isinstance(optimizer, ChunkedOptimizer):
        return optimizer.holdings()
    weights = {id(p) for p in model.parameters()}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    state = [x for values in optimizer.state.values() for x in values.values()]
    return {
        "gradient": [p.grad for p in [*own, *model.parameters()] if p.grad is not None],
        "master": [p for p in own if id(p) not in weights],
        "state": [t for value in state for t in plain(value)],
    }
