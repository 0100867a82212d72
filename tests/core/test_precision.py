"""The fp32 master of a 16-bit weight survives its rest to the bit, and foreign writes are seen."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chunkft.core import precision
from chunkft.core.optimizer import ChunkedOptimizer
from tests.conftest import Ops

TIES = (1.00390625, 0.998046875)  # both round to 1.0: one down, one up, both with low half 0x8000
SMALLEST = 2.0**-149  # subnormal of fp32
EDGES = (0.0, -0.0, float("inf"), -float("inf"), SMALLEST, -SMALLEST, 2.0**-126, 2.0**-133)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def from_bits(*patterns: int) -> Tensor:
    """fp32 numbers of these 32-bit patterns."""
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


def round_trip(master: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    weight = master.to(dtype)
    return precision.wake(precision.rest(master.clone(), weight), weight)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", TIES)
def test_ties_in_both_directions(value: float, sign: int) -> None:
    master = torch.full((3,), sign * value)
    assert float(master.to(torch.bfloat16)[0]) == sign
    assert int(bits(master)[0]) & 0xFFFF == 0x8000
    assert torch.equal(bits(round_trip(master)), bits(master))


def test_a_tie_that_went_down_is_kept_by_index_and_no_other() -> None:
    master = torch.tensor([1.0, TIES[0], TIES[1], 1.25])
    kept = precision.rest(master, master.to(torch.bfloat16))
    assert kept[precision.INDEX].tolist() == [1]
    assert kept[precision.LOW].dtype == torch.int16


@pytest.mark.parametrize("value", EDGES)
def test_edges(value: float) -> None:
    master = torch.tensor([value])
    assert torch.equal(bits(round_trip(master)), bits(master))


def test_overflow_to_infinity_keeps_the_finite_master() -> None:
    """0x7f7fffff is finite and rounds up to inf, whose upper half is another one."""
    master = from_bits(0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F7F7FFF)
    assert torch.isinf(master.to(torch.bfloat16)).tolist() == [True, True, True, False]
    assert torch.equal(bits(round_trip(master)), bits(master))


@pytest.mark.parametrize("high", [0x0000, 0x8000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0xFF7F])
def test_every_low_half(high: int) -> None:
    """All 65536 masters above one upper half, even and odd, zero, subnormal and largest."""
    low = torch.arange(2**16)
    master = ((high << 16) | low).to(torch.int32).view(torch.float32)
    assert torch.equal(bits(round_trip(master)), bits(master))


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_upper_half(low: int) -> None:
    """All 65536 upper halves, NaN among them, above the low halves where the rounding turns."""
    high = torch.arange(2**16)
    master = ((high << 16) | low).to(torch.int32).view(torch.float32)
    assert torch.equal(bits(round_trip(master)), bits(master))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_any_bit_pattern(patterns: list[int]) -> None:
    master = from_bits(*patterns)
    assert torch.equal(bits(round_trip(master)), bits(master))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_fp16_keeps_its_master_whole(patterns: list[int]) -> None:
    master = from_bits(*patterns)
    assert torch.equal(bits(round_trip(master, torch.float16)), bits(master))


def test_bytes_at_rest() -> None:
    """2 bytes an element in bf16, with at most a handful of exceptions in a million."""
    torch.manual_seed(0)
    master = torch.randn(1_000_000)
    kept = precision.rest(master, master.to(torch.bfloat16))
    assert kept[precision.LOW].nbytes == 2 * master.numel()
    assert 0 < len(kept[precision.INDEX]) < 50  # expected: 2^-17 of a million, 8


def test_exceptions_of_every_window() -> None:
    """A large master is taken in parts; ties at their ends and on both sides of them are kept."""
    torch.manual_seed(0)
    master = torch.randn(2**18 * 3 + 5)
    ties = [0, 2**18 - 1, 2**18, 2**19 - 1, 2**19, 2**18 * 3 - 1, 2**18 * 3, 2**18 * 3 + 4]
    master[ties] = TIES[0]
    with Ops(nn.ParameterList([nn.Parameter(master)])) as made:
        kept = precision.rest(master, master.to(torch.bfloat16))
    assert set(ties) <= set(kept[precision.INDEX].tolist())
    assert made.largest == kept[precision.LOW].nbytes
    assert torch.equal(bits(precision.wake(kept, master.to(torch.bfloat16))), bits(master))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5, 3), (2, 3, 4, 5)])
def test_shapes_come_back(shape: tuple[int, ...]) -> None:
    master = torch.randn(shape)
    assert torch.equal(round_trip(master), master)


def channels_last(values: Tensor) -> Tensor:
    return values.to(memory_format=torch.channels_last)


def transposed(values: Tensor) -> Tensor:
    return values.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("lay", [channels_last, transposed])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strides_come_back(lay: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Fused rules walk parameter, gradient and state by address: all must lie alike."""
    master = lay(torch.randn(4, 6, 3, 3))
    back = round_trip(master, dtype)
    assert torch.equal(back, master)
    assert back.stride() == master.stride()


# -- foreign writes -----------------------------------------------------------------------------


def one_ulp(weight: Tensor, up: list[int], down: list[int]) -> Tensor:
    changed = weight.clone()
    flat = changed.view(-1).view(torch.int16)
    flat[up] += 1
    flat[down] -= 1
    return changed


def swap(weight: Tensor, a: int, b: int) -> Tensor:
    changed = weight.clone()
    changed.view(-1)[[a, b]] = weight.view(-1)[[b, a]]
    return changed


def negate(weight: Tensor, *places: int) -> Tensor:
    changed = weight.clone()
    changed.view(-1)[list(places)] *= -1
    return changed


FOREIGN: dict[str, Callable[[Tensor], Tensor]] = {
    "one element": lambda w: one_ulp(w, [5], []),
    "another weight": lambda w: w + 1,
    "two that cancel": lambda w: one_ulp(w, [0], [3]),
    "two far apart that cancel": lambda w: one_ulp(w, [300], [600]),
    "swapped neighbours": lambda w: swap(w, 0, 1),
    "swapped by three": lambda w: swap(w, 0, 3),
    "swapped across rows": lambda w: swap(w, 7, 607),
    "rows permuted": lambda w: w.flip(0),
    # the last of four elements: its sign is the top bit of a word
    "a sign": lambda w: negate(w, 3),
    "signs of a row": lambda w: negate(w, 3, 7),
    "signs of a column": lambda w: negate(w, 3, 259),
    "signs in even places": lambda w: negate(w, 263, 775),
    "every sign": lambda w: -w,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", list(FOREIGN))
def test_a_foreign_write_at_rest_wins(how: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    master = torch.randn(30, 30)
    kept = precision.rest(master, weight := master.to(dtype))
    foreign = FOREIGN[how](weight)
    assert torch.equal(precision.wake(kept, foreign), foreign.float())
    assert torch.equal(precision.wake(kept, weight), master)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 3, 256, 259, 1030])
def test_a_slice_anywhere_has_the_fingerprint_of_its_copy(start: int, count: int) -> None:
    torch.manual_seed(0)
    part = torch.randn(2000).bfloat16()[start : start + count]
    assert torch.equal(precision.fingerprint(part), precision.fingerprint(part.clone()))


def trained(weight: Tensor) -> tuple[nn.Module, ChunkedOptimizer]:
    """One layer in 16 bit after one step, so that its master has low bits of its own."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.weight.data = weight.clone()
    optimizer = ChunkedOptimizer(model, torch.optim.SGD, lr=1e-3, chunks=1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: ChunkedOptimizer) -> None:
    weight = model.get_parameter("weight")
    model(torch.ones(1, weight.shape[1], dtype=weight.dtype)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_foreign_element_of_a_small_weight_is_seen(
    dtype: torch.dtype, through_data: bool
) -> None:
    """Norm weights are few and mostly 1.0 in every checkpoint: a sample would miss the change."""
    model, optimizer = trained(torch.ones(6, 6, dtype=dtype))
    weight = model.get_parameter("weight")
    target = weight.data if through_data else weight.detach()
    target[3, 3] = 7.0
    step(model, optimizer)
    assert float(weight[3, 3].detach()) == pytest.approx(7.0 - 1e-3, abs=0.04)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_add_up_until_a_foreign_write(dtype: torch.dtype) -> None:
    """lr * gradient is under half an ulp: only the master can add it up."""
    model, optimizer = trained(torch.ones(2, 2, dtype=dtype))
    for _ in range(9):
        step(model, optimizer)
    weight = model.get_parameter("weight").detach()
    assert torch.equal(weight, torch.full((2, 2), 1 - 10e-3).to(dtype))
