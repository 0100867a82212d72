"""Bytes by kind, seen on the tensors that live while a method trains.

Only backward and update are looked at. What a method names (`Method.held`) is found through its
optimizer's own groups, states and `.grad`; every other tensor that was made in an update and is
still alive is `temporary`: casts, projected gradients, what a fused update in a backward hook
needs. A dispatch mode sees each tensor as it is made and a weak reference sees it go, so LOMO's one
gradient at a time, BAdam's switch of blocks and GaLore's projection count as they are, without a
formula. Activations are left out: they are the same model's for every method. (The library's meter,
chunkft/memory/meter.py, looks where `optimizer.step` begins and ends, which LOMO never calls.)

Not seen: what one operation needs within itself (foreach kernels, a decomposition).
"""

import re
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.methods import Batch, Method, loss_of

GRAIN = 2**19  # bytes made between two looks: the error of a peak
KINDS = ("gradient", "master", "state", "adapter", "temporary")
HELD = KINDS[:-1]


class Meter(TorchDispatchMode):
    """A method that is watched; `largest` is the moment of most working bytes, by kind."""

    def __init__(self, method: Method):
        super().__init__()
        self.method, self.model, self.set_lr = method, method.model, method.set_lr
        self.largest: dict[str, int] = {}
        self.held = 0
        """Most bytes of gradient, master, state and adapter together."""
        self.resting = 0
        self._made: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._since = 0
        self._again = False

    def step(self, batch: Batch) -> float:
        loss = loss_of(self.model, batch)
        with self:
            self.method.backward(loss)
            self.look()
            self.resting = max(self.resting, self.method.resting())
            self.method.update()
            self.look()
            self.resting = max(self.resting, self.method.resting())
        return loss.item()

    def look(self) -> None:
        self._since, seen, now = 0, set[int](), dict[str, int]()
        for kind, tensors in self.method.held().items():
            earlier = set(seen) if kind == "resting" else seen
            now[kind] = _bytes(tensors, seen)
            for key in seen - earlier:
                self._made.pop(key, None)
        now["temporary"] = sum(n for key, (_, n) in self._made.items() if key not in seen)
        self.held = max(self.held, _sum(now, HELD))
        if _rank(now) >= _rank(self.largest):
            self.largest = {kind: now.get(kind, 0) for kind in KINDS}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._again:  # what the last operation made has found its place by now
            self._again = False
            self.look()
        result = func(*args, **(kwargs or {}))
        if _updating():
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    self._note(value)
            if self._since >= GRAIN:
                self._again = True
                self.look()
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._made:
            gone = weakref.ref(storage, lambda _: self._made.pop(key, None))
            self._made[key] = (gone, size)
            self._since += size


def _updating() -> bool:
    """Outside of backward, or in a hook that backward calls with a parameter's gradient."""
    node = torch._C._current_autograd_node()
    return torch._C._current_graph_task_id() == -1 or type(node).__name__ == "AccumulateGrad"


def working(kinds: dict[str, int]) -> int:
    return _sum(kinds, KINDS)


def _rank(kinds: dict[str, int]) -> tuple[int, int]:
    """Of moments with as many bytes the one that knows best what they are."""
    return working(kinds) // GRAIN, _sum(kinds, HELD)


def _sum(kinds: dict[str, int], names: Iterable[str]) -> int:
    return sum(kinds.get(name, 0) for name in names)


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    """Of their storages, each counted once and for the first kind that names it."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
    return total


class PrivateMemory(threading.Thread):
    """`peak` bytes of this process's own (anonymous) memory, looked at 50 times a second."""

    STATUS = Path("/proc/self/status")

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0  # stays so where there is no /proc
        self._done = threading.Event()

    def run(self) -> None:
        while self.STATUS.exists():
            found = re.search(r"RssAnon:\s*(\d+) kB", self.STATUS.read_text())
            self.peak = max(self.peak, 1024 * int(found[1]) if found else 0)
            if self._done.wait(0.02):
                return

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self.join()
