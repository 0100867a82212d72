"""What max_length costs, said before the first step.

A trainer truncates without a word, and a record whose labels were all cut off trains nothing.
Here both are counted, and a data set of which nothing is left to learn is refused.
Cost: one pass over the token ids.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset

from chunkft.errors import InputError

IGNORED_LABEL = -100


class Lengths(NamedTuple):
    """What `max_length` does to a tokenized data set, in records and tokens."""

    records: int
    longest: int
    truncated: int
    """Records longer than max_length."""
    mute: int
    """Records without a label left to learn from."""


class Padding(NamedTuple):
    """What padding costs a data set."""

    records: int
    longest: int
    mean: float
    share: float
    """Of the tokens of padded rows."""
    flops: float
    """Of padded rows, over those of rows without padding."""


def padding(lengths: Sequence[int], batch: int, attention: float, seed: int = 0) -> Padding:
    """What padding costs in shuffled batches of `batch` records.

    Args:
        lengths: tokens of each record.
        attention: FLOPs of one token's attention to another, over those of all its layers' weights
            (layers x width / weights; two products with half of the tokens before it, each way).
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [lengths[i] for i in order]
    rows = [shuffled[i : i + batch] for i in range(0, len(lengths), batch)]

    def cost(tokens: int) -> float:
        return tokens * (1 + attention * tokens)

    padded = sum(len(row) * cost(max(row)) for row in rows)
    return Padding(
        len(lengths),
        max(lengths),
        sum(lengths) / len(lengths),
        padding_share(shuffled, batch),
        padded / sum(map(cost, lengths)),
    )


def padding_share(lengths: Sequence[int], batch: int) -> float:
    """Share of padding tokens when `batch` records after another are padded to their longest."""
    rows = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    return 1 - sum(lengths) / sum(len(row) * max(row) for row in rows)


def check_lengths(
    dataset: Dataset, max_length: int | None, *, truncation: str = "keep_start"
) -> Lengths:
    """Say what truncation costs before it happens; refuse a data set of which nothing is left.

    The label in a record's first place counts as none: no token before it predicts it.

    Args:
        dataset: tokenized, with `input_ids` and, where not everything is learned, `labels`
            (-100 = not learned) or `completion_mask` (1 = learned).
        max_length: tokens a record may have; None keeps all.
        truncation: "keep_start", "keep_end" (TRL's names) or "split" (nothing is lost).

    Raises:
        InputError: every record is longer than max_length, or none has a label left.

    Warns:
        UserWarning: some are truncated, or left without a label.
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length {max_length} is below 2: a token must predict another")
    columns = [c for c in ("labels", "completion_mask") if c in dataset.column_names][:1]
    lengths: list[int] = []
    mute = 0
    records = cast(Iterable[dict[str, Any]], dataset.select_columns(["input_ids", *columns]))
    for record in records:
        tokens, learned = len(record["input_ids"]), _learned(record, columns)
        lengths.append(tokens)
        kept = range(tokens)
        if max_length is not None and truncation != "split":
            kept = kept[-max_length:] if truncation == "keep_end" else kept[:max_length]
        mute += not any(learned[i] for i in kept[1:])
    return _judged(lengths, mute, max_length, truncation)


def _learned(record: dict[str, Any], columns: list[str]) -> list[bool]:
    """Per token, whether it is a target."""
    if not columns:
        return [True] * len(record["input_ids"])
    if columns == ["labels"]:
        return [label != IGNORED_LABEL for label in record["labels"]]
    return [bool(bit) for bit in record["completion_mask"]]


def _judged(lengths: list[int], mute: int, max_length: int | None, truncation: str) -> Lengths:
    records = len(lengths)
    if not records:
        raise InputError("the tokenized data set has 0 records; at least 1 is needed")
    truncated = sum(n > max_length for n in lengths) if max_length is not None else 0
    if truncated == records and truncation != "split":
        raise InputError(
            f"all {records} records are longer than max_length {max_length}: the shortest has "
            f"{min(lengths)} tokens, the longest {max(lengths)}; raise --max_length"
        )
    if mute == records:
        raise InputError(
            f"none of {records} records has a token to learn within max_length {max_length}: "
            f"labels are all masked or cut off (longest record: {max(lengths)} tokens); "
            f"raise --max_length or check the completions"
        )
    if truncated and truncation != "split":
        warnings.warn(
            f"{truncated} of {records} records are longer than max_length {max_length} and are "
            f"truncated (longest: {max(lengths)} tokens)",
            stacklevel=3,
        )
    if mute:
        warnings.warn(f"{mute} of {records} records have no token to learn", stacklevel=3)
    return Lengths(records, max(lengths), truncated, mute)
