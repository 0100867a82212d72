"""Several processes: what of a weight this one holds, and what all must agree on.

    data parallel   Every rank holds all rows. Gradients of the active leaves are averaged before
                    the step: N/K elements, 1/K of what DDP reduces.
    FSDP2           A weight is a DTensor cut along axis 0: rank r of w holds the rows
                    [r c, (r+1) c), c = ceil(rows / w), and a leaf is rows of `to_local()`. FSDP
                    averages gradients itself, whole ones of the tensors that a chunk touches.

Ranks of the first kind must stay the same to the bit: fingerprints of the weights are compared when
the optimizer is built, and of a chunk when its visit ends, 16 bytes a rank.

Without a process group, or with one process in it, nothing here does anything.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from chunkft.core import precision
from chunkft.errors import DriftError, UnsupportedError

BUCKET = 2**25  # bytes of gradients that are averaged at once
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
CURE = (
    "give ChunkedOptimizer the model itself: it averages the active chunk's gradients over all "
    "ranks (with Trainer: chunkft.train.trainer.ChunkTrainer among the bases); weights that are "
    "too large for one device go to torch's fully_shard first"
)


class Rows(NamedTuple):
    """Rows [start, stop) of a parameter: those that this rank holds."""

    start: int
    stop: int


def world_size() -> int:
    """Processes of the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(weight: Tensor) -> bool:
    """Whether `weight` is a DTensor, told without importing those, which takes a while."""
    return hasattr(weight, "device_mesh") and hasattr(weight, "placements")


def held(weight: Tensor) -> Tensor:
    """What this rank has of `weight`: the same storage, detached."""
    if not is_sharded(weight):
        return weight.detach()
    sharded: Any = weight
    with torch.no_grad():
        return sharded.to_local().detach()


class Ranks:
    """The processes that train one model together.

    Args:
        weights: its trainable parameters by name.
        device: where they work.

    Raises:
        DriftError: the ranks begin with different weights.
        UnsupportedError: some weights are sharded in another way than fully_shard's, or not all.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], device: torch.device):
        self.count, self.device = world_size(), device
        self.reduced = 0
        """Bytes of gradients that were averaged over ranks so far, before they were sent."""
        self.shards = 1
        """Ranks that share a parameter's rows."""
        self._place, self._group = 0, None
        self._guard: RemovableHandle | None = None
        sharded = [name for name, weight in weights.items() if is_sharded(weight)]
        self.sharded = bool(sharded)
        if plain := [name for name in weights if name not in sharded] if sharded else []:
            raise UnsupportedError(
                f"{plain[0]} is not sharded, {sharded[0]} is: shard all that is trained, or freeze "
                f"the rest"
            )
        meshes = {_mesh_of(name, weights[name]) for name in sharded}
        if len(meshes) > 1:
            raise UnsupportedError("trainable weights lie on several meshes; shard them on one")
        for self._place, self.shards, self._group in meshes:
            pass
        if not self.sharded:
            self.compare(weights.values())

    def rows(self, count: int) -> Rows:
        """Of `count` rows of a parameter those that this rank holds."""
        each = -(-count // self.shards)  # as torch.chunk cuts
        return Rows(min(self._place * each, count), min((self._place + 1) * each, count))

    # -- gradients ------------------------------------------------------------------------------

    def arrived(self, gradient: Tensor) -> Tensor:
        """What this rank holds of a gradient that autograd, or FSDP, has put on a weight."""
        if self.sharded:
            self.reduced += gradient.numel() * gradient.element_size()  # of the whole tensor
        return held(gradient)

    def average(
        self,
        carriers: Sequence[Tensor],
        scale: Tensor | None,
        fill: Callable[[int], None] | None = None,
    ) -> Tensor | None:
        """Make the gradients of `carriers` the means over all ranks, as DDP does.

        One that is there on some ranks only counts as zero on the others. What is sharded FSDP has
        averaged already.

        Args:
            carriers: in the same order on all ranks.
            scale: of this rank's loss; None is 1.
            fill: gives the carrier of that number a gradient of zeros.

        Returns: the scale that gradients are still to be divided by.

        Raises:
            UnsupportedError: a sparse gradient, or a scaled loss beside sharded weights.
        """
        if self.count == 1:
            return scale
        if self.sharded:
            if scale is not None:
                raise UnsupportedError(
                    "a GradScaler scales each rank's loss by itself, and FSDP has added gradients "
                    "up before they are unscaled; train in bfloat16, which needs none"
                )
            return None
        there = torch.tensor([x.grad is not None for x in carriers], dtype=torch.int32)
        there = there.to(self.device)
        dist.all_reduce(there)
        wanted = [i for i, ranks in enumerate(there.tolist()) if ranks]
        for i in wanted:
            if carriers[i].grad is None:
                if fill is None:
                    carriers[i].grad = torch.zeros_like(carriers[i])
                else:
                    fill(i)
        divisor = torch.tensor(self.count, dtype=torch.float64, device=self.device)
        if scale is not None:
            divisor *= scale
        for bucket in _buckets(_dense(carriers[i].grad) for i in wanted):
            # a gradient on the host, of exact mode, passes through the device
            parts = [gradient.reshape(-1).to(self.device) for gradient in bucket]
            flat = parts[0] if len(parts) == 1 else torch.cat(parts)
            dist.all_reduce(flat.div_(divisor.to(flat.dtype)))
            self.reduced += flat.numel() * flat.element_size()
            parts = flat.split([gradient.numel() for gradient in bucket])
            for part, gradient in zip(parts, bucket, strict=True):
                gradient.copy_(part.view(gradient.shape))
        return None

    def norm(self, own: Tensor) -> Tensor:
        """Norm over all ranks of what has the norm `own` here."""
        if self.shards == 1:
            return own
        square = own.to(self.device).double() ** 2
        dist.all_reduce(square, group=self._group)
        return square.sqrt().to(own.dtype)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self.count == 1:
            return flag
        told = torch.tensor(flag, dtype=torch.int32, device=self.device)
        dist.all_reduce(told)
        return bool(told)

    # -- agreement ------------------------------------------------------------------------------

    def compare(self, weights: Iterable[Tensor], step: int | None = None) -> None:
        """Raise DriftError unless `weights` are the same to the bit on all ranks, after `step`.

        Sharded ones are different parts, which cannot part.
        """
        tensors = [weight.detach() for weight in weights]
        if self.count == 1 or self.sharded or not tensors:
            return
        marks = precision.fingerprints(tensors)
        mark = precision.fingerprint(torch.stack([m.to(self.device) for m in marks]))
        found = [torch.empty_like(mark) for _ in range(self.count)]
        dist.all_gather(found, mark)
        all_marks = torch.stack(found).tolist()
        if parted := [rank for rank, theirs in enumerate(all_marks) if theirs != all_marks[0]]:
            when = "at first: load the same ones, or seed all ranks alike before the model is built"
            if step is not None:
                when = f"after step {step}: go on from the last checkpoint"
            raise DriftError(
                f"ranks {', '.join(map(str, parted))} of {self.count} have other weights than rank "
                f"0 {when}"
            )

    def check_count(self) -> None:
        """Raise UnsupportedError if the process group has another size than at the beginning."""
        if (now := world_size()) != self.count:
            raise UnsupportedError(
                f"the process group has {now} ranks, {self.count} when the optimizer was built; "
                f"build it after torch.distributed.init_process_group"
            )

    def guard(self, model: nn.Module) -> None:
        """From now on `model` refuses to run inside DDP, which it does not see otherwise."""
        self.release()
        if self.count > 1:
            self._guard = model.register_forward_pre_hook(refuse_ddp)

    def release(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None


def refuse_wrapped(model: nn.Module) -> None:
    """Raise UnsupportedError if `model` is in a wrapper that reduces gradients of its own."""
    for module in model.modules():
        if (name := type(module).__name__) in WRAPPERS:
            raise UnsupportedError(f"{name} knows only what is trainable when it is built; {CURE}")


def refuse_ddp(model: nn.Module, _: Any) -> None:
    """A forward pre-hook: accelerate puts DDP around the model after the optimizer is built."""
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise UnsupportedError(
            f"{type(model).__name__} runs inside DistributedDataParallel, which knows only what "
            f"was trainable when it was built; {CURE}"
        )


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights that no backward pass has, as after an evaluation."""
    for module in _sharded_modules(model):
        module.reshard()


def show_dtypes(model: nn.Module) -> None:
    """Let FSDP look at the weights' dtypes while all of them are trainable.

    It looks once, before the first forward pass, and only at those that are trainable then: in a
    layer that was frozen it would give fp32 weights gradients in bf16.
    """
    for module in _sharded_modules(model):  # a root comes first, and makes the others its own
        module._get_fsdp_state()._lazy_init()


def _sharded_modules(model: nn.Module) -> list[Any]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # its import takes a while
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def _mesh_of(name: str, weight: Any) -> tuple[int, int, Any]:
    """This rank's place among those that share `weight`, their number, and their group."""
    cut = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    one = weight.placements[cut[0]] if len(cut) == 1 else None
    if type(one).__name__ != "Shard" or getattr(one, "dim", None) != 0:
        raise UnsupportedError(
            f"{name} is placed {weight.placements}: chunks are rows, so shard it along axis 0, by "
            f"fully_shard on a mesh of one dimension or of (replicate, shard)"
        )
    mesh = weight.device_mesh
    return mesh.get_local_rank(cut[0]), mesh.size(cut[0]), mesh.get_group(cut[0])


def _dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    if gradient.is_sparse:
        raise UnsupportedError("sparse gradients are not averaged over ranks; use sparse=False")
    return gradient


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype that make `BUCKET` bytes together."""
    found: list[Tensor] = []
    size = 0
    for gradient in gradients:
        own = gradient.numel() * gradient.element_size()
        if found and (size + own > BUCKET or found[0].dtype != gradient.dtype):
            yield found
            found, size = [], 0
        found.append(gradient)
        size += own
    if found:
        yield found
