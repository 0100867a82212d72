"""The optimizer's state as a folder, written and read one chunk at a time.

    header.pt                 steps, schedule, partition, parameter groups
    chunk-00003.pt            the chunk's slices and values, tensors without their elements
    chunk-00003.safetensors   those elements, by "<parameter>[<first row>:<end>].<key>.<n>"

Writing takes the memory of one buffer, as no slab is brought to memory. What is read is mapped from
the files and comes to memory where the optimizer copies it, one chunk after another.
"""

from collections.abc import Callable, Iterator
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
from chunkft.train import shards

FOLDER = "optimizer"
HEADER = "header.pt"


def nbytes(optimizer: ChunkedOptimizer) -> int:
    """Bytes of the tensors that `save` will write."""
    return sum(
        tensor_bytes(entry["values"].values())
        for part in optimizer.in_parts()[1]
        for entries in part.values()
        for entry in entries
    )


def save(optimizer: ChunkedOptimizer, folder: Path) -> None:
    """Write the state of `optimizer` into the new folder `folder`.

    Raises:
        OSError, RuntimeError: the disk is full, say.
    """
    folder.mkdir()
    header, parts = optimizer.in_parts()
    torch.save(header, folder / HEADER)
    for k, part in enumerate(parts):
        tensors: dict[str, Tensor] = {}

        def take(name: str, tensor: Tensor, into: dict[str, Tensor] = tensors) -> Tensor:
            outline = tensor.to("meta")
            into[name] = tensor.permute(_order(outline))
            return outline

        torch.save(_changed(part, take), folder / f"chunk-{k:05}.pt")
        shards.write(folder / f"chunk-{k:05}.safetensors", tensors)


def header(folder: Path) -> dict[str, Any]:
    """What `save` wrote, without the state of the parameters."""
    return torch.load(folder / HEADER, map_location="cpu", weights_only=True)


def load(folder: Path) -> dict[str, Any]:
    """The state_dict that was saved; its tensors lie in the files until they are used."""
    found = header(folder)
    parts = (_read(folder / f"chunk-{k:05}.pt") for k in range(len(found["partition"])))
    return found | {"state": resume.joined(parts)}


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
