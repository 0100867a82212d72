"""Streamed weights: they rest on the host or on disk and visit the device layer by layer.

    forward          e 0 1 2 ... n     each brought while the one before it works
    backward         n ... 2 1 0       recomputed, or straight from what forward kept

Device bytes: two layers + what is in no unit, the head above all (see units.py). Copied in a step:
the layers twice, 25 GB at 7B.

**How a unit comes.** `parameter.data` points into a slot while the unit works and home otherwise. A
hook on every module inside a unit asks for it; recomputation runs those too. A unit goes when the
next one comes, never earlier: recomputation leaves a layer by an exception.

**What autograd keeps.** A tensor saved for backward that lies in a slot would be overwritten by the
next tenant, which no version counter shows. The layer's forward runs within saved-tensor hooks that
keep such a tensor as (unit, place) and bring the unit again when backward asks for it; everything
else goes on to the hooks outside (checkpointing, offloading). So activation checkpointing is no
condition of being right; it saves the activations, and the weights move once less without it.

**Who may write.** Weights are at home outside of forward and backward, where anybody may read and
write them. Whoever finds them all at home takes nothing that a slot still holds for true.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle

from chunkft.core.ranks import refuse_wrapped
from chunkft.core.residence import RESIDENCE, residence_of
from chunkft.core.working_set import refuse_attached
from chunkft.errors import InputError, NoLayersError, UnsupportedError
from chunkft.memory.arena import Arena, Slot
from chunkft.memory.units import Fill, Unit, bring_others, find_units, is_table

HOST = "host"


class WeightStream:
    """Weights of `model` in motion; `stream_weights` makes one. A `core.residence.Residence`."""

    def __init__(self, model: nn.Module, units: list[Unit], device: torch.device, on_disk: bool):
        self.model, self.units, self.device = model, units, device
        self._kind = "disk" if on_disk else "host"
        self.arena = Arena(units, device, on_disk)
        self._homes = {
            id(parameter): home
            for unit in units
            for parameter, home in zip(unit.parameters.values(), unit.homes, strict=True)
        }
        self._here: tuple[Unit, Slot, list[int]] | None = None  # with its weights' versions
        self._graph = -1  # the backward pass at whose end weights will go home
        self._handles: list[RemovableHandle] = []
        self._overrides: list[tuple[nn.Module, str, Any]] = []
        self._attach()

    # -- what others read -----------------------------------------------------------------------

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of weights by place: slots and residents on the device, and where units rest."""
        stay = [p for p in self.model.parameters() if self.home(p) is None]
        return {
            "slots": self.arena.nbytes,
            "resident": sum(p.numel() * p.element_size() for p in stay),
            self._kind: sum(unit.nbytes for unit in self.units),
        }

    def home(self, weight: nn.Parameter) -> Tensor | None:
        """The resting tensor of a weight, or None if the weight stays on the device."""
        return self._homes.get(id(weight))

    def tensors(self) -> list[Tensor]:
        """What lies on the device in the weights' place."""
        return [slot.bytes for slot in self.arena.slots]

    def settle(self) -> None:
        """Send all weights home, and bring them anew when they are next needed."""
        self._leave()
        self.arena.forget()

    def detach(self) -> None:
        """Give back a stock model; streamed weights lie where they rested, the others stay.

        Raises:
            InputError: a ChunkedOptimizer is still attached.
        """
        if residence_of(self.model) is not self:
            return
        refuse_attached(self.model)
        self.settle()
        self.arena.close()
        for handle in self._handles:
            handle.remove()
        for module, name, override in self._overrides:
            override.close()
            if module.__dict__.get(name) is override:
                if override.own:
                    module.__dict__[name] = override.stock
                else:
                    del module.__dict__[name]
        self._handles, self._overrides = [], []
        del self.model.__dict__[RESIDENCE]

    def __reduce__(self) -> tuple[Any, ...]:
        return _nobody, ()  # a copy or pickle of the model has all its weights

    # -- visits ---------------------------------------------------------------------------------

    def visit(self, unit: Unit) -> Slot:
        """Have the weights of `unit` on the device, and the next one's under way.

        Raises:
            UnsupportedError: the weights were moved or replaced since.
        """
        if self._here is not None and self._here[0] is unit:
            return self._here[1]
        graph = _backward()
        self._leave() if self._here is not None else self.arena.forget()
        for (name, parameter), home in zip(unit.parameters.items(), unit.homes, strict=True):
            if parameter.data_ptr() != home.data_ptr():
                raise UnsupportedError(
                    f"{unit.name}.{name} is at {parameter.data_ptr():#x} on {parameter.device}, "
                    f"not where it rests: move the model before its weights are streamed, and "
                    f"write to weights in place (copy_)"
                )
        slot = self.arena.bring(unit)
        # known to be here before anything points into the slot: an interruption must find its way
        self._here = (unit, slot, [p._version for p in unit.parameters.values()])
        for parameter, view in zip(unit.parameters.values(), slot.views[unit.index], strict=True):
            parameter.data = view
        if graph != -1 and graph != self._graph:
            self._graph = graph
            torch.autograd.Variable._execution_engine.queue_callback(self._leave)  # pyright: ignore[reportAttributeAccessIssue]
        following = unit.index + (1 if graph == -1 else -1)
        if 0 <= following < len(self.units):
            self.arena.prefetch(self.units[following])
        return slot

    def _leave(self) -> None:
        if self._here is None:
            return
        unit, slot, versions = self._here
        moved = zip(unit.parameters.values(), unit.homes, versions, strict=True)
        for parameter, home, version in moved:
            if parameter._version != version:  # Embedding(max_norm=...) writes in its forward
                home.copy_(parameter.data)
            parameter.data = home
        self.arena.left(slot)
        self._here = None

    def tenant(self, tensor: Tensor) -> tuple[Unit, int] | None:
        """Unit and byte offset of a tensor that lies in a slot."""
        if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
            return None  # without a storage of its own, so in no slot
        storage = tensor.untyped_storage()  # the object, since fake tensors have no address
        for slot in self.arena.slots:
            if slot.bytes.untyped_storage() is storage:
                assert slot.unit is not None
                return slot.unit, int(tensor.storage_offset()) * tensor.element_size()
        return None

    # -- hooks and overrides --------------------------------------------------------------------

    def _attach(self) -> None:
        within = {m for unit in self.units for m in unit.module.modules()}
        tops = {unit.module for unit in self.units}
        for module in self.model.modules():
            if module not in within and tops & set(module.modules()):
                settle = _Settle(self)
                self._handles.append(module.register_forward_pre_hook(settle, prepend=True))
                # always: an exception inside must not leave weights in a slot
                self._handles.append(module.register_forward_hook(settle, always_call=True))
        for unit in self.units:
            layer = not is_table(unit.module)
            for module in unit.module.modules():
                if not layer or module is not unit.module:
                    enter = _Enter(self, unit, within_layer=layer)
                    self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
            if layer:
                self._override(unit.module, "forward", _Visit(self, unit))
        self._override(self.model, "_apply", _Apply(self))
        self.model.__dict__[RESIDENCE] = self

    def _override(self, module: nn.Module, name: str, override: "_Override") -> None:
        override.take_over(module, name)
        module.__dict__[name] = override
        self._overrides.append((module, name, override))


class _Enter:
    """Pre-hook of the modules inside a unit."""

    def __init__(self, stream: WeightStream, unit: Unit, within_layer: bool):
        self.stream, self.unit, self.within_layer = stream, unit, within_layer

    def __call__(self, module: nn.Module, args: Any) -> None:
        unit = self.unit
        recorded = torch.is_grad_enabled() and _backward() == -1
        if self.within_layer and recorded and not unit.running:
            raise UnsupportedError(
                f"{unit.name} works outside of its forward, where what autograd keeps of its "
                f"weights would be overwritten; name other modules in stream_weights(units=...)"
            )
        self.stream.visit(unit)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


class _Settle:
    """Pre- and post-hook of the modules around units: the pass begins and ends at home."""

    def __init__(self, stream: WeightStream):
        self.stream = stream

    def __call__(self, *_: Any) -> None:
        if _backward() == -1:
            self.stream.settle()

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


class _Override:
    """A method of one instance in the place of its own; a copy or pickle gets its own back."""

    module: nn.Module
    name: str
    stock: Any
    own: bool
    """Whether the instance had one of its own before."""

    def take_over(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.own, self.stock = name in module.__dict__, getattr(module, name)

    def close(self) -> None:
        """Somebody may have wrapped it meanwhile: from now on it only passes on."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self.stock, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self.name)


class _Kept(NamedTuple):
    """A saved tensor of a slot, by its place in the unit."""

    unit: Unit
    offset: int
    size: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Visit(_Override):
    """The forward of a layer: its weights are here, and autograd keeps none of their slots."""

    def __init__(self, stream: WeightStream, unit: Unit):
        self.stream: WeightStream | None = stream
        self.unit = unit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.stream is None:
            return self.stock(*args, **kwargs)
        self.stream.visit(self.unit)
        self.unit.running += 1
        keeping = torch.is_grad_enabled()
        try:
            with saved_tensors_hooks(*_keepers(self.stream)) if keeping else nullcontext():
                result = self.stock(*args, **kwargs)
        finally:
            self.unit.running -= 1
        for value in tree_iter(result):
            if isinstance(value, Tensor) and self.stream.tenant(value) is not None:
                raise UnsupportedError(
                    f"{self.unit.name} returns its own weights (or a view of them), which will be "
                    f"overwritten; name other modules in stream_weights(units=...)"
                )
        return result

    def close(self) -> None:
        self.stream = None


def _keepers(stream: WeightStream) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Hooks that keep slots by place and hand all else to the hooks outside."""
    # torch asks the innermost pair only; checkpointing counts on being asked
    outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]

    def pack(tensor: Tensor) -> Any:
        found = stream.tenant(tensor)
        if found is None:
            return outer[0](tensor) if outer else tensor
        return _Kept(*found, tensor.size(), tensor.stride(), tensor.dtype)

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, _Kept):
            return outer[1](kept) if outer else kept
        raw = stream.visit(kept.unit).bytes.view(kept.dtype)
        return raw.as_strided(kept.size, kept.strides, kept.offset // kept.dtype.itemsize)

    return pack, unpack


class _Apply(_Override):
    """`model.to(...)` and its like: what stays is on the device already, what rests stays there."""

    def __init__(self, stream: WeightStream):
        self.stream: WeightStream | None = stream

    def __call__(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        if self.stream is None:
            return self.stock(fn, *args, **kwargs)
        for kind in {p.dtype for p in self.module.parameters()}:
            before = torch.empty(0, dtype=kind, device=self.stream.device)
            after = fn(before)
            if (after.dtype, after.device) != (before.dtype, before.device):
                raise UnsupportedError(
                    f"streamed weights of {before.dtype} visit {before.device} and cannot become "
                    f"{after.dtype} on {after.device}; detach() the stream first"
                )
        return self.module

    def close(self) -> None:
        self.stream = None


def _backward() -> int:
    """Number of the backward pass under way in this thread, or -1."""
    return torch._C._current_graph_task_id()


def _nobody() -> None:
    return None


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    """What a copy has in a hook's place."""


# -- making one -----------------------------------------------------------------------------------


def stream_weights(
    model: nn.Module,
    *,
    rest: str | Path = HOST,
    device: torch.device | str | None = None,
    units: Sequence[nn.Module] | None = None,
    resident: int = 0,
    fill: Fill | None = None,
) -> WeightStream:
    """Let the weights of `model` rest elsewhere and visit `device` unit by unit.

    Call it before an optimizer is built. Weights move one unit at a time, so that a model whose
    checkpoint is memory-mapped (`from_pretrained` in the checkpoint's own dtype) or on the meta
    device needs no more private memory than a unit's.

    Args:
        rest: "host", or a directory whose disk has room for the weights.
        device: where they work; None is where they are now. On a CPU it is an accounted arena.
        units: what visits as a whole; None takes the layers, and an untied input embedding.
        resident: layers, the last ones of those, that stay on the device all the same.
        fill: writes the first value of a parameter on the meta device: (name, empty tensor).

    Raises:
        NoLayersError: there is nothing to stream.
        InputError: an optimizer is attached, or the disk is full.
        UnsupportedError: weights that are no plain tensors, a compiled or parallel model.
    """
    if residence_of(model) is not None:
        raise InputError("the weights of this model are streamed already; detach() that stream")
    refuse_attached(model)
    refuse_wrapped(model)
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError("a compiled model holds its weights in its graph; stream it as is")
    first = next(model.parameters(), None)
    if first is None:
        raise NoLayersError(f"{type(model).__name__} has no weights to stream")
    target = torch.device("cpu" if first.is_meta else first.device)
    if device is not None:
        target = torch.empty(0, device=device).device  # with its index
    found = find_units(model, list(units) if units is not None else None, resident)
    folder = None if str(rest) == HOST else Path(rest).expanduser()
    bring_others(model, found, target, fill)
    for unit in found:
        unit.go_home(folder, fill)
    return WeightStream(model, found, target, folder is not None)
