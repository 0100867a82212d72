"""Devices, and amounts of memory as people write them. GB is 10^9 bytes, GiB is 2^30."""

import os
import platform
import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from chunkft.core.store import GIB
from chunkft.errors import InputError

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": GIB, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes of an amount with its unit, such as 24GiB or 80GB.

    Raises:
        InputError: no unit, or one that nobody knows.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]+)\s*", text)
    if found is None or found[2].lower() not in UNITS:
        raise InputError(f"{text!r} is no amount of memory; write a number and GiB or GB: 24GiB")
    return round(float(found[1]) * UNITS[found[2].lower()])


@dataclass(frozen=True)
class Device:
    """What the bounds on a step's time are computed from; figures of the makers' data sheets."""

    memory: int
    """Bytes in all."""
    flops: float
    """Of dense 16-bit products, a second."""
    bandwidth: float
    """Of its memory, bytes a second."""
    bus: float
    """To the host, each way, bytes a second; 0: it is the host."""
    reserved: int = 0
    """Bytes that the driver, CUDA's context and the allocator's gaps take beside tensors."""
    link: float = 0
    """To its neighbours of the same kind, each way, bytes a second."""


DEVICES = {
    # on the H200 the context took 0.75 to 0.85 GiB and gaps 0.2 to 1.6; the others' are estimates
    # links: NVLink, 600, 900 and (H800) 400 GB/s both ways together; a 4090 has the bus only
    "rtx-4090-24gib": Device(24564 * 2**20, 165e12, 1.008e12, 25e9, GIB * 5 // 4, 25e9),
    "a100-80gib": Device(81920 * 2**20, 312e12, 2.039e12, 25e9, GIB * 3 // 2, 300e9),
    "h100-80gb": Device(81559 * 2**20, 989e12, 3.35e12, 50e9, GIB * 3 // 2, 450e9),
    "h800-80gb": Device(81559 * 2**20, 989e12, 3.35e12, 50e9, GIB * 3 // 2, 200e9),
    "h200-141gb": Device(143771 * 2**20, 989e12, 4.8e12, 50e9, GIB * 7 // 4, 450e9),
    # room for the system and its other programs
    "laptop-16gib": Device(16 * GIB, 1e12, 60e9, 0, 4 * GIB),
}
HOST_BANDWIDTH = 60e9  # bytes a second, where states and weights rest


def devices_of(name: str) -> tuple[Device, int]:
    """The device of the table whose name contains `name`, and how many: `2xH800` are two.

    Raises:
        InputError: there is none, or several are asked for whose link is not known.
    """
    many = re.fullmatch(r"(\d+)x(.+)", name.lower())
    count, rest = many.groups() if many else ("1", name.lower())
    found = [key for key in DEVICES if rest in key]
    if len(found) != 1 or count == "0":
        raise InputError(f"device {name!r} is not one of {', '.join(DEVICES)}; 2xNAME are two")
    device = DEVICES[found[0]]
    if count != "1" and not device.link:
        raise InputError(f"{name}: nothing is known of what joins several; plan for one")
    return device, int(count)


def this_computer() -> Device:
    """The accelerator that runs go to, or the CPU and its memory."""
    if not torch.cuda.is_available():
        return replace(DEVICES["laptop-16gib"], memory=installed(), reserved=0)
    memory = torch.cuda.get_device_properties(0).total_memory
    return replace(smallest_of(memory), memory=memory)


def slow_in_bf16() -> bool:
    """Whether this computer multiplies bf16 in software, tens of times slower than fp32: an x86 CPU
    without AVX-512, and no accelerator."""
    old = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return old and x86 and not torch.accelerator.is_available()


def installed() -> int:
    if not hasattr(os, "sysconf"):  # Windows
        return DEVICES["laptop-16gib"].memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def smallest_of(memory: int) -> Device:
    """The least card of the table with `memory` bytes or more, or else the largest."""
    cards = sorted((d for d in DEVICES.values() if d.bus), key=lambda d: d.memory)
    return next((card for card in cards if card.memory >= memory), cards[-1])


def card_peaks(cuda: Any = torch.cuda) -> dict[str, int]:
    """Most bytes that the current CUDA device held since the counters began; {} without one.

    allocated  tensors, each rounded up to 512 bytes
    reserved   what torch's allocator took for them
    process    that, the context and libraries; of whatever else runs on the card too, since the
               driver tells what is free and not who has the rest

    Args:
        cuda: whom to ask: `torch.cuda`, or what answers like it.
    """
    if not cuda.is_available():
        return {}
    free, total = cuda.mem_get_info()
    beside = total - free - cuda.memory_reserved()
    reserved = cuda.max_memory_reserved()
    return {
        "allocated": cuda.max_memory_allocated(),
        "reserved": reserved,
        "process": reserved + beside,
    }
