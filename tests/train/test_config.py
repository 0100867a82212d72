"""K, T and learning rate of runs that did not name them."""

import pytest

from chunkft.errors import InputError
from chunkft.train.config import (
    choose_learning_rate,
    choose_moments,
    choose_rotation,
    longest_visit,
    refuse_optimizer,
)

SMALL = 10**8  # elements


@pytest.mark.parametrize("longest", [1, 20])
@pytest.mark.parametrize("elements", [SMALL, 7 * 10**9])
@pytest.mark.parametrize("steps", [1, 2, 3, 17, 31, 32, 100, 1000, 10**6])
def test_two_cycles_fit_wherever_they_can(steps, elements, longest):
    rotation = choose_rotation(None, None, steps, elements, longest)
    assert rotation.interval <= longest
    cycle = rotation.chunks * rotation.interval
    assert cycle <= max(1, steps // 2)


def test_given_values_stand():
    assert choose_rotation(8, 5, 1000, SMALL, 20).chunks == 8
    assert choose_rotation(8, 5, 1000, SMALL, 20).interval == 5
    assert choose_rotation(64, None, 1280, SMALL, 20).interval == 10
    assert choose_rotation(None, 10, 100, SMALL, 20).chunks == 5


@pytest.mark.parametrize(
    ("elements", "chunks"),
    [(135 * 10**6, 8), (2**29, 8), (2**29 + 1, 16), (17 * 10**8, 32), (70 * 10**9, 64)],
)
def test_a_chunk_works_in_one_gib_up_to_64_chunks(elements, chunks):
    assert choose_rotation(None, None, 10**6, elements, 1).chunks == chunks


@pytest.mark.parametrize(
    ("chunks", "interval", "steps", "message"),
    [
        (0, None, 100, "--chunks 0 must be at least 1"),
        (None, 0, 100, "--interval 0 must be at least 1"),
        (64, 20, 100, "92% of the parameters would never move; use at most 5 chunks"),
        (101, None, 100, "never move"),
        (8, 10, 100, "1.2 cycles into 100 steps.*--interval 6 or less"),
    ],
)
def test_values_that_leave_weights_untouched_are_errors(chunks, interval, steps, message):
    with pytest.raises(InputError, match=message):
        choose_rotation(chunks, interval, steps, SMALL, 20)


def test_the_learning_rate_grows_with_the_root_of_chunks():
    assert choose_learning_rate(1, "stream") == pytest.approx(2e-5)
    assert choose_learning_rate(16, "stream") == pytest.approx(8e-5)
    assert choose_learning_rate(16, "spread") == pytest.approx(16e-5)


def test_one_chunk_has_the_dense_rate_and_two_at_most_twice_that():
    assert choose_learning_rate(1, "spread") == pytest.approx(2e-5)
    assert choose_learning_rate(2, "spread") == pytest.approx(4e-5)


def test_visits_are_short_where_state_moves_cheaply():
    assert longest_visit("spread", "host") == longest_visit("spread", "device") == 1
    assert longest_visit("spread", "/mnt/disk") == longest_visit("stream", "host") == 20


def test_moments_decay_where_the_first_moment_is_known():
    assert choose_moments("adamw_torch_fused") == choose_moments("paged_adamw_8bit") == "decay"
    assert choose_moments("sgd") == choose_moments("schedule_free_adamw") == "persist"


@pytest.mark.parametrize("optim", ["galore_adamw", "lomo", "adalomo", "apollo_adamw"])
def test_optimizers_that_need_all_gradients_are_refused_by_name(optim):
    with pytest.raises(InputError, match=optim):
        refuse_optimizer(optim, None)


def test_deepspeed_is_refused():
    with pytest.raises(InputError, match="deepspeed"):
        refuse_optimizer("adamw_torch", "config.json")
    refuse_optimizer("adamw_torch", None)
