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

import sys
from collections.abc import Iterable, Iterator

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
    if weight.dtype != torch.bfloat16:
        return {WHOLE: master, CHECK: fingerprint(weight)}
    bits, upper = master.detach().reshape(-1).view(torch.int32), _halves(weight)
    low = torch.empty_like(upper)
    wrong = []
    for here in _windows(bits):
        low[here] = bits[here].view(torch.int16)[LOWER::2]
        missed = _joined(low[here], upper[here]) != bits[here]
        wrong.append(missed.nonzero().reshape(-1).add_(here.start))
    index = torch.cat(wrong)
    high = (bits[index] >> 16).to(torch.int16)
    return {LOW: low, INDEX: index, HIGH: high, CHECK: fingerprint(weight)}


def wake(kept: dict[str, Tensor], weight: Tensor) -> Tensor:
    """The fp32 master of `weight` from what `rest` kept.

    If the weight is not the one it was (loaded in place meanwhile), its own value is the master.
    """
    if not torch.equal(kept[CHECK].cpu(), fingerprint(weight).cpu()):
        return weight.detach().float()
    if WHOLE in kept:
        return kept[WHOLE].to(weight.device).reshape(weight.shape)
    low, upper = kept[LOW].to(weight.device), _halves(weight)
    bits = torch.empty_like(low, dtype=torch.int32)
    for here in _windows(bits):
        bits[here] = _joined(low[here], upper[here])
    wrong = kept[INDEX].to(weight.device)
    high = kept[HIGH].to(weight.device).to(torch.int32)
    bits[wrong] = (high << 16) | (low[wrong].to(torch.int32) & 0xFFFF)
    master = bits.view(torch.float32).reshape(weight.shape)
    if weight.is_contiguous():
        return master
    # channels_last, say: a fused rule needs parameter, gradient and state to lie alike
    return torch.empty_like(weight, dtype=torch.float32).copy_(master)


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


def _joined(low: Tensor, upper: Tensor) -> Tensor:
    """Bits of the master by the rule above."""
    return upper.to(torch.int32).bitwise_left_shift_(16).add_(low)


def _halves(weight: Tensor) -> Tensor:
    return weight.detach().contiguous().reshape(-1).view(torch.int16)


def _windows(values: Tensor) -> Iterator[slice]:
    """Parts of `values` that stay in a CPU's cache, and are a fraction of it in memory.

    On CUDA, where each costs launches and a wait, they are large.
    """
    size = 2**24 if values.is_cuda else max(2**18, values.numel() // 64)
    for begin in range(0, max(1, values.numel()), size):
        yield slice(begin, begin + size)


def overwritten(weight: Tensor, master: Tensor, known: bool) -> bool:
    """Whether someone wrote to `weight` since `master` was rounded to it.

    In-place writes show in the version counter (`known` is False), and all elements are compared
    then; writes through `.data` do not, so always all of a small weight and `SAMPLE` or more of
    a large one, at most 61 apart, are compared.
    """
    every = min(61, max(1, weight.numel() // SAMPLE)) if known else 1
    mine, theirs = master.reshape(-1)[::every], weight.detach().reshape(-1)[::every]
    return not torch.equal(mine.to(theirs), theirs)


def fingerprint(weight: Tensor) -> Tensor:
    """Two int64 sums over the weight's bits, as rows of 64 words: they tell a foreign write.

    One weighs each word by its row, one by its column, so that no two changes, a swap say, cancel
    in both. Folding a row's sum before it is weighed keeps its top bit, the sign of an element,
    from being shifted out or cancelled by another's.
    """
    bits = weight.detach().contiguous().reshape(-1).view(torch.int16)
    whole = bits.numel() // 256 * 256
    rows, tail = bits[:whole], bits[whole:].long()
    if rows.storage_offset() % 4:
        rows = rows.clone()
    rows = rows.view(torch.int64).view(-1, 64)  # not element by element: that needs a wider copy
    by_row = torch.cat([rows.sum(1), tail.sum().view(1)])
    by_column = torch.cat([rows.sum(0), tail])
    return torch.stack([_weighed(by_row), _weighed(by_column)])


def _weighed(sums: Tensor) -> Tensor:
    folded = sums ^ (sums >> 31)
    return (folded * torch.arange(1, 2 * sums.numel(), 2, device=sums.device)).sum()
