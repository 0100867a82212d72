"""step -> chunk is a pure function of (seed, step)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft import Schedule
from chunkft.core.schedule import ORDERS
from chunkft.errors import InputError

schedules = st.builds(
    Schedule,
    chunks=st.integers(1, 12),
    interval=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 99),
    start=st.integers(0, 50),
)


@settings(deadline=None, derandomize=True)
@given(schedules, st.integers(0, 4))
def test_a_cycle_visits_every_chunk_for_one_interval(schedule: Schedule, cycle: int) -> None:
    length = schedule.chunks * schedule.interval
    steps = range(schedule.start + cycle * length, schedule.start + (cycle + 1) * length)
    chunks = [schedule.chunk(step) for step in steps]
    visits = [chunks[i : i + schedule.interval] for i in range(0, length, schedule.interval)]
    assert all(len(set(visit)) == 1 for visit in visits)
    assert sorted(visit[0] for visit in visits) == list(range(schedule.chunks))
    assert {schedule.cycle(step) for step in steps} == {cycle}


@settings(deadline=None, derandomize=True)
@given(schedules, st.lists(st.integers(50, 500), min_size=2, max_size=9))
def test_no_step_depends_on_the_ones_before(schedule: Schedule, steps: list[int]) -> None:
    again = Schedule(**schedule.__dict__)
    forward = [schedule.chunk(step) for step in steps]
    assert forward == [again.chunk(step) for step in reversed(steps)][::-1]


@settings(deadline=None, derandomize=True)
@given(schedules, st.integers(50, 500))
def test_chunks_change_after_the_last_step_of_a_visit_only(schedule: Schedule, step: int) -> None:
    last = schedule.last_step_of_visit(step)
    if schedule.chunk(step) != schedule.chunk(step + 1):
        assert last
    if schedule.order != "shuffled" and schedule.chunks > 1:
        assert last == (schedule.chunk(step) != schedule.chunk(step + 1))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("cyclic", [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]),
        ("reversed", [2, 2, 1, 1, 0, 0, 2, 2, 1, 1, 0, 0]),
    ],
)
@pytest.mark.parametrize("start", [0, 7])
def test_fixed_orders(order: str, expected: list[int], start: int) -> None:
    schedule = Schedule(3, 2, order, start=start)
    assert [schedule.chunk(start + step) for step in range(12)] == expected


def test_shuffled_is_the_same_on_every_machine_and_in_every_process() -> None:
    schedule = Schedule(6, 1, "shuffled", seed=3)
    assert [schedule.chunk(step) for step in range(12)] == [1, 2, 5, 0, 3, 4, 5, 2, 0, 1, 3, 4]


def test_shuffled_draws_anew_for_every_cycle_and_seed() -> None:
    orders = {
        tuple(Schedule(8, 1, "shuffled", seed).chunk(8 * cycle + i) for i in range(8))
        for seed in range(5)
        for cycle in range(5)
    }
    assert len(orders) == 25


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"chunks": 0}, "chunks=0 must be at least 1"),
        ({"chunks": 2, "interval": 0}, "interval=0 must be at least 1"),
        ({"chunks": 2, "interval": -3}, "interval=-3 must be at least 1"),
        ({"chunks": 2, "order": "random"}, "order='random' is not one of cyclic, shuffled"),
    ],
)
def test_bad_settings_are_named(wrong: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Schedule(**wrong)
