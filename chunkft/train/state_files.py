"""The optimizer's state as a folder, written and read one chunk at a time.

    header.pt                    steps, schedule, partition, parameter groups
    part-000-00003.pt            slices and their values, tensors without their elements
    part-000-00003.safetensors   those elements, by "<parameter>[<first row>:<end>].<key>.<n>"

The first number is the rank's: of sharded weights each writes what it holds, and any number of
ranks reads all of it.

A part is a chunk that rests, which is written where it lies, or slices of the active one, whose
masters' low bits are made for it: `PART` bytes of them at a time. What is read is mapped from the
files and comes to memory where the optimizer copies it, one chunk after another.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from chunkft.core import resume
from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.store import mapped
from chunkft.core.store import nbytes as tensor_bytes
from chunkft.train import processes, shards

FOLDER = "optimizer"
HEADER = "header.pt"
PART = 64 << 20  # bytes


def nbytes(optimizer: ChunkedOptimizer) -> int:
    """Bytes of the tensors that `save` will write."""
    return sum(map(_size, optimizer.in_parts()[1]))


def _size(part: resume.SavedState) -> int:
    entries = (entry for entries in part.values() for entry in entries)
    return sum(tensor_bytes(entry["values"].values()) for entry in entries)


def save(optimizer: ChunkedOptimizer, folder: Path) -> None:
    """Write the state of `optimizer` into the new folder `folder`.

    Raises:
        OSError, RuntimeError: the disk is full, say.
    """
    folder.mkdir(exist_ok=True)
    header, parts = optimizer.in_parts()
    if processes.is_main():
        torch.save(header, folder / HEADER)
    for number, part in enumerate(_together(parts)):
        _write(part, folder / f"part-{processes.rank():03}-{number:05}.pt")


def _together(parts: Iterable[resume.SavedState]) -> Iterator[resume.SavedState]:
    """Neighbours that make no more than `PART` bytes as one."""
    waiting: list[resume.SavedState] = []
    for part in parts:
        if waiting and _size(part) + sum(map(_size, waiting)) > PART:
            yield resume.joined(waiting)
            waiting = []
        waiting.append(part)
    yield resume.joined(waiting)


def _write(part: resume.SavedState, path: Path) -> None:
    tensors: dict[str, Tensor] = {}

    def take(name: str, tensor: Tensor) -> Tensor:
        outline = tensor.to("meta")
        tensors[name] = tensor.permute(_order(outline))
        return outline

    torch.save(_changed(part, take), path)
    shards.write(path.with_suffix(".safetensors"), tensors)


def header(folder: Path) -> dict[str, Any]:
    """What `save` wrote, without the state of the parameters."""
    return torch.load(folder / HEADER, map_location="cpu", weights_only=True)


def load(folder: Path) -> dict[str, Any]:
    """The state_dict that was saved; its tensors lie in the files until they are used."""
    parts = map(_read, sorted(folder.glob("part-*.pt")))
    return header(folder) | {"state": resume.joined(parts)}


def _read(path: Path) -> resume.SavedState:
    part = torch.load(path, map_location="cpu", weights_only=True)
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:

        def fill(name: str, outline: Tensor) -> Tensor:
            order = _order(outline)
            return file.get_tensor(name).permute([order.index(d) for d in range(len(order))])

        return _changed(part, fill)


def _order(outline: Tensor) -> list[int]:
    """Dimensions as they lie in memory: a fused rule needs channels_last state to come back so."""
    return sorted(range(outline.dim()), key=lambda d: -outline.stride(d))


def _changed(part: resume.SavedState, change: Callable[[str, Tensor], Tensor]) -> resume.SavedState:
    """`part` with `change(name, tensor)` for its tensors, those inside subclasses too."""

    def value(name: str, old: Any, numbers: Iterator[int]) -> Any:
        return mapped(old, lambda tensor: change(f"{name}.{next(numbers)}", tensor))

    def entry(name: str, old: dict[str, Any]) -> dict[str, Any]:
        rows = f"{name}[{old['start']}:{old['stop']}]"
        values = {k: value(f"{rows}.{k}", v, count()) for k, v in old["values"].items()}
        return old | {"values": values}

    return {name: [entry(name, old) for old in entries] for name, entries in part.items()}
