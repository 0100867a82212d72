"""What truncation costs is counted, and a data set it empties is refused."""

import warnings

import pytest
from datasets import Dataset

from chunkft.data.lengths import Lengths, check_lengths, padding, padding_share
from chunkft.errors import InputError


def tokenized(*lengths: int, prompt: int | None = None) -> Dataset:
    """Records of these lengths; with `prompt`, that many first tokens are not learned."""
    columns = {"input_ids": [list(range(n)) for n in lengths]}
    if prompt is not None:
        columns["labels"] = [[-100] * min(prompt, n) + [1] * (n - prompt) for n in lengths]
    return Dataset.from_dict(columns)


def test_everything_fits() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_lengths(tokenized(3, 8), 8) == Lengths(2, 8, 0, 0)
        assert check_lengths(tokenized(3, 8), None) == Lengths(2, 8, 0, 0)


def test_some_truncated_is_a_warning_with_the_count() -> None:
    with pytest.warns(UserWarning, match="2 of 3 records are longer than max_length 8.*30 tokens"):
        assert check_lengths(tokenized(9, 8, 30), 8).truncated == 2


def test_all_truncated_is_an_error_with_the_shortest() -> None:
    with pytest.raises(InputError, match=r"all 2 records.*max_length 8: the shortest has 9 tokens"):
        check_lengths(tokenized(9, 30), 8)


def test_splitting_loses_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_lengths(tokenized(9, 30, prompt=8), 8, truncation="split").truncated == 2


def test_labels_that_are_cut_off() -> None:
    with pytest.warns(UserWarning, match="1 of 2 records have no token to learn"):
        assert check_lengths(tokenized(7, 12, prompt=8), 10).mute == 1
    with pytest.raises(InputError, match="none of 2 records has a token to learn"):
        check_lengths(tokenized(7, 12, prompt=12), 10)


def test_keep_end_keeps_the_labels_that_keep_start_cuts() -> None:
    records = tokenized(4, 12, prompt=3)
    records = records.map(lambda r: {"labels": [-100] * (len(r["labels"]) - 1) + [1]})
    with pytest.warns(UserWarning, match="truncated"):
        assert check_lengths(records, 10, truncation="keep_end").mute == 0
    with pytest.warns(UserWarning, match="no token to learn"):
        assert check_lengths(records, 10, truncation="keep_start").mute == 1


def test_completion_masks_count_too() -> None:
    records = Dataset.from_dict({"input_ids": [[1, 2, 3]], "completion_mask": [[1, 0, 0]]})
    with pytest.raises(InputError, match="none of 1"):
        check_lengths(records, None)


def test_the_first_token_is_no_target() -> None:
    with pytest.raises(InputError, match="none of 1"):
        check_lengths(tokenized(1), 8)


@pytest.mark.parametrize(("records", "bound"), [(tokenized(3), 1), (tokenized(), 8)])
def test_nothing_to_check(records: Dataset, bound: int) -> None:
    with pytest.raises(InputError, match=r"max_length 1|0 records"):
        check_lengths(records, bound)


def test_padding_is_counted_as_it_would_be_made():
    assert padding_share([4, 2, 1, 1], 2) == 1 - 8 / 10
    assert padding_share([4, 2, 1], 2) == 1 - 7 / 9  # the last batch is smaller
    found = padding([3] * 8, 4, attention=0.01)
    assert (found.share, found.flops, found.mean, found.longest) == (0.0, 1.0, 3.0, 3)
    # one batch: 2 x 6 (1 + 6a) over 6 (1 + 6a) + 2 (1 + 2a)
    found = padding([6, 2], 2, attention=0.5)
    assert found.share == 1 - 8 / 12 and found.flops == 48 / 28
    assert padding(list(range(1, 100)), 8, 0.0) == padding(list(range(1, 100)), 8, 0.0)
