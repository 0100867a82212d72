"""Weights that rest away from the device and visit it: what the chunk engine has to know of it.

The leaf of such a weight is a tensor of its own on the device, N/K elements more than a leaf that
shares its weight's storage. After each write it is copied to where the weight rests.
"""

from typing import Protocol, cast

import torch
from torch import Tensor, nn

RESIDENCE = "_chunkft_residence"


class Residence(Protocol):
    """Rides on a model in `__dict__[RESIDENCE]`; `memory/streaming.py` makes one."""

    device: torch.device
    """Where the weights are when they work."""

    def home(self, weight: nn.Parameter) -> Tensor | None:
        """The resting tensor of a weight, or None if the weight stays on the device."""
        ...

    def tensors(self) -> list[Tensor]:
        """What lies on the device in the weights' place."""
        ...

    def settle(self) -> None:
        """Send all weights home, and bring them anew when they are next needed."""
        ...


def residence_of(model: nn.Module) -> Residence | None:
    return cast("Residence | None", model.__dict__.get(RESIDENCE))
