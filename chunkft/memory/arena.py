"""The arena: slots on the device, each for the largest unit of streamed weights. There are two.

One slot is read while the other is filled, by a thread of its own. On CUDA the copy runs on a side
stream, with events both ways; host memory is page-locked, a file's pages go through a page-locked
buffer. On a CPU the arena is memory like any other, and what it holds is counted all the same.

Device bytes: 2 * the largest unit.
"""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from chunkft.core.store import page_lock, page_unlock
from chunkft.memory.units import Unit

SLOTS = 2


class Slot:
    """Room for one unit on the device."""

    def __init__(self, size: int, device: torch.device, units: Sequence[Unit]):
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.views = [[place.within(self.bytes) for place in unit.places] for unit in units]
        self.unit: Unit | None = None
        """Whose weights it holds, or will hold once `coming` is done."""
        self.coming: Future[None] | None = None
        self.used = 0
        self.arrived: torch.Event | None = None
        self.read: torch.Event | None = None
        self.lock: Tensor | None = None
        """Page-locked bytes that a file's pages go through."""

    def wait(self) -> None:
        """Until what is coming has arrived, for the kernels of the current stream."""
        if self.coming is not None:
            self.coming.result()
            self.coming = None
        if self.arrived is not None:
            torch.cuda.current_stream(self.bytes.device).wait_event(self.arrived)


class Arena:
    """Two slots on `device`, and what is in them.

    Args:
        units: settled, in the order in which the forward pass visits them.
        on_disk: whether they rest in files.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, on_disk: bool):
        self.units = units
        size = max(unit.nbytes for unit in units)
        self.slots = [Slot(size, device, units) for _ in range(SLOTS)]
        self.peak = 0
        """Most bytes of units held at once."""
        self.copied = 0
        """Bytes brought in so far."""
        self._clerk = ThreadPoolExecutor(1, "chunkft-arena")
        self._clock = 0
        self._lane: torch.cuda.Stream | None = None
        locked: list[Tensor] = []
        self._unlock = weakref.finalize(self, _page_unlock, locked)
        if device.type == "cuda":
            self._lane = torch.cuda.Stream(device)
            # kernels of the slots' memory's last owner may be under way
            self._lane.wait_stream(torch.cuda.current_stream(device))
            if not on_disk:
                locked += [unit.bytes for unit in units if page_lock(unit.bytes)]
            if len(locked) < len(units):
                for slot in self.slots:
                    slot.lock = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return sum(slot.bytes.numel() for slot in self.slots)

    @property
    def held(self) -> list[Unit]:
        """Units that are in a slot, or on the way into one."""
        return [slot.unit for slot in self.slots if slot.unit is not None]

    def bring(self, unit: Unit) -> Slot:
        """The slot that holds `unit`, filled now if it was not brought ahead."""
        slot = self._find(unit)
        if slot is None:
            slot = min(self.slots, key=lambda s: s.used)
            self._empty(slot)
            self._fill(slot, unit)
            self._let(slot, unit)
        slot.wait()
        self._clock += 1
        slot.used = self._clock
        return slot

    def prefetch(self, unit: Unit) -> None:
        """Start bringing `unit` to the slot that was not used last."""
        if self._find(unit) is None:
            slot = min(self.slots, key=lambda s: s.used)
            self._empty(slot)
            slot.coming = self._clerk.submit(self._fill, slot, unit)
            self._let(slot, unit)

    def left(self, slot: Slot) -> None:
        """Kernels that read `slot` have all been launched."""
        if self._lane is not None:
            slot.read = torch.cuda.current_stream(slot.bytes.device).record_event()

    def forget(self) -> None:
        """Empty the slots: the weights may have changed at home."""
        for slot in self.slots:
            self._empty(slot)

    def close(self) -> None:
        self.forget()
        self._clerk.shutdown()
        if self._lane is not None:
            self._lane.synchronize()
        self._unlock()

    def _find(self, unit: Unit) -> Slot | None:
        return next((slot for slot in self.slots if slot.unit is unit), None)

    def _empty(self, slot: Slot) -> None:
        slot.unit = None
        if slot.coming is not None:
            slot.coming.exception()  # done; whether it failed is nobody's matter any more
            slot.coming = None

    def _let(self, slot: Slot, unit: Unit) -> None:
        slot.unit = unit  # last of all: an interrupted copy must not be taken for a whole one
        self.copied += unit.nbytes
        self.peak = max(self.peak, sum(held.nbytes for held in self.held))

    def _fill(self, slot: Slot, unit: Unit) -> None:
        if isinstance(slot.bytes, FakeTensor):
            return  # a dry run: nothing to copy, and its mode is not in this thread
        source, room = unit.bytes, slot.bytes[: unit.nbytes]
        if self._lane is None:
            room.copy_(source)
            return
        if slot.lock is not None:
            if slot.arrived is not None:
                slot.arrived.synchronize()  # the buffer is still being read
            source = slot.lock[: unit.nbytes].copy_(source)
        with torch.cuda.stream(self._lane):
            if slot.read is not None:
                self._lane.wait_event(slot.read)
            room.copy_(source, non_blocking=True)
            slot.arrived = self._lane.record_event()


def _page_unlock(locked: list[Tensor]) -> None:
    for raw in locked:
        page_unlock(raw)
