"""The plan's choices on made-up dry runs, where every number is known."""

from dataclasses import replace

import pytest

from chunkft.core.store import GIB
from chunkft.errors import InputError
from chunkft.memory.budget import DEVICES, Device, device_of, parse_bytes, smallest_of
from chunkft.memory.dry_run import DryRun
from chunkft.memory.meter import KINDS, Measured, Reading
from chunkft.memory.plan import Choice, DoesNotFitError, Limits, make_plan

CARD = Device(24 * GIB, 1e14, 1e12, 25e9)
COMPUTER = Device(24 * GIB, 1e12, 6e10, 0)
ALL = ("chunks", "checkpointing", "offload")


def trial(choice: Choice) -> DryRun:
    """10 GiB of weights; state 64/K, gradient and master 16/K; activations 4, 2 or 1."""
    activations = 1 if choice.offload else 2 if choice.checkpointing else 4
    held = {"weights": 10, "state": 64 / choice.chunks, "activations": activations}
    moving = dict.fromkeys(("gradient", "master"), 16 / choice.chunks)

    def reading(**more: float) -> Reading:
        return Reading(0.0, {k: round(more.get(k, 0) * GIB) for k in KINDS}, 40 * GIB)

    timeline = [reading(**held), reading(**(held | moving | {"activations": 0}))]
    peak = max(timeline, key=lambda r: r.total)
    highest = {k: max(r.bytes[k] for r in timeline) for k in KINDS}
    measured = Measured(peak, highest, 40 * GIB, timeline)
    away = GIB if choice.offload else 0
    flops = 10**13 * (4 if choice.checkpointing else 3)
    return DryRun([measured], [flops], 40 * GIB, 10**9 // choice.chunks, 10**9, away)


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


@pytest.mark.parametrize(
    ("choice", "device", "coming"),
    [
        (Choice(), CARD, 5),
        (Choice("exact", layout="stream"), CARD, 5),
        (Choice(store="runs/state"), CARD, 5),
        (Choice(store="device"), CARD, 0),
        (Choice(), COMPUTER, 0),
    ],
)
def test_the_next_chunk_is_on_its_way(choice: Choice, device: Device, coming: int) -> None:
    """Beside a card its state comes in the last step of this one's visit: 40/8 GiB here."""
    plan = make_plan(trial, choice, Limits(99 * GIB), device)
    assert plan.bytes["state"] == plan.highest["state"] == (8 + coming) * GIB


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
    assert device_of("4090") is device_of("1xRTX-4090-24GiB") is DEVICES["rtx-4090-24gib"]
    assert smallest_of(30 * GIB) is DEVICES["h100-80gb"]
    with pytest.raises(InputError, match="several devices"):
        device_of("2xH100-80GB")
    with pytest.raises(InputError, match="is not one of"):
        device_of("voodoo2")
