"""The plan: settings under which a run fits into a memory, and what it will take, by kind.

Every rung of `LADDER` is tried, cheapest steps first, by a dry run of real steps (dry_run.py). Of
one dry run follow all K: gradient, master, state and workspace go with the largest chunk, the rest
stays. The settings chosen are run dry themselves before anything is promised.

    device   weights + activations + logits + gradient + master + state + workspace, at the peak
    host     resting state where it is not on the device, the process itself, offloaded inputs
    disk     resting state of a store on disk
    seconds  at least the largest of: FLOPs / device's FLOPs a second, bytes over the bus / bus,
             bytes moved in host memory / its bandwidth
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from chunkft.core.store import GIB, Store
from chunkft.errors import ChunkFTError
from chunkft.memory.budget import HOST_BANDWIDTH, Device
from chunkft.memory.dry_run import DryRun
from chunkft.memory.eight_bit import EightBitMoments
from chunkft.memory.meter import KINDS

MOVING = ("gradient", "master", "state", "workspace")  # kinds that go with the chunk
PROCESS = GIB  # interpreter and libraries
LIBRARY = 32 * 2**20  # cuBLAS's workspace, which the allocator counts
PREFERRED, MOST = 64, 1024  # chunks: what still learns well (LOG.md), and what is tried at all


class DoesNotFitError(ChunkFTError, ValueError):
    """No settings fit into the memory given.

    Args:
        needed: bytes of what takes least.
    """

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class Choice:
    """Settings of a run that decide its memory."""

    method: str = "chunk"
    chunks: int = 8
    interval: int = 1
    layout: str = "spread"
    store: str = "host"
    checkpointing: bool = False
    offload: bool = False
    """Inputs of checkpointed layers wait on the host."""
    state_bits: int = 32
    """Of resting moments: 32 or 8."""


Trial = Callable[[Choice], DryRun]


@dataclass(frozen=True)
class Plan:
    """What a run with `choice` takes."""

    choice: Choice
    bytes: dict[str, int]
    """On the device at its peak, by kind."""
    highest: dict[str, int]
    """The most of each kind, at whatever moment."""
    resting: int
    host: int
    disk: int
    seconds: dict[str, float]
    """Lower bounds of one optimizer step: flop, bus, host."""
    memory: int
    """What was given, in bytes."""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of ChunkedOptimizer."""
        choice = self.choice
        if choice.method == "full":
            return {"chunks": 1, "interval": 1}
        eight = choice.state_bits == 8
        store = Store(choice.store, EightBitMoments()) if eight else choice.store
        if choice.method == "exact":
            return {"chunks": choice.chunks, "store": store, "exact": True}
        return {
            "chunks": choice.chunks,
            "interval": choice.interval,
            "layout": choice.layout,
            "store": store,
        }


class Limits(NamedTuple):
    """Bytes that there are."""

    device: int
    host: int | None = None
    disk: int | None = None


def ladder(start: Choice, on_host: bool, free: Sequence[str]) -> Iterator[Choice]:
    """`start` and what takes less memory, cheapest steps first; only what is `free` changes."""
    yield start
    if "checkpointing" in free:
        start = replace(start, checkpointing=True)
        yield start
    if "offload" in free and start.checkpointing and not on_host:
        yield replace(start, offload=True)


def make_plan(
    trial: Trial, start: Choice, limits: Limits, device: Device, free: Sequence[str] = ()
) -> Plan:
    """The first rung that fits with at most PREFERRED chunks, else the one with the fewest.

    Args:
        trial: a dry run of a choice.
        start: the settings that are cheapest to run.
        free: names of settings that may change: chunks, checkpointing, offload.

    Raises:
        DoesNotFitError: nothing fits; it says the floor and what would reach it.
    """
    found: list[Plan] = []
    refused: list[Plan] = []
    for rung in ladder(start, device.bus == 0, free):
        tried = trial(rung)
        for choice in _by_chunks(rung, free):
            plan = _predict(choice, tried, rung, limits, device)
            if choice != rung and _fits(plan, limits, device):
                plan = _predict(choice, trial(choice), choice, limits, device)
            if _fits(plan, limits, device):
                found.append(plan)
                break
            refused.append(plan)
        if found and found[-1].choice.chunks <= max(PREFERRED, start.chunks):
            return found[-1]
    if found:
        return min(found, key=lambda plan: plan.choice.chunks)
    by_host = [plan for plan in refused if plan.total <= limits.device]
    if device.bus == 0 or by_host:
        floor = min(by_host or refused, key=lambda plan: plan.host)
    else:
        floor = min(refused, key=lambda plan: plan.total)
    needed = floor.host if device.bus == 0 else floor.total
    raise DoesNotFitError(_cure(floor, needed, limits, device, free), needed)


def _by_chunks(rung: Choice, free: Sequence[str]) -> Iterator[Choice]:
    yield rung
    if "chunks" not in free or rung.method == "full":
        return
    k = rung.chunks * 2
    while k <= MOST:
        yield replace(rung, chunks=k)
        k *= 2


def _predict(choice: Choice, tried: DryRun, at: Choice, limits: Limits, device: Device) -> Plan:
    """What `choice` takes, from a dry run of the same rung with `at.chunks` chunks."""
    share = at.chunks / choice.chunks
    on_host = device.bus == 0
    moves = not on_host and choice.store != "device" and choice.chunks > 1
    # one chunk's state as it rests: on a card it comes as a whole, its low bits stay along with it,
    # and the next chunk's comes while this one works (core/store.py). 8-bit moments wake beside it.
    slab = round(tried.resting * tried.largest * share / tried.elements) if moves else 0

    def scaled(held: dict[str, int]) -> dict[str, int]:
        found = {k: round(held[k] * share) if k in MOVING else held[k] for k in KINDS}
        if found["state"]:
            eight = choice.state_bits == 8
            found["state"] = max(found["state"] + slab * eight, slab) + slab
        return found

    readings = [r for m in tried.measured for r in (*m.timeline, m.peak)]
    peak = max((scaled(r.bytes) for r in readings), key=lambda held: sum(held.values()))
    highest = scaled(tried.highest)
    if not on_host:
        peak["workspace"] += LIBRARY
    resting = round(tried.resting)
    rests = {"host": resting if choice.store == "host" else 0}
    rests["disk"] = resting if choice.store not in ("host", "device") else 0
    largest = tried.largest * share
    moved = 2 * resting * largest / tried.elements / choice.interval if choice.chunks > 1 else 0
    if choice.method == "exact":
        moved = 2 * resting
    moved += 2 * tried.offloaded
    seconds = {"flop": sum(tried.flops) / len(tried.flops) / device.flops}
    seconds["bus"] = 0.0 if on_host else moved / device.bus
    seconds["host"] = moved / (device.bandwidth if on_host else HOST_BANDWIDTH)
    host = PROCESS + rests["host"] + tried.offloaded + (sum(peak.values()) if on_host else 0)
    return Plan(choice, peak, highest, resting, host, rests["disk"], seconds, limits.device)


def _fits(plan: Plan, limits: Limits, device: Device) -> bool:
    if device.bus == 0:  # the state rests in the same memory
        return plan.host <= limits.device and plan.disk <= (limits.disk or plan.disk)
    return (
        plan.total <= limits.device
        and plan.host <= (limits.host or plan.host)
        and plan.disk <= (limits.disk or plan.disk)
    )


def _cure(floor: Plan, needed: int, limits: Limits, device: Device, free: Sequence[str]) -> str:
    largest = max(floor.bytes, key=lambda kind: floor.bytes[kind])
    cures = ["a shorter --seq or smaller --batch"]
    if largest == "weights":
        cures = ["a smaller model", *cures]
    if device.bus == 0 and floor.choice.store == "host":
        cures.insert(0, f"--store DIR ({floor.resting / GIB:.2f} GiB of state on disk)")
    for name in ("chunks", "checkpointing", "offload"):
        if name not in free and not (name == "offload" and device.bus == 0):
            cures.append(f"leaving {name} open")
    if device.bus and floor.total <= limits.device and limits.host:
        return (
            f"needs {floor.host / GIB:.2f} GiB of host memory, {limits.host / GIB:.2f} given: "
            f"--store DIR puts {floor.resting / GIB:.2f} GiB of state on disk"
        )
    return (
        f"needs {needed / GIB:.2f} GiB at least, {limits.device / GIB:.2f} given (most of it "
        f"{largest}: {floor.bytes[largest] / GIB:.2f} GiB); would fit: --memory "
        f"{needed / GIB * 1.01:.2f}GiB, or {', or '.join(cures)}"
    )
