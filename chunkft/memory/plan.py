"""The plan: settings under which a run fits into a memory, and what it will take, by kind.

Every rung of `ladder` is tried, cheapest steps first, by a dry run of real steps (dry_run.py). Of
one dry run follow all K: gradient, master, state and workspace go with the largest chunk, the rest
stays. The settings chosen are run dry themselves before anything is promised.

    device   weights + activations + logits + gradient + master + state + workspace, at the peak
    host     resting state and streamed weights where they rest there, the process itself,
             offloaded inputs; of all ranks
    disk     the same two where the store is a directory
    seconds  at least the largest of: FLOPs / device's FLOPs a second, bytes over the bus / bus,
             bytes moved in host memory / its bandwidth, weights read for each token that is
             written / the device's bandwidth, bytes sent to other ranks / the link

Of several ranks the plan is the first one's, who has the most: all do the same work.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from chunkft.core.store import GIB, Store
from chunkft.errors import ChunkFTError, NoLayersError, UnsupportedError
from chunkft.memory.budget import HOST_BANDWIDTH, Device
from chunkft.memory.dry_run import DryRun
from chunkft.memory.eight_bit import EightBitMoments
from chunkft.memory.meter import KINDS

MOVING = ("gradient", "master", "state", "workspace")  # kinds that go with the chunk
PROCESS = GIB  # interpreter and libraries
LIBRARY = 32 * 2**20  # cuBLAS's workspace, which the allocator counts
PREFERRED, MOST = 64, 1024  # chunks: what still learns well (LOG.md), and what is tried at all
BLOCK = 4 * 2**20  # elements; 64 MiB of fp32 gradient, master and moments
BLOCKS = 256  # of a chunk in a dry run
# Of the largest group of weights that FSDP gathers, one: as a whole in the stream of gathers, as
# gradients in that of means, and its share of those. At the peak of the tensors they are empty, but
# no other stream's. Reserved minus allocated was 2.45 of 8B's and 2.5 to 2.8 of 70B's largest
# (benchmarks/results/gpu_h100_202611.md).
POOLS = 2.5
FEWEST_STREAMED = 3  # units: two slots are there anyway


class DoesNotFitError(ChunkFTError, ValueError):
    """No settings fit into the memory given.

    Args:
        needed: bytes of what takes least.
    """

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed

    def __reduce__(self) -> Any:  # one rank tells the others
        return type(self), (str(self), self.needed)


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
    stream_weights: bool = False
    """Weights rest where the state does and visit the device layer by layer."""
    state_bits: int = 32
    """Of resting moments: 32 or 8."""
    block: int | None = None
    """Elements of the active chunk's state that are on the device at once, in the step only."""
    resident_layers: int = 0
    """Layers that stay on the device beside streamed weights, the last ones."""
    ranks: int = 1
    """Devices of one computer that train together, a process each."""
    shard: bool = False
    """Each rank has a share of the rows of every weight (FSDP2), and not all of them."""

    @property
    def rests_on_disk(self) -> bool:
        return self.store not in ("host", "device")


Trial = Callable[[Choice], DryRun]


@dataclass(frozen=True)
class Plan:
    """What a run with `choice` takes."""

    choice: Choice
    bytes: dict[str, int]
    """On the device at its peak, by kind; on each, where there are several."""
    highest: dict[str, int]
    """The most of each kind, at whatever moment."""
    resting: int
    """Of each rank's state, as are homes of its weights."""
    host: int
    """Of all ranks together, as is disk: they share a computer."""
    disk: int
    seconds: dict[str, float]
    """Lower bounds of one optimizer step: flop, bus, host; memory, where tokens are written; link,
    between devices."""
    memory: int
    """What was given, in bytes."""
    homes: int = 0
    """Bytes of streamed weights where they rest."""
    units: int = 0
    """Layers, and embedding, that they are."""
    gathered: int = 0
    """Bytes of weights that a rank sends to the others in a step."""
    averaged: int = 0
    """Bytes that a rank sends for the means of gradients in a step, at most."""
    pools: int = 0
    """Bytes beside tensors, which the allocator keeps for FSDP's streams."""

    @property
    def total(self) -> int:
        """Bytes of tensors on the device at its peak."""
        return sum(self.bytes.values())

    @property
    def needed(self) -> int:
        """Bytes that the device must have beside what is reserved of it."""
        return self.total + self.pools

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of a ChunkedOptimizer, with a Store of its own at each call."""
        choice = self.choice
        if choice.method == "full":
            return {"chunks": 1, "interval": 1}
        codec = EightBitMoments() if choice.state_bits == 8 else None
        store: str | Store = choice.store
        if codec or choice.block:
            store = Store(choice.store, codec, choice.block)
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
    rung = start
    if "checkpointing" in free and not start.checkpointing:
        rung = replace(start, checkpointing=True)
        yield rung
    if "offload" in free and rung.checkpointing and not (rung.offload or on_host):
        rung = replace(rung, offload=True)
        yield rung
    # on the host itself only a disk takes state and weights away
    apart = start.rests_on_disk or (start.store == "host" and not on_host)
    if "block" in free and apart and rung.method == "chunk" and rung.block is None:
        yield replace(rung, block=BLOCK)
    if _may_share(start, free) and not start.stream_weights:
        # a chunk in few tensors: FSDP averages whole ones
        layout = "stream" if "layout" in free and start.method == "chunk" else start.layout
        yield from ladder(replace(start, shard=True, layout=layout), on_host, free)
    if "stream_weights" in free and apart and not (start.stream_weights or start.shard):
        yield from ladder(replace(start, stream_weights=True), on_host, free)


def make_plan(
    trial: Trial, start: Choice, limits: Limits, device: Device, free: Sequence[str] = ()
) -> Plan:
    """The first rung that fits with at most PREFERRED chunks, else the one with the fewest.

    Weights are streamed where nothing fits otherwise: their way over the bus takes longer than the
    step of a small batch.

    Args:
        trial: a dry run of a choice.
        start: the settings that are cheapest to run.
        free: names of settings that may change: chunks, checkpointing, offload, block,
            stream_weights.

    Raises:
        DoesNotFitError: nothing fits; it says the floor and what would reach it.
    """
    refused: list[Plan] = []
    rungs = list(ladder(start, device.bus == 0, free))
    for where, same in groupby(rungs, key=_where):
        shard, streamed = where
        otherwise = _where(rungs[-1]) != where
        try:
            found = _search(trial, same, limits, device, free, refused, otherwise)
        except (NoLayersError, UnsupportedError):
            if where == _where(start):
                raise
            # no layers that could be streamed, or nothing to share, which nobody asked for
            lost = "stream_weights" if streamed else "shard"
            rest = [name for name in free if name != lost]
            return make_plan(trial, start, limits, device, rest)
        if found:
            best = min(found, key=lambda plan: plan.choice.chunks)
            chosen = streamed and not start.stream_weights
            return _keep_layers(trial, best, limits, device) if chosen else best
        # of shares of the weights each rank has a share of the state too
        if _lack_host(refused, limits, device) and (shard or not _may_share(start, free)):
            break
    if by_host := _lack_host(refused, limits, device):
        floor = min(by_host, key=lambda plan: plan.host)
    else:
        floor = min(refused, key=lambda plan: _needed(plan, device))
    needed = _needed(floor, device)
    cure = _cure(floor, needed, limits, device, free)
    if not by_host:
        cure += _by_streaming(trial, start, needed, limits, device, free)
    raise DoesNotFitError(cure, needed)


def _may_share(start: Choice, free: Sequence[str]) -> bool:
    return "shard" in free and start.ranks > 1 and not start.shard


def _where(choice: Choice) -> tuple[bool, bool]:
    """What decides where the weights are."""
    return choice.shard, choice.stream_weights


def _search(
    trial: Trial,
    rungs: Iterable[Choice],
    limits: Limits,
    device: Device,
    free: Sequence[str],
    refused: list[Plan],
    otherwise: bool,
) -> list[Plan]:
    """What fits of `rungs`, up to the first with few enough chunks; `refused` gets the others.

    Args:
        otherwise: weights can be streamed where they have no room.
    """
    found: list[Plan] = []
    elements = 0
    for rung in rungs:
        tried_at = _with_few_blocks(rung, free, elements)
        tried = trial(tried_at)
        elements = tried.elements
        for choice in _by_chunks(rung, free):
            plan = _predict(choice, tried, tried_at, limits, device)
            if choice != tried_at and _fits(plan, limits, device):
                plan = _predict(choice, trial(choice), choice, limits, device)
            if _fits(plan, limits, device):
                found.append(plan)
                break
            refused.append(plan)
        if found and found[-1].choice.chunks <= max(PREFERRED, rung.chunks):
            break
        too_large = not found and refused[-1].bytes["weights"] > limits.device
        if too_large and otherwise:
            break  # the weights alone have no room, whatever else is done
    return found


def _with_few_blocks(rung: Choice, free: Sequence[str], elements: int) -> Choice:
    """`rung` with smaller chunks where one has very many blocks: a dry run takes them all, and they
    are alike."""
    while rung.block and "chunks" in free and elements > rung.chunks * rung.block * BLOCKS:
        rung = replace(rung, chunks=2 * rung.chunks)
    return rung


def _keep_layers(trial: Trial, plan: Plan, limits: Limits, device: Device) -> Plan:
    """`plan` with as many layers on the device for good as have room beside all else."""
    left = limits.device - _needed(plan, device)
    layer = -(-plan.homes // plan.units)
    most = min(left // layer, plan.units - FEWEST_STREAMED)
    for count in range(most, max(most - 2, 0), -1):
        choice = replace(plan.choice, resident_layers=plan.choice.resident_layers + count)
        kept = _predict(choice, trial(choice), choice, limits, device)
        if _fits(kept, limits, device):
            return kept
    return plan


def _lack_host(refused: Sequence[Plan], limits: Limits, device: Device) -> list[Plan]:
    """What a card has room for, but not the host beside it."""
    return [plan for plan in refused if device.bus and plan.needed <= limits.device]


def _needed(plan: Plan, device: Device) -> int:
    """Bytes of the memory that is bounded, of each rank's."""
    return plan.host // plan.choice.ranks if device.bus == 0 else plan.needed


def _by_streaming(
    trial: Trial, start: Choice, needed: int, limits: Limits, device: Device, free: Sequence[str]
) -> str:
    """What streamed weights would take, where they were not to be chosen and take less."""
    on_host = device.bus == 0
    if start.stream_weights or "stream_weights" in free or (on_host and not start.rests_on_disk):
        return ""
    if start.shard:
        return ""
    *_, rung = ladder(replace(start, stream_weights=True), on_host, free)
    *_, choice = _by_chunks(rung, free)
    try:
        plan = _predict(choice, trial(rung), rung, limits, device)
    except (NoLayersError, UnsupportedError):
        return ""
    if _needed(plan, device) >= needed:
        return ""
    return f", or --stream-weights ({_needed(plan, device) / GIB:.2f} GiB)"


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
    largest = tried.largest * share
    at_once = min(largest, tried.at_once if choice.block else largest)
    on_host, ranks = device.bus == 0, choice.ranks
    rests = choice.chunks > 1 or choice.block is not None
    moves = not on_host and choice.store != "device" and rests
    # one chunk's state as it rests: on a card it comes as a whole, its low bits stay along with it,
    # and the next chunk's comes while this one works (core/store.py). 8-bit moments wake beside it.
    # With blocks all this is of a block, whatever the chunk has: it keeps its 16-bit gradient, and
    # of streamed weights a leaf, told as master.
    slab = round(tried.resting * at_once / tried.elements) if moves else 0
    of_chunk = ("gradient", "master") if choice.stream_weights else ("gradient",)
    moving = of_chunk if choice.block else MOVING

    def scaled(held: dict[str, int]) -> dict[str, int]:
        found = {k: round(held[k] * share) if k in moving else held[k] for k in KINDS}
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
    host, disk = PROCESS + tried.offloaded, 0
    if choice.rests_on_disk:
        disk = resting + tried.homes
    else:
        host += tried.homes + (resting if choice.store == "host" or on_host else 0)
    if choice.store == "device" and not on_host:
        others = round(resting * (1 - largest / tried.elements))
        peak["state"], highest["state"] = peak["state"] + others, highest["state"] + others
    visit = 1 if choice.block else choice.interval  # steps between two ways over the bus
    moved = 2 * resting * largest / tried.elements / visit if rests else 0
    if choice.method == "exact":
        moved = 2 * resting
    moved = 0 if choice.store == "device" else moved
    moved += 2 * tried.offloaded + tried.copied
    seconds = {"flop": sum(tried.flops) / len(tried.flops) / device.flops}
    if tried.read:
        seconds["memory"] = tried.read / device.bandwidth
    seconds["bus"] = 0.0 if on_host else moved / device.bus
    seconds["host"] = ranks * moved / (device.bandwidth if on_host else HOST_BANDWIDTH)
    if ranks > 1 and device.link:
        seconds["link"] = (tried.gathered + tried.averaged) / device.link
    host += sum(peak.values()) if on_host else 0
    places = peak, highest, resting, ranks * host, ranks * disk, seconds, limits.device
    sent = tried.gathered, tried.averaged
    pools = 0 if on_host else round(POOLS * tried.group)
    return Plan(choice, *places, tried.homes, tried.units, *sent, pools)


def _fits(plan: Plan, limits: Limits, device: Device) -> bool:
    if device.bus == 0:  # the state rests in the same memory
        return _needed(plan, device) <= limits.device and plan.disk <= (limits.disk or plan.disk)
    return (
        plan.needed <= limits.device
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
    if floor.choice.ranks > 1 and not floor.choice.shard:
        cures.insert(0, "--shard fsdp")
    for name in ("chunks", "checkpointing", "offload", "block"):
        if name not in free and (device.bus or name not in ("offload", "block")):
            cures.append(f"leaving {name} open")
    if device.bus and floor.needed <= limits.device and limits.host:
        return (
            f"needs {floor.host / GIB:.2f} GiB of host memory, {limits.host / GIB:.2f} given: "
            f"--store DIR puts {floor.choice.ranks * (floor.resting + floor.homes) / GIB:.2f} GiB "
            f"of state on disk"
        )
    where = " with --stream-weights" if floor.choice.stream_weights else ""
    where = " with --shard fsdp" if floor.choice.shard else where
    return (
        f"needs {needed / GIB:.2f} GiB at least{where}, {limits.device / GIB:.2f} given (most of "
        f"it {largest}: {floor.bytes[largest] / GIB:.2f} GiB); would fit: --memory "
        f"{needed / GIB * 1.01:.2f}GiB, or {', or '.join(cures)}"
    )
