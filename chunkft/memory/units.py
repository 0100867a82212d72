"""Units of streamed weights: what comes and goes together, and the home where it rests.

A unit is a layer, a child of one of the outermost ModuleLists, or an untied input embedding that
fits a layer's slot. A weight with a second use outside its unit stays on the device, and so does
all that is in no unit.

A home is one mapping of memory or of a file with the unit's weights side by side, so that one copy
brings them. Each begins on a 64-byte line and has a storage object of its own: whoever saves or
copies one weight does not take the whole unit along.
"""

import mmap
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from chunkft.core.store import ALIGN, GIB
from chunkft.errors import InputError, NoLayersError, UnsupportedError

Fill = Callable[[str, Tensor], None]
SMALLEST = 1 / 8  # of the largest layer's bytes; an embedding below it stays


class Place(NamedTuple):
    """How a weight lies in its unit."""

    offset: int
    count: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.offset + self.count * self.dtype.itemsize

    def within(self, raw: Tensor) -> Tensor:
        """The weight within the bytes `raw` of its unit."""
        flat = raw[self.offset : self.stop].view(self.dtype)
        return flat.as_strided(self.shape, self.strides)


class Unit:
    """Weights that come and go together.

    Args:
        parameters: of `module`, none of them empty, used by nothing outside it.
    """

    def __init__(self, name: str, module: nn.Module, parameters: dict[str, nn.Parameter]):
        self.name, self.module, self.parameters = name, module, parameters
        self.places: list[Place] = []
        self.homes: list[Tensor] = []
        self.index, self.nbytes = 0, 0
        self.running = 0
        """Calls of the module's forward under way."""
        for parameter in parameters.values():
            # a fused rule walks all tensors by address, so they keep their strides
            strides = torch.empty_like(parameter, device="meta").stride()
            place = Place(self.nbytes, parameter.numel(), parameter.dtype, parameter.shape, strides)
            self.places.append(place)
            self.nbytes = -(-place.stop // ALIGN) * ALIGN

    def go_home(self, folder: Path | None, fill: Fill | None) -> None:
        """Move the weights into a mapping of memory, or of a file in `folder`.

        Raises:
            InputError: the disk has no room.
        """
        if isinstance(next(iter(self.parameters.values())), FakeTensor):  # nothing to map
            self.bytes = torch.empty(self.nbytes, dtype=torch.uint8)
            self.homes = [
                torch.empty_strided(p.shape, p.strides, dtype=p.dtype) for p in self.places
            ]
        else:
            self._map(folder)
        for (name, parameter), home in zip(self.parameters.items(), self.homes, strict=True):
            if parameter.is_meta:
                _fill(f"{self.name}.{name}", parameter, home, fill)
            else:
                home.copy_(parameter.data)
                parameter.data = home  # what held it until now is free, unless others hold it too

    def _map(self, folder: Path | None) -> None:
        # shared also where it is memory: a forked data loader would break page-locking by copies
        if folder is None:
            memory = mmap.mmap(-1, self.nbytes)
        else:
            memory = _mapped_file(folder, self.nbytes)
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self.homes = [
            torch.frombuffer(memory, dtype=p.dtype, count=p.count, offset=p.offset).as_strided(
                p.shape, p.strides
            )
            for p in self.places
        ]


def _mapped_file(folder: Path, size: int) -> mmap.mmap:
    """A file without a name, gone with its last mapping, also after kill -9."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                # a mapped page that finds the disk full kills the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as e:
        raise InputError(
            f"weights to {str(folder)!r}: {size / GIB:.2f} GiB for one layer: {e.strerror}; name "
            f"a writable directory with room for all weights"
        ) from e


def find_units(model: nn.Module, asked: list[nn.Module] | None, resident: int = 0) -> list[Unit]:
    """The units of `model` in the order of its modules, embeddings first.

    Args:
        asked: the modules that shall be units; None takes layers and embeddings.
        resident: layers at the end that are none.

    Raises:
        NoLayersError: there are none.
        InputError: they share modules.
        UnsupportedError: a weight is no plain tensor.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = layers_of(model) if asked is None else list(dict.fromkeys(asked))
    if strange := [m for m in layers if m not in names or m is model]:
        raise InputError(f"units: {type(strange[0]).__name__} is not a part of the model")
    if not 0 <= resident < max(1, len(layers)):
        raise InputError(f"resident={resident} of {len(layers)} layers: leave one to be streamed")
    layers = layers[: len(layers) - resident]
    uses: dict[int, set[nn.Module]] = defaultdict(set)
    owner = {inner: layer for layer in layers for inner in layer.modules()}
    if len(owner) < sum(len(list(layer.modules())) for layer in layers):
        raise InputError("units share modules; name each module in one unit only")
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                _check(names[module], parameter)
                uses[id(parameter)].add(owner.get(module, module))
    found = [_unit(names[layer], layer, uses) for layer in layers]
    found = [unit for unit in found if unit.parameters]
    if not found:
        raise NoLayersError(
            f"{type(model).__name__} has no ModuleList of layers with weights of their own; name "
            f"what shall visit the device as a whole in units="
        )
    room = max(unit.nbytes for unit in found)
    embeddings = [m for m in names if is_table(m) and m not in owner]
    tables = [_unit(names[m], m, uses) for m in embeddings] if asked is None else []
    found = [u for u in tables if SMALLEST * room <= u.nbytes <= room] + found
    for index, unit in enumerate(found):
        unit.index = index
    return found


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Children of the outermost ModuleLists."""
    found: dict[nn.Module, None] = {}
    for child in module.children():
        listed = isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        found |= dict.fromkeys([child] if listed else layers_of(child))
    return list(found)


def is_table(module: nn.Module) -> bool:
    """A plain embedding: its backward needs the indices, not the weight."""
    return type(module).forward is nn.Embedding.forward


def _unit(name: str, module: nn.Module, uses: dict[int, set[nn.Module]]) -> Unit:
    parameters = {
        inner: parameter
        for inner, parameter in module.named_parameters()
        if uses[id(parameter)] == {module} and parameter.numel()
    }
    return Unit(name, module, parameters)


def _check(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, FakeTensor):
        return  # plain, of a dry run
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        kind = type(parameter if type(parameter) is not nn.Parameter else parameter.data)
        raise UnsupportedError(
            f"{name}: a weight of {kind.__name__} cannot be laid out in a slot; only plain tensors "
            f"can be streamed"
        )
    if parameter.grad is not None:
        raise InputError(f"{name} has a gradient; call model.zero_grad() before streaming")


def bring_others(
    model: nn.Module, units: Collection[Unit], device: torch.device, fill: Fill | None
) -> None:
    """Bring what is in no unit to the device, for good."""
    moving = {id(p) for unit in units for p in unit.parameters.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in moving:
            continue
        if parameter.is_meta:
            _fill(name, parameter, torch.empty_like(parameter, device=device), fill)
        else:
            parameter.data = parameter.data.to(device)
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                raise InputError(
                    f"buffer {name}.{key} is on the meta device; build the model with its buffers "
                    f"on the CPU (accelerate.init_empty_weights(include_buffers=False))"
                )
            module._buffers[key] = None if buffer is None else buffer.to(device)


def _fill(name: str, parameter: nn.Parameter, room: Tensor, fill: Fill | None) -> None:
    if fill is None:
        raise InputError(f"{name} is on the meta device; pass fill= to give it a value")
    with torch.no_grad():
        fill(name, room)
    filled = nn.Parameter(room, parameter.requires_grad)
    torch.utils.swap_tensors(parameter, filled)  # the same object, so that ties stay ties
