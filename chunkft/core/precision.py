"""fp32 master = bf16 weight + low bits: an exact master in two bytes an element.

While a chunk is active its fp32 master is a tensor of its own. At rest the bf16 weight, which stays
in the model anyway, is the master's upper half after rounding, so only the lower half is kept:

    master bits = (h << 16) + low, low unsigned; weight bits w = round_to_nearest_even(master)
    h = w      if low < 0x8000           (rounded down)
    h = w - 1  if low > 0x8000           (rounded up)
    so master bits = (w << 16) + low, low read as a signed number

The elements where this is wrong, such as ties that rounding to even sent down (about one in a
million), are kept as (index, h). What is stored is checked against the true bits, so the scheme is
exact for every bit pattern, whatever the device rounds denormals to.

Cost at rest: 2 bytes an element instead of 4, plus 10 bytes an exception.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOW = "master_low"
INDEX = "master_index"
HIGH = "master_high"
WHOLE = "master"
CHECK = "master_check"
KEYS = (LOW, INDEX, HIGH, WHOLE, CHECK)

MASTERS = ("auto", "fp32", "none")
SAMPLE = 4096  # elements
LOWER = 0 if sys.byteorder == "little" else 1  # half of a 32-bit word


def is_16bit(dtype: torch.dtype) -> bool:
    """Whether weights of `dtype` are updated in fp32: their rule's state would lose its tail."""
    return dtype in (torch.bfloat16, torch.float16)


def rest(master: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """What must be kept of `master` (fp32) beside `weight`, which it rounds to."""
    return rest_all([master], [weight])[0]


def wake(kept: dict[str, Tensor], weight: Tensor) -> Tensor:
    """The fp32 master of `weight` from what `rest` kept.

    If the weight is not the one it was (loaded in place meanwhile), its own value is the master.
    """
    return wake_all([kept], [weight])[0]


def cut(kept: dict[str, Tensor], start: int, stop: int, weight: Tensor) -> dict[str, Tensor]:
    """Of what `rest` kept, the elements [start, stop), which are those of `weight`.

    Without the rest of the weight nobody can say whether somebody wrote to it.
    """
    found = {CHECK: fingerprint(weight)}
    if WHOLE in kept:
        return found | {WHOLE: kept[WHOLE].reshape(-1)[start:stop].reshape(weight.shape)}
    inside = (kept[INDEX] >= start) & (kept[INDEX] < stop)
    index, high = kept[INDEX][inside] - start, kept[HIGH][inside]
    return found | {LOW: kept[LOW].reshape(-1)[start:stop], INDEX: index, HIGH: high}


def rest_all(masters: Sequence[Tensor], weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """`rest` of each, many in one operation: a chunk has hundreds of slices, which all cost a
    launch for every operation and a wait for every question asked of them alone."""
    kept: list[dict[str, Tensor]] = [{CHECK: check} for check in fingerprints(weights)]
    for same in _alike(weights):
        if weights[same[0]].dtype != torch.bfloat16:
            for i in same:
                kept[i][WHOLE] = masters[i]
            continue
        bits = [masters[i].detach().reshape(-1).view(torch.int32) for i in same]
        found = zip(*_low_bits(bits, [_halves(weights[i]) for i in same]), strict=True)
        for i, (low, index, high) in zip(same, found, strict=True):
            kept[i] |= {LOW: low, INDEX: index, HIGH: high}
    return kept


def wake_all(kept: Sequence[dict[str, Tensor]], weights: Sequence[Tensor]) -> list[Tensor]:
    """`wake` of each, many in one operation."""
    masters: dict[int, Tensor] = {}
    for same in _alike(weights):
        device = weights[same[0]].device
        checks = torch.stack([kept[i][CHECK].to(device) for i in same])
        now = torch.stack(fingerprints([weights[i] for i in same]))
        if not torch.equal(checks, now):  # one wait for all of them
            written = (checks != now).any(1).tolist()
            masters |= {
                i: weights[i].detach().float() for i, w in zip(same, written, strict=True) if w
            }
            same = [i for i in same if i not in masters]
        whole = [i for i in same if WHOLE in kept[i]]
        masters |= {i: kept[i][WHOLE].to(device).reshape(weights[i].shape) for i in whole}
        same = [i for i in same if i not in masters]
        halves = [_halves(weights[i]) for i in same]
        found = _joined_bits([kept[i] for i in same], halves)
        for i, bits in zip(same, found, strict=True):
            master = bits.view(torch.float32).reshape(weights[i].shape)
            if not weights[i].is_contiguous():
                # channels_last, say: a fused rule needs parameter, gradient and state to lie alike
                master = torch.empty_like(weights[i], dtype=torch.float32).copy_(master)
            masters[i] = master
    return [masters[i] for i in range(len(weights))]


def _low_bits(
    bits: Sequence[Tensor], halves: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Lower halves, and the exceptions' indices and upper halves, of masters beside weights."""
    lows = [torch.empty_like(upper) for upper in halves]
    index: list[list[Tensor]] = [[] for _ in bits]
    high: list[list[Tensor]] = [[] for _ in bits]
    for parts in _batches(bits):
        whole, upper = _gathered(bits, parts), _gathered(halves, parts)
        low = _spread(whole.view(torch.int16)[LOWER::2], lows, parts)
        at = (_joined(low, upper) != whole).nonzero().reshape(-1)
        if not len(at):
            continue
        ends = torch.tensor(list(itertools.accumulate(p.size for p in parts)))
        where = torch.searchsorted(ends.to(at.device), at, right=True)
        shift = torch.tensor([p.start + p.size for p in parts]) - ends
        counts = torch.bincount(where, minlength=len(parts)).tolist()
        there = (at + shift.to(at.device)[where]).split(counts)
        theirs = (whole[at] >> 16).to(torch.int16).split(counts)
        for part, i, h in zip(parts, there, theirs, strict=True):
            index[part.tensor].append(i)
            high[part.tensor].append(h)
    none = torch.empty(0, dtype=torch.long, device=bits[0].device)
    return (
        lows,
        [torch.cat([none, *found]) for found in index],
        [torch.cat([none.to(torch.int16), *found]) for found in high],
    )


def _joined_bits(kept: Sequence[dict[str, Tensor]], halves: Sequence[Tensor]) -> list[Tensor]:
    """The masters' bits, flat, from what was kept beside the weights' upper halves."""
    lows = [k[LOW].to(upper.device) for k, upper in zip(kept, halves, strict=True)]
    found = [torch.empty_like(upper, dtype=torch.int32) for upper in halves]
    for parts in _batches(halves):
        low, upper = _gathered(lows, parts), _gathered(halves, parts)
        if len(parts) == 1:
            _joined(low, upper, *_views(found, parts))
        else:
            _spread(_joined(low, upper), found, parts)
    for k, bits in zip(kept, found, strict=True):
        if k[INDEX].numel():
            wrong = k[INDEX].to(bits.device)
            high = k[HIGH].to(bits.device).to(torch.int32) << 16
            bits[wrong] = high | (bits[wrong] & 0xFFFF)
    return found


def total_norm(gradients: Iterable[Tensor], scale: Tensor | None) -> Tensor:
    """Norm of all gradients in fp32, divided by `scale`: torch's own, to the bit, on a CPU."""
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.float32 if is_16bit(g.dtype) else None)
        for g in gradients
    ]
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total if scale is None else total * scale.double().reciprocal().to(total)


def _joined(low: Tensor, upper: Tensor, out: Tensor | None = None) -> Tensor:
    """Bits of the master by the rule above."""
    wide = upper.to(torch.int32) if out is None else out.copy_(upper)
    return wide.bitwise_left_shift_(16).add_(low)


def _halves(weight: Tensor) -> Tensor:
    return weight.detach().contiguous().reshape(-1).view(torch.int16)


class _Part(NamedTuple):
    """Elements `start` to `start + size` of the flat `tensor` of that number."""

    tensor: int
    start: int
    size: int


def _alike(weights: Sequence[Tensor]) -> list[list[int]]:
    """Their numbers, those of one device and dtype together."""
    found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, weight in enumerate(weights):
        found.setdefault((weight.device, weight.dtype), []).append(i)
    return list(found.values())


def _batches(flat: Sequence[Tensor]) -> Iterator[list[_Part]]:
    """Parts of all tensors, some together.

    On a CPU a batch stays in its cache and is no larger than the largest tensor, so small ones cost
    nothing more beside it; on CUDA, where each batch costs launches and a wait, it is larger.
    """
    largest = max((tensor.numel() for tensor in flat), default=0)
    on_card = bool(flat) and flat[0].is_cuda
    room = size = 2**21 if on_card else min(largest, max(2**18, largest // 64))
    parts: list[_Part] = []
    for i, tensor in enumerate(flat):
        start = 0
        while start < tensor.numel():
            part = _Part(i, start, min(room, tensor.numel() - start))
            parts.append(part)
            start, room = start + part.size, room - part.size
            if not room:
                yield parts
                parts, room = [], size
    if parts:
        yield parts


def _views(flat: Sequence[Tensor], parts: Sequence[_Part]) -> list[Tensor]:
    return [flat[p.tensor][p.start : p.start + p.size] for p in parts]


def _gathered(flat: Sequence[Tensor], parts: Sequence[_Part]) -> Tensor:
    found = _views(flat, parts)
    return found[0] if len(found) == 1 else torch.cat(found)


def _spread(values: Tensor, flat: Sequence[Tensor], parts: Sequence[_Part]) -> Tensor:
    """Write `values` to the parts; returns them, contiguous."""
    places = _views(flat, parts)
    if len(places) == 1:
        return places[0].copy_(values)
    values = values.contiguous()
    torch._foreach_copy_(places, list(values.split([p.size for p in parts])))
    return values


def overwritten_all(
    weights: Sequence[Tensor], masters: Sequence[Tensor], known: Sequence[bool]
) -> list[bool]:
    """Whether someone wrote to each weight since its master was rounded to it.

    In-place writes show in the version counter (`known` is False), and all elements are compared
    then; writes through `.data` do not, so always all of a small weight and `SAMPLE` or more of
    a large one, at most 61 apart, are compared. A CUDA device is asked once for all of them.
    """
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    for weight, master, same in zip(weights, masters, known, strict=True):
        every = min(61, max(1, weight.numel() // SAMPLE)) if same else 1
        mine.append(master.reshape(-1)[::every].to(weight.dtype))
        theirs.append(weight.detach().reshape(-1)[::every])
    if any(values.is_cuda for values in theirs):
        flags = [(a != b).any() for a, b in zip(mine, theirs, strict=True)]
        return torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    if any(values.is_cuda for values in mine):  # copies of streamed weights, which rest here
        for same in _alike(mine):
            arrived = torch.cat([mine[i] for i in same]).cpu()
            for i, values in zip(same, arrived.split([len(mine[i]) for i in same]), strict=True):
                mine[i] = values
    return [not torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)]


def fingerprint(weight: Tensor) -> Tensor:
    """Two int64 sums over the weight's bits, as rows of 64 words: they tell a foreign write.

    One weighs each word by its row, one by its column, so that no two changes, a swap say, cancel
    in both. Folding a row's sum before it is weighed keeps its top bit, the sign of an element,
    from being shifted out or cancelled by another's.
    """
    return fingerprints([weight])[0]


def fingerprints(weights: Sequence[Tensor]) -> list[Tensor]:
    """The fingerprint of each, two launches a weight and some for many together."""
    found: dict[int, Tensor] = {}
    for same in (part for alike in _alike(weights) for part in _together(weights, alike)):
        by_row: list[list[Tensor]] = []
        by_column: list[list[Tensor]] = []
        none = torch.zeros(1, dtype=torch.long, device=weights[same[0]].device)
        for i in same:
            bits = _halves(weights[i])
            whole = bits.numel() // 256 * 256
            rows, tail = bits[:whole], bits[whole:]
            if rows.storage_offset() % 4:
                rows = rows.clone()
            rows = rows.view(torch.int64).view(-1, 64)  # element by element needs a wider copy
            by_row.append([rows.sum(1), tail.long().sum().view(1) if len(tail) else none])
            by_column.append([rows.sum(0), *([tail.long()] if len(tail) else [])])
        both = torch.stack([_weighed(by_row), _weighed(by_column)], 1)
        found |= dict(zip(same, both, strict=True))
    return [found[i] for i in range(len(weights))]


def _together(weights: Sequence[Tensor], which: Sequence[int]) -> Iterator[list[int]]:
    """Those whose sums are weighed in one go: on a CPU no more sums than the largest has alone."""
    sums = {i: 64 + weights[i].numel() // 256 + weights[i].numel() % 256 for i in which}
    most = room = 2**18 if weights[which[0]].is_cuda else max(sums.values())
    part: list[int] = []
    for i in which:
        if part and sums[i] > room:
            yield part
            part, room = [], most
        part.append(i)
        room -= sums[i]
    yield part


def _weighed(sums: Sequence[list[Tensor]]) -> Tensor:
    """The weighed sum of each."""
    counts = [sum(map(len, parts)) for parts in sums]
    values = torch.cat([part for parts in sums for part in parts])
    folded = values ^ (values >> 31)
    ends = list(itertools.accumulate(counts))
    begins = torch.tensor([0, *ends[:-1]], device=values.device)
    lengths = torch.tensor(counts, device=values.device)
    first = begins.repeat_interleave(lengths, output_size=len(values))
    place = torch.arange(len(values), device=values.device) - first
    upto = (folded * (2 * place + 1)).cumsum(0)[torch.tensor(ends, device=values.device) - 1]
    return upto.diff(prepend=upto.new_zeros(1))
