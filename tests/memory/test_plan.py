"""The plan's choices on made-up dry runs, where every number is known."""

import pickle
import platform
from dataclasses import replace

import pytest
import torch

from chunkft.core.store import GIB
from chunkft.errors import InputError, NoLayersError
from chunkft.memory.budget import (
    DEVICES,
    Device,
    devices_of,
    parse_bytes,
    slow_in_bf16,
    smallest_of,
)
from chunkft.memory.dry_run import DryRun
from chunkft.memory.meter import KINDS, Measured, Reading
from chunkft.memory.plan import BLOCK, LIBRARY, Choice, DoesNotFitError, Limits, make_plan

CARD = Device(24 * GIB, 1e14, 1e12, 25e9)
COMPUTER = Device(24 * GIB, 1e12, 6e10, 0)
ALL = ("chunks", "checkpointing", "offload")


def trial(choice: Choice) -> DryRun:
    """10 layers of 1 GiB; state 64/K, gradient and master 16/K; activations 4, 2, 1.

    With blocks the same of a block, beside half of the chunk's gradient.
    """
    activations = 1 if choice.offload else 2 if choice.checkpointing else 4
    weights = 2 + choice.resident_layers if choice.stream_weights else 10
    awake = min(1 / choice.chunks, (choice.block or 10**9) / 10**9)
    held = {"weights": weights, "state": 64 * awake, "activations": activations}
    waiting = 8 / choice.chunks if choice.block else 8 * awake
    moving = {"master": 16 * awake, "gradient": waiting + 8 * awake}

    def reading(**more: float) -> Reading:
        return Reading(0.0, {k: round(more.get(k, 0) * GIB) for k in KINDS}, 40 * GIB)

    timeline = [reading(**held), reading(**(held | moving | {"activations": 0}))]
    peak = max(timeline, key=lambda r: r.total)
    highest = {k: max(r.bytes[k] for r in timeline) for k in KINDS}
    measured = Measured(peak, highest, 40 * GIB, timeline)
    away = GIB if choice.offload else 0
    flops = 10**13 * (4 if choice.checkpointing else 3)
    layers = (10 - choice.resident_layers) * choice.stream_weights
    streamed = layers * GIB, 2 * layers * GIB, layers
    sizes = 10**9 // choice.chunks, 10**9, round(awake * 10**9)
    return DryRun([measured], [flops], 40 * GIB, *sizes, away, *streamed)


@pytest.mark.parametrize(
    ("given", "chunks", "checkpointing", "offload"),
    [
        (28, 8, False, False),  # 10 + (64 + 40)/8 + max(4, 2 x 16/8)
        (24, 16, False, False),
        (20, 32, False, False),
        (16.1, 64, False, False),
        (14.9, 64, True, False),  # 128 chunks without, 64 with
        (11.8, 256, True, True),
        (11.2, 1024, True, True),
    ],
)
def test_the_cheapest_that_fits(
    given: float, chunks: int, checkpointing: bool, offload: bool
) -> None:
    plan = make_plan(trial, Choice(), Limits(round(given * GIB)), CARD, ALL)
    choice = plan.choice
    assert (choice.chunks, choice.checkpointing, choice.offload) == (chunks, checkpointing, offload)
    assert plan.total <= given * GIB
    assert plan.settings["chunks"] == chunks


def test_what_is_not_free_stays() -> None:
    start = Choice(chunks=16)
    plan = make_plan(trial, start, Limits(24 * GIB), CARD, ("checkpointing",))
    assert plan.choice == start
    with pytest.raises(DoesNotFitError, match="leaving chunks open"):
        make_plan(trial, start, Limits(15 * GIB), CARD, ("checkpointing",))


def test_below_the_floor_it_says_the_floor_and_the_cure() -> None:
    with pytest.raises(DoesNotFitError, match=r"needs 11\.1\d GiB at least, 9\.00 given") as error:
        make_plan(trial, Choice(), Limits(9 * GIB), CARD, ALL)
    assert 11 * GIB < error.value.needed < 11.2 * GIB
    again = Limits(parse_bytes(str(error.value).split("--memory ")[1].split(",")[0]))
    assert make_plan(trial, Choice(), again, CARD, ALL).total <= again.device


def test_host_and_disk() -> None:
    """On a computer the resting state shares the memory, unless it lies on disk."""
    with pytest.raises(DoesNotFitError, match=r"--store DIR \(40\.00 GiB"):
        make_plan(trial, Choice(), Limits(30 * GIB), COMPUTER, ALL)
    plan = make_plan(trial, replace(Choice(), store="runs/state"), Limits(30 * GIB), COMPUTER, ALL)
    assert plan.disk == 40 * GIB and plan.host == plan.total + GIB and not plan.choice.offload
    with pytest.raises(DoesNotFitError, match=r"41\.00 GiB of host memory, 20\.00 given"):
        make_plan(trial, Choice(), Limits(24 * GIB, host=20 * GIB), CARD, ALL)


OPEN = (*ALL, "stream_weights")


@pytest.mark.parametrize(
    ("given", "chunks", "checkpointing", "offload", "stay"),
    [
        (9.5, 32, False, False, 0),
        (8.9, 64, False, False, 1),
        (6, 64, True, False, 0),
        (3.2, 1024, True, True, 0),
    ],
)
def test_weights_are_streamed_where_nothing_fits_without(
    given: float, chunks: int, checkpointing: bool, offload: bool, stay: int
) -> None:
    tried: list[Choice] = []

    def counted(choice: Choice) -> DryRun:
        tried.append(choice)
        return trial(choice)

    plan = make_plan(counted, Choice(), Limits(round(given * GIB)), CARD, OPEN)
    choice = plan.choice
    assert (choice.chunks, choice.checkpointing, choice.offload) == (chunks, checkpointing, offload)
    assert choice.stream_weights and choice.resident_layers == stay and plan.total <= given * GIB
    homes = 10 - stay
    assert plan.homes == homes * GIB and plan.host == (41 + homes + choice.offload) * GIB
    moved = 2 * 40 * GIB / chunks + 2 * choice.offload * GIB + 2 * homes * GIB
    assert plan.seconds["bus"] == pytest.approx(moved / 25e9, rel=0.01)
    # 10 GiB of weights alone have no room, so one dry run without streaming says it all
    assert [choice.stream_weights for choice in tried[:2]] == [False, True]
    assert not make_plan(trial, Choice(), Limits(12 * GIB), CARD, OPEN).choice.stream_weights


def test_blocks_where_chunks_would_be_too_many() -> None:
    """256 chunks without."""
    plan = make_plan(trial, Choice(interval=5), Limits(round(11.8 * GIB)), CARD, (*ALL, "block"))
    choice = plan.choice
    assert choice == Choice("chunk", 8, 5, checkpointing=True, offload=True, block=BLOCK)
    rest = 40 * BLOCK / 10**9  # of the block that works, and of the next one
    state = max(64 * BLOCK / 10**9, rest) + rest
    assert plan.bytes["state"] == pytest.approx(state * GIB)
    step = 10 + state + 1 + 24 * BLOCK / 10**9
    assert plan.total == pytest.approx(step * GIB + LIBRARY)
    # in every step, not once in five
    assert plan.seconds["bus"] == pytest.approx((2 * 40 / 8 + 2) * GIB / 25e9)
    assert plan.settings["store"].block == BLOCK
    for start in (Choice("exact"), Choice(store="device")):
        with pytest.raises(DoesNotFitError):
            make_plan(trial, start, Limits(round(11.8 * GIB)), CARD, ("block", "checkpointing"))


def test_streaming_is_named_where_it_would_reach_it() -> None:
    with pytest.raises(DoesNotFitError, match=r"or --stream-weights \(3\.\d\d GiB\)"):
        make_plan(trial, Choice(), Limits(9 * GIB), CARD, ALL)
    with pytest.raises(DoesNotFitError, match=r"needs 3\.\d\d GiB at least with --stream-weights"):
        make_plan(trial, Choice(), Limits(2 * GIB), CARD, OPEN)


def test_on_a_computer_weights_are_streamed_from_disk_only() -> None:
    with pytest.raises(DoesNotFitError, match=r"needs 53\.0\d GiB at least, 9\.00") as error:
        make_plan(trial, Choice(), Limits(9 * GIB), COMPUTER, OPEN)
    assert "stream" not in str(error.value)
    plan = make_plan(trial, Choice(store="runs/state"), Limits(9 * GIB), COMPUTER, OPEN)
    assert plan.choice.stream_weights and plan.disk == 50 * GIB
    assert plan.host == plan.total + GIB <= 9 * GIB


def test_streamed_weights_need_room_on_the_host() -> None:
    with pytest.raises(DoesNotFitError, match=r"needs 51\.00 GiB of host memory.*50\.00 GiB"):
        make_plan(trial, Choice(), Limits(9 * GIB, host=45 * GIB), CARD, OPEN)


def test_a_model_without_layers_is_not_streamed() -> None:
    def flat(choice: Choice) -> DryRun:
        if choice.stream_weights:
            raise NoLayersError("no ModuleList of layers")
        return trial(choice)

    with pytest.raises(DoesNotFitError, match=r"needs 11\.1\d GiB"):
        make_plan(flat, Choice(), Limits(9 * GIB), CARD, OPEN)
    with pytest.raises(InputError, match="no ModuleList"):
        make_plan(flat, Choice(stream_weights=True), Limits(9 * GIB), CARD, OPEN)


def test_a_fault_of_streaming_is_not_taken_for_a_model_without_layers() -> None:
    def faulty(choice: Choice) -> DryRun:
        if choice.stream_weights:
            raise InputError("a dry run of SomeConfig: KeyError: 'home'")
        return trial(choice)

    with pytest.raises(InputError, match="KeyError"):
        make_plan(faulty, Choice(), Limits(9 * GIB), CARD, OPEN)


def test_blocks_as_they_are_cut_count() -> None:
    """Of a rule that is not elementwise a block is a whole slice, whatever was asked."""
    choice = Choice(chunks=10, block=10**6)
    asked = make_plan(trial, choice, Limits(99 * GIB), CARD)
    whole = make_plan(lambda c: replace(trial(c), at_once=10**8), choice, Limits(99 * GIB), CARD)
    assert asked.highest["state"] == pytest.approx((0.064 + 0.04) * GIB)
    assert whole.highest["state"] == pytest.approx((4 + 4) * GIB)


@pytest.mark.parametrize(
    ("choice", "device", "coming"),
    [
        (Choice(), CARD, 5),
        (Choice("exact", layout="stream"), CARD, 5),
        (Choice(store="runs/state"), CARD, 5),
        (Choice(store="device"), CARD, 35),
        (Choice(), COMPUTER, 0),
    ],
)
def test_the_next_chunk_is_on_its_way(choice: Choice, device: Device, coming: int) -> None:
    """Beside a card its state comes in the last step of this one's visit: 40/8 GiB here.

    On the card itself all others wait.
    """
    plan = make_plan(trial, choice, Limits(99 * GIB), device)
    assert plan.bytes["state"] == plan.highest["state"] == (8 + coming) * GIB


def test_8_bit_moments_wake_beside_the_slab_that_brought_them() -> None:
    plan = make_plan(trial, Choice(state_bits=8), Limits(99 * GIB), CARD)
    assert plan.bytes["state"] == (8 + 5 + 5) * GIB


def test_low_bits_stay_in_the_slab_that_brought_them() -> None:
    """A slab larger than the rule's state, as it rests, is what the device holds of it."""

    def heavy(choice: Choice) -> DryRun:
        return replace(trial(choice), resting=80 * GIB)

    plan = make_plan(heavy, Choice(), Limits(99 * GIB), CARD)
    assert plan.bytes["state"] == 20 * GIB


def test_seconds_are_bounds_by_flop_bus_and_host() -> None:
    plan = make_plan(trial, Choice(), Limits(28 * GIB), CARD, ALL)
    moved = 2 * 40 * GIB / 8
    assert plan.seconds == pytest.approx({"flop": 0.3, "bus": moved / 25e9, "host": moved / 60e9})
    exact = make_plan(trial, Choice("exact"), Limits(28 * GIB), CARD, ())
    assert exact.seconds["bus"] == pytest.approx(2 * 40 * GIB / 25e9)
    assert exact.settings == {"chunks": 8, "store": "host", "exact": True}


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), ("1.5 gib", 3 * GIB // 2)]
)
def test_amounts(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["12", "GiB", "12 parsecs", "-1GiB", ""])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="no amount of memory"):
        parse_bytes(text)


def test_cards_by_name() -> None:
    card = DEVICES["rtx-4090-24gib"]
    assert devices_of("4090") == devices_of("1xRTX-4090-24GiB") == (card, 1)
    assert devices_of("2xH800-80GB") == (DEVICES["h800-80gb"], 2)
    assert smallest_of(30 * GIB) is DEVICES["h100-80gb"]
    with pytest.raises(InputError, match="what joins several"):
        devices_of("2xlaptop")
    for name in ("voodoo2", "0x4090", "80gb"):
        with pytest.raises(InputError, match="is not one of"):
            devices_of(name)


def sharded(choice: Choice) -> DryRun:
    """`trial` on ranks that may have a share of the weights each, and gather 1 GiB at once."""
    found = trial(choice)
    if not choice.shard:
        return found
    (measured,) = found.measured
    readings = [
        r._replace(bytes=r.bytes | {"weights": r.bytes["weights"] // choice.ranks})
        for r in measured.timeline
    ]
    one = replace(measured, timeline=readings, peak=max(readings, key=lambda r: r.total))
    resting = found.resting / choice.ranks
    return replace(found, measured=[one], resting=resting, group=GIB, gathered=20 * GIB)


@pytest.mark.parametrize(
    ("given", "free", "expected"),
    [
        (30, ("shard", "layout"), Choice(ranks=2)),
        (14, ("shard", "layout"), Choice(ranks=2, shard=True, layout="stream", chunks=64)),
        (14, ("shard",), Choice(ranks=2, shard=True, chunks=64)),
        (20, (), Choice(ranks=2, chunks=32)),
        (20, ("shard", "layout"), Choice(chunks=32)),  # one device
    ],
)
def test_ranks_share_weights_where_they_have_no_room(
    given: float, free: tuple[str, ...], expected: Choice
) -> None:
    card = replace(CARD, link=2 * GIB)
    limits = Limits(given * GIB, host=200 * GIB)
    plan = make_plan(sharded, Choice(ranks=expected.ranks), limits, card, ("chunks", *free))
    assert plan.choice == expected
    assert plan.pools == (plan.choice.shard and 2.5 * GIB)
    assert plan.seconds.get("link", 0.0) == (10.0 if plan.choice.shard else 0.0)
    own = 20 if plan.choice.shard else 40
    assert plan.host == expected.ranks * (GIB + own * GIB)  # of all


def test_ranks_that_lack_room_are_told_of_shares() -> None:
    limits = Limits(9 * GIB)
    with pytest.raises(DoesNotFitError, match="or --shard fsdp, or a smaller model"):
        make_plan(sharded, Choice(ranks=2), limits, CARD, ("chunks",))
    with pytest.raises(DoesNotFitError, match="GiB at least with --shard fsdp"):
        make_plan(sharded, Choice(ranks=2), Limits(6 * GIB), CARD, ("chunks", "shard"))
    error = DoesNotFitError("needs 2 GiB", 2)
    again = pickle.loads(pickle.dumps(error))  # from one rank to the others
    assert (str(again), again.needed) == (str(error), error.needed)


@pytest.mark.parametrize(
    ("kind", "machine", "slow"),
    [("AVX2", "x86_64", True), ("AVX512", "x86_64", False), ("DEFAULT", "arm64", False)],
)
def test_cpus_that_multiply_bf16_in_software(
    kind: str, machine: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kind)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert slow_in_bf16() is slow
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not slow_in_bf16()
