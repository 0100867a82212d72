"""Block-wise 8-bit moments at rest: 4 bytes an element of a bf16 model under AdamW, not 10.

Blocks of 256 elements, as they lie in memory, rest as one fp32 scale and codes into the dynamic map
of 256 levels in [-1, 1], or in [0, 1] for moments that cannot be negative (Dettmers et al., 8-bit
Optimizers via Block-wise Quantization, arXiv 2110.02861). They wake to fp32: the rule computes as
it always does.

    scale = the element of largest magnitude, with its sign: the signed map has +1 and no -1
    x / scale lies between two neighbouring levels a <= b; it rests as b with (x / scale - a) / (b -
    a) for probability, else as a

Stochastic rounding, because a moment that is rounded to the nearest level at every rest cannot
decay: beta2 = 0.999 moves v by less than half a gap (0.7 % of its size at least), so it stays for
ever. What lies on a level stays there, so encode(decode(encode(x))) is encode(x) to the bit, and
saved states lose nothing. The draw depends on the slice and its step count, so a resumed run makes
the same. With another K, or other blocks of the store, slices begin elsewhere and are rounded once
more.

When it is rounded: at the end of a visit; in exact mode, and where the store has blocks, at every
step. Saving and detaching round nothing: a state that was decayed and not stepped yet lies between
levels by a hair.

A second moment above 0 never rests as 0: m / (sqrt(0) + eps) would leap (the zero point problem, Li
et al., arXiv 2309.01507).

Bytes at rest: 1 + 4/256 an element. On a CPU thread 10 M elements take some 0.12 s in, 0.03 s out.
"""

import warnings
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from chunkft.core import precision
from chunkft.core.store import State

BLOCK = 256  # elements
SMALLEST = 4096  # elements; below, a moment stays as it is, as in bitsandbytes
TINIEST = 2.0**-100  # blocks below rest as zeros: their levels would be denormal
PIECE = 2**20  # elements at a time: a few MB each of some ten temporaries

# The names under which rules keep moments. An averaged weight (ASGD's ax) is none, nor is a step
# size (Rprop's): what is not named here stays as it is. state1 and state2 are bitsandbytes'.
SIGNED = frozenset(("exp_avg", "momentum_buffer", "state1"))
UNSIGNED = frozenset(
    ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "state2")
)
CODES, SCALE = "codes", "scale"  # what takes a moment's place in a state


class EightBitMoments:
    """Codec of a `Store`: `ChunkedOptimizer(..., store=Store("host", EightBitMoments()))`.

    An fp32 tensor under one of the names above, of at least 4096 elements in its slice, rests as
    codes and scales; everything else as it is, what is in 8 bits already (bitsandbytes, torchao)
    too. Fp32 tensors of that size under other names are told once, in a warning. Beside
    `Store(block=N)` a slice is what of it lies in a block.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[bool, torch.device], _Table] = {}
        self._told: set[str] = set()

    def encode(self, state: State) -> State:
        """`state`, keyed by (slice, name), with codes and scales in the place of moments."""
        rests: State = {}
        for key, value in state.items():
            if not _is_moment(key, value, state):
                self._tell(key[1], value)
                rests[key] = value
                continue
            table = self._table(key[1] in SIGNED, value.device)
            generator = torch.Generator(value.device).manual_seed(_seed(key, value, state))
            rests[*key, CODES], rests[*key, SCALE] = _quantize(value, table, generator)
        return rests

    def decode(self, state: State) -> State:
        """What `encode` was given, on the levels; a state that is not encoded passes."""
        awake: State = {}
        for key, value in state.items():
            kind = key[2] if isinstance(key, tuple) and len(key) == 3 else None
            if kind is None:
                awake[key] = value
            elif kind == CODES:
                *name, _ = key
                table = self._table(name[1] in SIGNED, value.device)
                awake[tuple(name)] = _dequantize(value, state[*name, SCALE], table)
        return awake

    def _tell(self, name: str, value: Any) -> None:
        if _is_large(value) and name not in precision.KEYS and name not in self._told:
            self._told.add(name)
            warnings.warn(
                f"EightBitMoments: {name!r} ({value.numel()} elements in the first slice) is no "
                f"moment that it knows, and rests in fp32",
                stacklevel=2,
            )

    def _table(self, signed: bool, device: torch.device) -> "_Table":
        if (signed, device) not in self._tables:
            self._tables[signed, device] = _table(signed, device)
        return self._tables[signed, device]


class _Table(NamedTuple):
    """A map of levels, and the way to find them."""

    signed: bool
    levels: Tensor
    """In ascending order, and infinity."""
    lowest: Tensor
    """For the upper half of a float32's bits: the level at or below all such floats."""


@lru_cache
def dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 256 levels of the dynamic map, ascending (arXiv 2110.02861, section 1.3).

    The decade of 10^-(6-i) to 10^-(5-i) has 2^i levels, in the unsigned map 2^(i+1), evenly spaced.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        for j in range(count):
            level = 10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / count)
            levels += [level, -level] if signed else [level]
    return tuple(sorted(levels))


def _table(signed: bool, device: torch.device) -> _Table:
    levels = torch.tensor([*dynamic_map(signed), float("inf")], device="cpu")
    # the smallest float of each of the 2^16 cells; a cell is narrower than any gap of levels
    upper = torch.arange(2**16, dtype=torch.int32, device="cpu").bitwise_left_shift_(16)
    smallest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    lowest = torch.bucketize(smallest, levels[1:], right=True, out_int32=True).clamp_(max=255)
    return _Table(signed, levels.to(device), lowest.to(device))


def _is_moment(key: Any, value: Any, state: State) -> bool:
    piece, name = key
    if name == "state1" and (piece, "state2") not in state:
        return False  # bitsandbytes' RMSprop has its second moment there, Lion its first
    if (piece, "grad_avg") in state:
        return False  # RMSprop(centered=True): the square root of a difference of two of them
    return name in SIGNED | UNSIGNED and _is_large(value)


def _is_large(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.float32
        and value.numel() >= SMALLEST
        and not is_traceable_wrapper_subclass(value)
    )


def _seed(key: tuple[Any, str], value: Tensor, state: State) -> int:
    """From the slice, the name, and the step count, or else the moment's bits."""
    piece, name = key
    step = state.get((piece, "step"))
    # SGD counts no steps; a sum of bits may recur, a count does not
    count = _in_memory_order(value).view(torch.int32).sum() if step is None else step
    return zlib.crc32(repr((*piece, name, int(count))).encode())


def _quantize(value: Tensor, table: _Table, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes, uint8 and laid out as `value`, and scales [blocks]."""
    flat = _in_memory_order(value)
    codes = torch.empty_like(value, dtype=torch.uint8)
    scales = torch.empty(-(-flat.numel() // BLOCK), device=value.device)
    out = _in_memory_order(codes)
    for part, blocks in _pieces(flat):
        rows, gap = flat[part], -flat[part].numel() % BLOCK
        if gap:  # the last, short block
            rows = torch.nn.functional.pad(rows, (0, gap))
        found, scales[blocks] = _round(rows.view(-1, BLOCK), table, generator)
        out[part] = found[: found.numel() - gap]
        del found  # or it would lie beside the next piece's temporaries
    return codes, scales


def _round(x: Tensor, table: _Table, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes [elements] and scales [blocks] of x [blocks, BLOCK].

    Compared are the very products that decoding makes, so that a level is met exactly.
    """
    high = x.amax(1, keepdim=True)
    if table.signed:
        low = x.amin(1, keepdim=True)
        high = torch.where(high >= -low, high, low)
    scale = torch.where(high.abs() < TINIEST, 0.0, high if table.signed else high.clamp(min=0))
    size = scale.abs().clamp_(min=TINIEST)
    x = x * scale.sign()
    ratio = x / size
    cell = ratio.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    code = table.lowest.index_select(0, cell.view(-1))
    code += ratio.view(-1) >= table.levels.index_select(0, code + 1)
    below = table.levels.index_select(0, code).view_as(x).mul_(size)
    above = table.levels.index_select(0, code + 1).view_as(x).mul_(size)
    up = above.sub_(below).mul_(_uniform(x, generator)) < below.neg_().add_(x)
    code += up.view(-1)
    if not table.signed:
        code = torch.maximum(code, (x > 0).view(-1))
    return code.to(torch.uint8), scale.view(-1)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device)


def _dequantize(codes: Tensor, scales: Tensor, table: _Table) -> Tensor:
    value = torch.empty_like(codes, dtype=torch.float32)
    flat, out = _in_memory_order(codes), _in_memory_order(value)
    for part, blocks in _pieces(flat):
        levels = table.levels.index_select(0, flat[part].int())
        rows = BLOCK if levels.numel() % BLOCK == 0 else levels.numel()
        out[part] = levels.view(-1, rows).mul_(scales[blocks, None]).view(-1)
        del levels
    return value


def _pieces(flat: Tensor) -> Iterator[tuple[slice, slice]]:
    """Ranges of elements and of their blocks; a short block comes last, alone."""
    count = flat.numel()
    whole = count // BLOCK * BLOCK
    # a dry run needs no more than one: the others take the same memory, and time
    for start in range(0, min(whole, 1) if isinstance(flat, FakeTensor) else whole, PIECE):
        stop = min(start + PIECE, whole)
        yield slice(start, stop), slice(start // BLOCK, stop // BLOCK)
    if whole < count:
        yield slice(whole, count), slice(whole // BLOCK, whole // BLOCK + 1)


def _in_memory_order(value: Tensor) -> Tensor:
    """The elements of `value` in one dimension; a view, or a copy where it has gaps."""
    if torch.empty_like(value, device="meta").stride() != value.stride():
        value = value.clone()
    return value.as_strided((value.numel(),), (1,))
