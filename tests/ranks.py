"""Functions run on several gloo ranks of this machine, which start once for all tests.

    def work(rank: int, width: int) -> float: ...      # at the head of a test module

    first, second = on_ranks(2, work, 16)              # what each rank returned

A process takes seconds to import torch, so it stays for the next function. After an error, and
after `SECONDS`, all are killed; the next call starts new ones.
"""

import atexit
import faulthandler
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chunkft.core.optimizer import ChunkedOptimizer

SECONDS = 120.0  # of one function; a rank that waits for another one waits half of that
_POOLS: dict[int, "_Pool"] = {}


class RankError(Exception):
    """A function raised on some ranks; `errors` has what it raised by rank."""

    def __init__(self, errors: dict[int, BaseException], told: str):
        super().__init__(told)
        self.errors = errors


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each of `count` ranks.

    Raises:
        RankError: it raised, or did not return in time.
    """
    for other in [n for n in _POOLS if n != count]:  # two cores
        _POOLS.pop(other).close()
    if count not in _POOLS:
        _POOLS[count] = _Pool(count)
    try:
        return _POOLS[count].run(function, args)
    except BaseException:
        _POOLS.pop(count).close()
        raise


class _Pool:
    def __init__(self, count: int):
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            meeting = str(Path(self.folder.name) / "meeting")
            # no daemon, for those may have no children; it ends when its pipe does
            process = context.Process(target=_serve, args=(rank, count, meeting, theirs))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        answers: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        told = list[str]()
        while len(answers) + len(errors) < len(self.pipes):
            waiting = [p for i, p in enumerate(self.pipes) if i not in answers and i not in errors]
            ready: Any = wait(waiting, SECONDS)
            if not ready:
                logs = [log.read_text() for log in Path(self.folder.name).glob("rank-*")]
                raise RankError(errors, "\n".join([f"no answer in {SECONDS:.0f} s", *told, *logs]))
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    answer, error, trace = pipe.recv()
                except EOFError:
                    answer, error, trace = None, RuntimeError("died"), "died"
                if error is None:
                    answers[rank] = answer
                else:
                    errors[rank] = error
                    told.append(f"rank {rank}: {trace}")
        if errors:
            raise RankError(errors, "\n".join(told))
        return [answers[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, count: int, meeting: str, pipe: Connection) -> None:
    from datetime import timedelta

    torch.set_num_threads(1)
    # as torchrun sets them
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine's name resolves to
    meetings = 0
    log = Path(meeting).with_name(f"rank-{rank}").open("w")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        torch.manual_seed(0)
        meetings += 1
        try:
            if not torch.distributed.is_initialized():  # Trainer's end is the group's end
                cards = torch.cuda.device_count() >= count
                torch.distributed.init_process_group(
                    "cpu:gloo,cuda:nccl" if cards else "gloo",
                    init_method=f"file://{meeting}-{meetings}",
                    rank=rank,
                    world_size=count,
                    timeout=timedelta(seconds=SECONDS / 2),
                )
            faulthandler.dump_traceback_later(0.4 * SECONDS, file=log)  # before it is killed
            answer: Any = (function(rank, *args), None, "")
        except Exception as error:
            answer = (None, error, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    """An embedding that is the head too, layers, and rows that no number of ranks divides."""

    def __init__(self, width: int = 12, again: bool = False, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(26, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(width, 26, bias=False)
        self.head.weight = self.embed.weight
        self.again = again

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
        return self.head(x) * self.scale.mean()


def rows(step: int) -> tuple[Tensor, Tensor]:
    """Eight records of a step: the same whoever asks."""
    source = torch.Generator().manual_seed(step)
    ids = torch.randint(26, (8, 5), generator=source)
    return ids, ids.roll(1, 1)


def train(
    model: nn.Module, optimizer: ChunkedOptimizer, first: int, last: int, rank: int, ranks: int
) -> list[float]:
    """Steps of two micro-batches each, of this rank's share of the records; mean losses."""
    losses: list[float] = []
    for step in range(first, last):
        ids, labels = (x[rank::ranks] for x in rows(step))
        total = 0.0
        for part, wanted in zip(ids.chunk(2), labels.chunk(2), strict=True):
            optimizer.train()
            loss = nn.functional.cross_entropy(model(part).flatten(0, 1), wanted.flatten()) / 2
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return losses


def shard(model: Net, **kwargs: Any) -> Net:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for layer in model.layers:
        fully_shard(layer, **kwargs)
    fully_shard(model, **kwargs)
    assert isinstance(model, FSDPModule)
    return model


def full(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name, whole."""
    found: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        whole: Any = weight.detach()
        found[name] = (whole.full_tensor() if hasattr(whole, "full_tensor") else whole).clone()
    return found


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


@atexit.register
def _close_all() -> None:
    while _POOLS:
        _POOLS.popitem()[1].close()
