"""fp32 master = bf16 weight + low bits: an exact master in two bytes an element.

While a chunk is active its fp32 master is a tensor of its own. At rest the bf16 weight, which stays
in the model anyway, is the master's upper half after rounding, so only the lower half is kept:

    master bits = (h << 16) | low        weight bits w = round_to_nearest_even(master)
    h = w      if low < 0x8000           (rounded down)
    h = w - 1  if low > 0x8000           (rounded up)
    low = 0x8000 is a tie: up (h = w - 1) unless noted

The elements where this guess of h is wrong, such as ties that rounding to even sent down (about one
in a million), are kept as (index, h). What is stored is checked against the true h, so the scheme
is exact for every bit pattern, whatever the device rounds denormals to.

Cost at rest: 2 bytes an element instead of 4, plus 10 bytes an exception.
"""

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


def is_16bit(dtype: torch.dtype) -> bool:
    """Whether weights of `dtype` are updated in fp32: their rule's state would lose its tail."""
    return dtype in (torch.bfloat16, torch.float16)


def rest(master: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """What must be kept of `master` (fp32) beside `weight`, which it rounds to."""
    if weight.dtype != torch.bfloat16:
        return {WHOLE: master, CHECK: fingerprint(weight)}
    bits = master.detach().reshape(-1).view(torch.int32)
    # int16 holds the lower half as a bit pattern: low >= 0x8000 is a negative number
    low = ((bits << 16) >> 16).to(torch.int16)
    high = (bits >> 16).to(torch.int16)
    wrong = (_guess(low, weight) != high).nonzero().reshape(-1)
    return {LOW: low, INDEX: wrong, HIGH: high[wrong], CHECK: fingerprint(weight)}


def wake(kept: dict[str, Tensor], weight: Tensor) -> Tensor:
    """The fp32 master of `weight` from what `rest` kept.

    If the weight is not the one it was (loaded in place meanwhile), its own value is the master.
    """
    if not torch.equal(kept[CHECK].cpu(), fingerprint(weight).cpu()):
        return weight.detach().float()
    if WHOLE in kept:
        return kept[WHOLE].to(weight.device).reshape(weight.shape)
    low = kept[LOW].to(weight.device)
    high = _guess(low, weight)
    high[kept[INDEX].to(weight.device)] = kept[HIGH].to(weight.device)
    bits = (high.to(torch.int32) << 16) | (low.to(torch.int32) & 0xFFFF)
    master = bits.view(torch.float32).reshape(weight.shape)
    if weight.is_contiguous():
        return master
    # channels_last, say: a fused rule needs parameter, gradient and state to lie alike
    return torch.empty_like(weight, dtype=torch.float32).copy_(master)


def _guess(low: Tensor, weight: Tensor) -> Tensor:
    upper = weight.detach().contiguous().reshape(-1).view(torch.int16)
    return upper - (low < 0).to(torch.int16)


def overwritten(weight: Tensor, master: Tensor, known: bool) -> bool:
    """Whether someone wrote to `weight` since `master` was rounded to it.

    In-place writes show in the version counter (`known` is False), and all elements are compared
    then; writes through `.data` do not, so always all of a small weight and `SAMPLE` or more of
    a large one, at most 61 apart, are compared.
    """
    every = min(61, max(1, weight.numel() // SAMPLE)) if known else 1
    mine, theirs = master.reshape(-1)[::every], weight.detach().reshape(-1)[::every]
    return not torch.equal(mine.to(theirs.dtype), theirs)


def fingerprint(weight: Tensor) -> Tensor:
    """Two int64 sums over the weight's bits laid out as rows of 256: they tell a foreign write.

    One weighs each element by its row, one by its column, so that no two changes, a swap say,
    cancel in both.
    """
    bits = weight.detach().contiguous().reshape(-1).view(torch.int16)
    whole = bits.numel() // 256 * 256
    rows, tail = bits[:whole].view(-1, 256), bits[whole:]
    by_row = torch.cat([rows.sum(1, dtype=torch.int64), tail.sum(dtype=torch.int64).view(1)])
    by_column = rows.sum(0, dtype=torch.int64)
    by_column[: tail.numel()] += tail
    sums = (by_row, by_column)
    weighed = [x * torch.arange(1, x.numel() + 1, device=x.device) for x in sums]
    return torch.stack([x.sum() for x in weighed])
