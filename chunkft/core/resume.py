"""Training state by parameter name and rows: save it, load it, cut it anew for another K.

A saved state is plain containers and tensors, so `torch.load(weights_only=True)` takes it:

    state[name] = [{start, stop, steps, updates, last, values: {key: tensor | number}}, ...]

It is made and taken back one resting part at a time, a chunk or a block of it, so that tensors
which lie in files stay there: beside the store itself, loading needs the memory of one part.

With another K, or other blocks, the pieces are cut and joined along axis 0. That is exact for
elementwise rules only, whose tensors have the slice's shape; anything else raises, naming the key.
Rows that come together with different step counts stay several slices of one chunk, each with a
count of its own.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from chunkft.core import precision
from chunkft.core.coverage import Book, Record
from chunkft.core.partition import Block, Partition, Shapes, Slice
from chunkft.core.schedule import Schedule
from chunkft.core.store import State, mapped
from chunkft.errors import ChunkFTError, InputError, StateError

FORMAT = 2
SavedState = dict[str, list[dict[str, Any]]]
States = Iterator[tuple[str, State]]  # by key in the store
RowsOf = Callable[[Slice], Tensor | None]
"""Of a slice the rows of its weight, or None where this rank does not hold all of them."""


class Saved(NamedTuple):
    """A checked state_dict."""

    steps: int
    schedule: Schedule
    layout: str
    exact: bool
    shards: int
    """Equal parts of each tensor that were cut alike (see `partition.cut`)."""
    partition: Partition
    records: Book
    values: dict[Slice, dict[str, Any]]
    """Of slices of the partition, or of blocks of them."""


def header(
    partition: Partition,
    schedule: Schedule,
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    **settings: Any,
) -> dict[str, Any]:
    """What a saved state says beside the state of its parameters."""
    return {
        "format": FORMAT,
        "schedule": dict(schedule.__dict__),
        "shapes": {name: list(shape) for name, shape in partition.shapes.items()},
        "partition": [[list(piece) for piece in chunk] for chunk in partition],
        "param_groups": [
            {**{k: v for k, v in group.items() if k != "params"}, "params": members}
            for group, members in zip(groups, names, strict=True)
        ],
        **settings,
    }


def part(block: Block, book: Book, kept: State) -> SavedState:
    """The slices of `block` with their values, as a piece of the saved state."""
    values: dict[Slice, dict[str, Any]] = {}
    for (piece, key), value in kept.items():
        values.setdefault(piece, {})[key] = value
    found: SavedState = {}
    for piece, around in block.items():
        if book[around].steps:
            entry = {"start": piece.start, "stop": piece.stop, **book[around].__dict__}
            entry["values"] = values.get(piece, {})
            found.setdefault(piece.name, []).append(entry)
    return found


def joined(parts: Iterable[SavedState]) -> SavedState:
    """The saved state of which these are the chunks."""
    state: SavedState = {}
    for found in parts:
        for name, entries in found.items():
            state.setdefault(name, []).extend(entries)
    return state


def check(
    state_dict: Mapping[str, Any],
    rule: str,
    shapes: Mapping[str, tuple[int, ...]],
    groups: Sequence[Sequence[str]],
) -> Saved:
    """Read a state_dict of this model.

    Raises:
        StateError: it is none of ours, of another rule, or of another model.
    """
    if state_dict.get("format") != FORMAT:
        raise StateError(
            f"state format {state_dict.get('format')!r} is not {FORMAT}: this is not a state of "
            f"ChunkedOptimizer"
        )
    if state_dict["rule"] != rule:
        raise StateError(
            f"the state is of {state_dict['rule']}, the optimizer runs {rule}: its values mean "
            f"something else; resume with {state_dict['rule']}"
        )
    theirs = {name: tuple(shape) for name, shape in state_dict["shapes"].items()}
    for name in [*shapes, *theirs]:
        if shapes.get(name) != theirs.get(name):
            raise StateError(
                f"{name} has shape {theirs.get(name)} in the state and {shapes.get(name)} in the "
                f"model; load it into the model it was saved from"
            )
    if [list(g["params"]) for g in state_dict["param_groups"]] != [list(g) for g in groups]:
        raise StateError("the parameter groups differ from the saved ones; pass the same groups")
    records: Book = {}
    values: dict[Slice, dict[str, Any]] = {}
    for name, entries in state_dict["state"].items():
        for entry in entries:
            piece = Slice(name, entry["start"], entry["stop"])
            records[piece] = Record(entry["steps"], entry["updates"], entry["last"])
            values[piece] = entry["values"]
    try:
        partition = Partition(
            shapes, [[Slice(*piece) for piece in chunk] for chunk in state_dict["partition"]]
        )
        schedule = Schedule(**state_dict["schedule"])
    except (ChunkFTError, KeyError) as e:
        raise StateError(f"the saved partition does not fit this model: {e}") from e
    return Saved(
        state_dict["steps"],
        schedule,
        state_dict["layout"],
        state_dict.get("exact", False),
        state_dict.get("shards", 1),
        partition,
        records,
        values,
    )


def records(saved: Saved) -> Book:
    """For the saved partition itself."""
    # the first block of a slice begins where it does, and all went through the same
    found = {(piece.name, piece.start): record for piece, record in saved.records.items()}
    return {
        piece: found.get((piece.name, piece.start), Record())
        for chunk in saved.partition
        for piece in chunk
    }


def recut(saved: Saved, partition: Partition, rows_of: RowsOf) -> tuple[Partition, Book]:
    """`partition` with slices split where the step counts saved for their rows differ.

    Raises:
        StateError: a value is not elementwise.
    """
    old, view = _parts(saved), _View(saved.partition.shapes, rows_of)
    # without their elements: what cannot be cut must raise before anything is replaced
    outline = [
        [
            part
            for piece in chunk
            for part in _join(_cut(old[piece.name], piece, view, dry=True), view)
        ]
        for chunk in partition
    ]
    book = {part.piece: part.record for parts in outline for part in parts}
    return Partition(partition.shapes, [[p.piece for p in parts] for parts in outline]), book


def states(saved: Saved, rests: Iterable[tuple[str, Block]], rows_of: RowsOf) -> States:
    """The saved values cut for `rests`, which are of a partition that `recut` made, or of its own.

    What was saved by other slices needs the weights it was saved with.
    """
    old, view = _parts(saved), _View(saved.partition.shapes, rows_of)
    for key, block in rests:
        state: State = {}
        for piece in block:
            values = saved.values.get(piece)
            if values is None:
                [(_, _, values)] = _join(_cut(old[piece.name], piece, view), view)
                _rest(piece, values, rows_of)
            state |= {(piece, name): value for name, value in values.items()}
        yield key, state


def _parts(saved: Saved) -> dict[str, list["_Part"]]:
    """By name, in the order of rows."""
    found = {name: list[_Part]() for name in saved.partition.shapes}
    for piece in sorted(saved.values):
        found[piece.name].append(_Part(piece, saved.records[piece], saved.values[piece]))
    taken = {(p.name, p.start) for p in saved.values}
    for piece in (p for chunk in saved.partition for p in chunk):
        if (piece.name, piece.start) not in taken:  # never stepped
            found[piece.name].append(_Part(piece, Record(), {}))
    return {name: sorted(parts, key=lambda part: part.piece) for name, parts in found.items()}


class _View(NamedTuple):
    shapes: Shapes
    rows: RowsOf

    def shape(self, piece: Slice) -> tuple[int, ...]:
        full = self.shapes[piece.name]
        return (piece.rows, *full[1:]) if full else ()


def _rest(piece: Slice, values: dict[str, Any], rows_of: RowsOf) -> None:
    """The master as it goes to the store: what its weight lacks."""
    if precision.WHOLE in values:
        master, weight = values.pop(precision.WHOLE), rows_of(piece)
        assert weight is not None
        values.update(precision.rest(master, weight))


class _Part(NamedTuple):
    piece: Slice
    record: Record
    values: dict[str, Any]


def _cut(parts: Sequence[_Part], wanted: Slice, view: _View, dry: bool = False) -> list[_Part]:
    """What lies in the rows `wanted`; without elements (on "meta") if `dry`.

    Args:
        parts: in the order of rows, of which a tensor in blocks has hundreds.
    """
    found: list[_Part] = []
    first = bisect_right(parts, wanted.start, key=lambda part: part.piece.stop)
    last = bisect_left(parts, wanted.stop, key=lambda part: part.piece.start)
    for piece, record, saved in parts[first:last]:
        start, stop = max(piece.start, wanted.start), min(piece.stop, wanted.stop)
        part, values = Slice(piece.name, start, stop), dict(saved)
        halves = {key: values.pop(key) for key in precision.KEYS if key in values}
        if dry:
            values = {key: mapped(value, lambda t: t.to("meta")) for key, value in values.items()}
        if part != piece:
            values = {k: _rows(piece, k, v, part, view) for k, v in values.items()}
        if halves:  # whole, or it could not be joined to another
            values[precision.WHOLE] = _master(piece, part, halves, view, dry)
        found.append(_Part(part, Record(**record.__dict__), values))
    return found


def _master(piece: Slice, part: Slice, halves: dict[str, Tensor], view: _View, dry: bool) -> Tensor:
    """Rows `part` of the master of `piece`."""
    if dry:
        return torch.empty(view.shape(part), dtype=torch.float32, device="meta")
    first, row = part.start - piece.start, prod(view.shapes[piece.name][1:])
    weight = view.rows(piece)
    if weight is not None:
        master = precision.wake(halves, weight)
        return master if part == piece else master[first : first + part.rows].clone()
    weight = view.rows(part)
    assert weight is not None
    halves = precision.cut(halves, first * row, (first + part.rows) * row, weight)
    return precision.wake(halves, weight)


def _rows(piece: Slice, key: str, value: Any, part: Slice, view: _View) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    _check_elementwise(piece, key, value, view)
    return value[part.start - piece.start : part.stop - piece.start].clone()


def _check_elementwise(piece: Slice, key: str, value: Tensor, view: _View) -> None:
    if value.shape != view.shape(piece) or is_traceable_wrapper_subclass(value):
        raise StateError(
            f"{piece.name}: state {key!r} of shape {tuple(value.shape)} is not elementwise, so "
            f"rows [{piece.start}, {piece.stop}) cannot be cut or joined; resume with the saved "
            f"chunks and layout"
        )


def _join(parts: list[_Part], view: _View) -> list[_Part]:
    joined: list[_Part] = []
    for part in parts:
        if joined and (merged := _merge(joined[-1], part, view)):
            joined[-1] = merged
        else:
            joined.append(part)
    return joined


def _merge(a: _Part, b: _Part, view: _View) -> _Part | None:
    if a.record.updates != b.record.updates or a.values.keys() != b.values.keys():
        return None
    values: dict[str, Any] = {}
    for key, left in a.values.items():
        right = b.values[key]
        if isinstance(left, Tensor) and left.dim() > 0:
            for part, value in ((a, left), (b, right)):
                _check_elementwise(part.piece, key, value, view)
            values[key] = torch.cat([left, right])
        elif left != right:
            return None
        else:
            values[key] = left
    record = Record(
        min(a.record.steps, b.record.steps), a.record.updates, min(a.record.last, b.record.last)
    )
    return _Part(Slice(a.piece.name, a.piece.start, b.piece.stop), record, values)


def to_device(state: State, device_of: Callable[[str], torch.device]) -> State:
    """A copy of `state` with its tensors where their weights work; scalars stay where they are."""

    def copied(value: Any, device: torch.device) -> Any:
        if isinstance(value, Tensor) and value.dim() == 0:
            return value.clone()
        # a subclass' own `to` may share what is inside
        return mapped(value, lambda t: t.to(device, copy=True))

    return {
        (piece, key): copied(value, device_of(piece.name)) for (piece, key), value in state.items()
    }


def first_moment_rate(settings: Mapping[str, Any]) -> float:
    """beta1 of Adam-like rules, momentum of SGD-like ones.

    Raises:
        InputError: the rule keeps no first moment that we know.
    """
    if "betas" in settings:
        return float(settings["betas"][0])
    if settings.get("momentum"):
        return float(settings["momentum"])
    raise InputError(
        "moments='decay' needs a rule with betas or momentum; use moments='persist' or 'reset'"
    )


def decay_first_moment(values: dict[str, Any], settings: Mapping[str, Any], gap: int) -> None:
    """Scale the first moment by beta1^gap; block-wise 8-bit ones through their block maxima.

    Raises:
        InputError: the state has none that we know.
    """
    for key in ("exp_avg", "absmax1", "state1", "momentum_buffer"):
        moment = values.get(key)
        if isinstance(moment, Tensor):
            rate = first_moment_rate(settings) ** gap
            if is_traceable_wrapper_subclass(moment):  # torchao's 8 bits know copy_, not mul_
                moment.copy_(moment.dequantize() * rate)
            else:
                moment.mul_(rate)
            return
    if values:
        raise InputError(
            f"moments='decay': no first moment among the rule's state ({', '.join(values)}); use "
            f"moments='persist' or 'reset'"
        )
