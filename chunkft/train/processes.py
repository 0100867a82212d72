"""The processes of one run: who tells and writes, and when all wait for each other.

Every rank goes through the same code. Rank 0 writes what is the same on all; a question that ranks
could answer differently (is there a checkpoint, was a signal heard) is answered for all of them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from chunkft.core.ranks import world_size

Answer = TypeVar("Answer")


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def wait() -> None:
    """Until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def from_main(ask: Callable[[], Answer]) -> Answer:
    """What `ask()` returns on rank 0, on all ranks; what it raises there is raised on all."""
    if world_size() == 1:
        return ask()
    told: list[Any] = [None, None]
    if is_main():
        try:
            told[0] = ask()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, device=_device())
    if told[1] is not None:
        raise told[1]
    return told[0]


def largest(number: int) -> int:
    """The largest of all ranks' numbers."""
    if world_size() == 1:
        return number
    told = torch.tensor(number, device=_device())
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def collected(values: list[Answer]) -> list[Answer]:
    """The values of all ranks, dealt like cards: first of rank 0, first of rank 1, ..."""
    count = world_size()
    if count == 1:
        return values
    all_values: list[Any] = [None] * count
    dist.all_gather_object(all_values, values)
    longest = max(map(len, all_values))
    return [theirs[i] for i in range(longest) for theirs in all_values if i < len(theirs)]


def _device() -> torch.device:
    cuda = "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
