"""One thread, and slots filled with NaN before a unit comes: who reads the last tenant shows it."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from chunkft.memory.arena import Arena, Slot
from chunkft.memory.units import Unit


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    fill = Arena._fill

    def poisoned(self: Arena, slot: Slot, unit: Unit) -> None:
        if not isinstance(slot.bytes, FakeTensor):  # those of dry runs have no memory
            slot.bytes.fill_(0xFF)
        fill(self, slot, unit)

    with patch.object(Arena, "_fill", poisoned):
        yield
