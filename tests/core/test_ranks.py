"""Several ranks train what one process trains; they stay the same, and reduce only the chunk."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.store import Store
from chunkft.errors import DriftError, UnsupportedError
from tests.conftest import assert_close, assert_same
from tests.ranks import Net, RankError, flat, full, on_ranks, rows, shard, train

optim = torch.optim
ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "adamw": (optim.AdamW, ADAM),
}
STEPS = 12


def build(kind: str, settings: dict[str, Any], again: bool = False) -> tuple[Net, ChunkedOptimizer]:
    settings = dict(settings)
    rule, kwargs = RULES[settings.pop("rule", "adamw")]
    model = Net(again=again)
    model.to(settings.pop("dtype", torch.float32))
    settings["store"] = Store("device", block=settings.pop("block", None))
    if settings.pop("frozen", False):  # as a LoRA's base is
        model.requires_grad_(False)
        for layer in model.layers:
            layer.get_submodule("up").requires_grad_(True)
    if kind == "fsdp":
        shard(model, **settings.pop("policy", {}))
    return model, ChunkedOptimizer(model, rule, **kwargs, **settings)


def run(rank: int, ranks: int, kind: str, settings: dict[str, Any], again: bool) -> Any:
    """One rank's run: losses, whole weights, norms, and the state that it would save."""
    model, optimizer = build(kind, settings, again)
    header = optimizer.state_dict()
    losses = train(model, optimizer, 0, STEPS, rank, ranks)
    optimizer.audit()
    return losses, full(model), optimizer.grad_norm, header


def alone(settings: dict[str, Any], again: bool, header: dict[str, Any]) -> Any:
    """The run of one process that has the chunks of `header`."""
    settings = {key: value for key, value in settings.items() if key != "policy"}
    model, optimizer = build("one", settings, again)
    optimizer.load_state_dict(header)
    losses = train(model, optimizer, 0, STEPS, 0, 1)
    return losses, full(model), optimizer.grad_norm


CHUNKS = {"chunks": 4, "interval": 2, "max_grad_norm": 0.5}
CASES = {
    "stream": CHUNKS,
    "spread": CHUNKS | {"layout": "spread", "interval": 1, "moments": "decay"},
    "sgd": CHUNKS | {"rule": "sgd"},
    "exact": {"chunks": 3, "exact": True, "max_grad_norm": 0.5},
    "frozen": {"chunks": 1, "interval": 1, "frozen": True, "max_grad_norm": 0.5},
    "blocks": CHUNKS | {"block": 40},
}


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_what_one_process_trains(ranks: int, kind: str, case: str, again: bool) -> None:
    settings = CASES[case]
    found = on_ranks(ranks, run, ranks, kind, settings, again)
    _, first, norm, header = found[0]
    for losses, weights, others, _ in found[1:]:
        assert_same(weights, first)  # to the bit
        assert others == norm
        assert len(losses) == STEPS
    losses, expected, alone_norm = alone(settings, again, header)
    # of the model's largest weight: a bias that was zero is a few of Adam's steps, no more
    assert_close(flat(first), flat(expected), 1e-6)
    mean = torch.tensor([rank[0] for rank in found]).mean(0)
    assert_close(mean, torch.tensor(losses), 1e-5)
    assert abs(norm - alone_norm) <= 1e-5 * alone_norm


# -- what is sent -------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Bytes of floating point numbers that collectives were given, by the collective's name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            given = args[1] if "reduce_scatter" in name else args[0]
            tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors if t.is_floating_point())
            self.bytes[name] = self.bytes.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def count_bytes(rank: int, ranks: int, kind: str, layout: str) -> Any:
    """Bytes by collective and by our own count, and those that are due by chunk."""
    model = Net(width=32)
    if kind == "fsdp":
        shard(model)
    optimizer = ChunkedOptimizer(model, optim.AdamW, chunks=4, interval=1, layout=layout, **ADAM)
    found: list[Any] = []
    for k in range(4):
        before = optimizer.reduced_bytes
        with Sent() as sent:
            loss = model(rows(k)[0][rank::ranks]).square().mean()
            loss.backward()
            optimizer.step()
        touched = {piece.name for piece in optimizer.partition[k]}
        whole = sum(4 * p.numel() for name, p in model.named_parameters() if name in touched)
        chunk = 4 * optimizer.partition.sizes()[k]
        found.append((sent.bytes, optimizer.reduced_bytes - before, chunk, whole))
    return found


@pytest.mark.parametrize("layout", ["stream", "spread"])
def test_data_parallel_reduces_the_chunk_and_nothing_else(layout: str) -> None:
    dense = sum(4 * p.numel() for p in Net(width=32).parameters())
    for found in on_ranks(2, count_bytes, 2, "ddp", layout):
        assert [sent["allreduce_"] for sent, *_ in found] == [chunk for *_, chunk, _ in found]
        assert [ours for _, ours, _, _ in found] == [chunk for *_, chunk, _ in found]
        assert sum(chunk for *_, chunk, _ in found) == dense  # 1/K a step
        assert not any("reduce_scatter" in name for sent, *_ in found for name in sent)


def test_fsdp_reduces_the_tensors_that_a_chunk_touches() -> None:
    dense = sum(4 * p.numel() for p in Net(width=32).parameters())
    largest = max(4 * p.numel() for p in Net(width=32).parameters())
    for found in on_ranks(2, count_bytes, 2, "fsdp", "stream"):
        for sent, ours, chunk, whole in found:
            assert sent["_reduce_scatter_base_"] == pytest.approx(whole, rel=0.02)  # padded rows
            assert ours == whole
            assert whole <= chunk + 2 * largest  # a chunk has two ends
        assert sum(whole for *_, whole in found) <= 1.75 * dense
    for found in on_ranks(2, count_bytes, 2, "fsdp", "spread"):
        assert all(whole >= 0.95 * dense for *_, whole in found)  # every tensor, in every step


# -- what must not happen -----------------------------------------------------------------------


def parted(rank: int, when: str) -> None:
    model = Net(seed=rank if when == "at first" else 0)
    optimizer = ChunkedOptimizer(model, optim.AdamW, chunks=4, interval=2, **ADAM)
    train(model, optimizer, 0, 3, rank, 2)
    if rank == 1:
        with torch.no_grad():
            model.get_parameter("layers.1.down.weight")[-1, -1] += 1e-6
    train(model, optimizer, 3, 9, rank, 2)


@pytest.mark.parametrize("when", ["at first", "later"])
def test_ranks_that_part_raise(when: str) -> None:
    with pytest.raises(RankError, match="ranks 1 of 2 have other weights than rank 0") as caught:
        on_ranks(2, parted, when)
    assert len(caught.value.errors) == 2
    assert all(isinstance(error, DriftError) for error in caught.value.errors.values())
    cure = "seed all ranks alike" if when == "at first" else "after step .: go on from the last"
    assert caught.match(cure)


def in_ddp(rank: int, exact: bool) -> None:
    model = Net()
    schedule = {"exact": True} if exact else {"interval": 1}
    optimizer = ChunkedOptimizer(model, optim.AdamW, chunks=2, **schedule, **ADAM)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(UnsupportedError, match=r"runs inside Distributed.*ChunkTrainer"):
        wrapped(rows(0)[0])
    with pytest.raises(UnsupportedError, match="knows only what is trainable"):
        ChunkedOptimizer(wrapped, optim.AdamW, chunks=2, **ADAM)
    optimizer.detach()
    wrapped(rows(0)[0])
    copy.deepcopy(model)


@pytest.mark.parametrize("exact", [False, True])
def test_a_wrapper_around_the_model_is_refused(exact: bool) -> None:
    on_ranks(2, in_ddp, exact)


class Two(nn.Module):
    """Each rank uses the branch of its number, as of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, branch: int) -> Tensor:
        return self.branches[branch](x)


def on_one_rank_only(rank: int, exact: bool) -> Any:
    model = Two()
    schedule = {"exact": True} if exact else {"interval": 1}
    optimizer = ChunkedOptimizer(model, optim.SGD, chunks=1, lr=1.0, **schedule)
    before = full(model)
    model(torch.ones(2, 4), rank).sum().backward()
    with pytest.warns(
        UserWarning, match="no gradient in a whole visit, so not trained: branches.2"
    ):
        optimizer.step()
    return before, full(model)


@pytest.mark.parametrize("exact", [False, True])
def test_a_gradient_on_one_rank_is_averaged_with_zeros(exact: bool) -> None:
    for before, after in on_ranks(2, on_one_rank_only, exact):
        for name, change in ((n, before[n] - after[n]) for n in before):
            used = not name.startswith("branches.2")
            # ones in two rows of one rank: the mean over ranks is half of two
            torch.testing.assert_close(change, torch.full_like(change, 1.0 if used else 0.0))


def overflow_on_one(rank: int) -> Any:
    """GradScalers whose scales part: rank 1 overflows, both skip, and later gradients agree."""
    model = nn.Linear(4, 3)
    nn.init.ones_(model.weight)
    optimizer = ChunkedOptimizer(model, optim.SGD, chunks=1, interval=1, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    found: list[Any] = []
    for step in range(3):
        x = torch.full((2, 4), 1.0 + rank)
        if rank == 1 and step == 1:
            x[0, 0] = torch.inf
        scaler.scale(model(x).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append((float(model.weight.detach()[0, 0]), scaler.get_scale()))
    return found


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    first, second = on_ranks(2, overflow_on_one)
    assert [weight for weight, _ in first] == [-0.5, -0.5, -2.0]  # mean of 2 * 1 and 2 * 2 is 3
    assert [weight for weight, _ in second] == [-0.5, -0.5, -2.0]
    assert (first[-1][1], second[-1][1]) == (16.0, 8.0)


# -- the ways to shard ---------------------------------------------------------------------------


def run_policy(rank: int, ranks: int, policy: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    policies: dict[str, dict[str, Any]] = {
        "kept": {"reshard_after_forward": False},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "mixed": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16)},
        "reduced in fp32": {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)},
    }
    if policy == "replicas":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        policies[policy] = {"mesh": mesh}
    dtype = torch.bfloat16 if policy == "reduced in fp32" else torch.float32
    model = shard(Net().to(dtype), **policies[policy])
    optimizer = ChunkedOptimizer(model, optim.AdamW, **CHUNKS, **ADAM)
    header = optimizer.state_dict()
    losses = train(model, optimizer, 0, 5, rank, ranks)
    with torch.no_grad():  # what an evaluation gathers stays there until the next backward
        model(rows(0)[0])
    losses += train(model, optimizer, 5, STEPS, rank, ranks)
    optimizer.audit()
    return losses, full(model), optimizer.grad_norm, header


@pytest.mark.parametrize("policy", ["kept", "offloaded", "mixed", "reduced in fp32", "replicas"])
def test_other_ways_to_shard(policy: str) -> None:
    ranks = 4 if policy == "replicas" else 2
    found = on_ranks(ranks, run_policy, ranks, policy)
    _, weights, norm, header = found[0]
    assert all(others == norm for _, _, others, _ in found)
    _, expected, own_norm = alone(CHUNKS, False, header)
    exact = policy not in ("mixed", "reduced in fp32")
    assert_close(flat(weights), flat(expected), 1e-6 if exact else 2e-2)
    assert abs(norm - own_norm) <= (1e-5 if exact else 0.1) * own_norm


class Uneven(nn.Module):
    """Five rows and one row on four ranks: some hold none of a tensor, one nothing of a chunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 5, bias=False)
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).tanh())


def run_uneven(rank: int, ranks: int, exact: bool) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = Uneven()
    if ranks > 1:
        fully_shard(model)
    settings = {"exact": True} if exact else {"interval": 1}
    optimizer = ChunkedOptimizer(
        model, optim.AdamW, chunks=2, max_grad_norm=0.1, **settings, **ADAM
    )
    header = optimizer.state_dict()
    for step in range(6):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(x[rank::ranks]).square().mean().backward()
        optimizer.step()
    optimizer.audit()
    return full(model), header, [len(chunk) for chunk in optimizer.own]


@pytest.mark.parametrize("exact", [False, True])
def test_a_rank_may_hold_no_row_of_a_chunk(exact: bool) -> None:
    found = on_ranks(4, run_uneven, 4, exact)
    assert any(0 in own for _, _, own in found)
    model = Uneven()
    settings = {"exact": True} if exact else {"interval": 1}
    optimizer = ChunkedOptimizer(
        model, optim.AdamW, chunks=2, max_grad_norm=0.1, **settings, **ADAM
    )
    optimizer.load_state_dict(found[0][1])
    for step in range(6):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
    for weights, _, _ in found:
        assert_close(flat(weights), flat(full(model)), 1e-6)


def refused(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    across = shard(Net(), shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else None)
    with pytest.raises(UnsupportedError, match=r"placed.*along axis 0"):
        ChunkedOptimizer(across, optim.AdamW, chunks=2, **ADAM)
    half = Net()
    fully_shard(half.layers[0])
    with pytest.raises(UnsupportedError, match=r"scale is not sharded, layers.0.norm.weight is"):
        ChunkedOptimizer(half, optim.AdamW, chunks=2, **ADAM)
    with pytest.raises(UnsupportedError, match="Adafactor is not elementwise"):
        ChunkedOptimizer(shard(Net()), optim.Adafactor, chunks=2, lr=1e-2, exact=True)
    model = shard(Net())
    optimizer = ChunkedOptimizer(model, optim.AdamW, chunks=2, **ADAM)
    model(rows(0)[0]).sum().backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)  # pyright: ignore
    with pytest.raises(UnsupportedError, match="train in bfloat16"):
        optimizer.step()


def test_what_cannot_be_trained_sharded_is_refused() -> None:
    on_ranks(2, refused)
