"""Chunk training against dense training, on eight families and on layers of every kind."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from chunkft import ChunkedOptimizer, Slice
from chunkft.core.partition import LAYOUTS
from chunkft.core.working_set import WorkingSet
from chunkft.errors import InputError
from tests.conftest import NAMES, loss_of, tiny, weights

STEP = 2**-6

families = pytest.mark.parametrize("name", NAMES)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


class Increment(torch.optim.Optimizer):
    """Adds STEP to every element that has a gradient: what it touched shows."""

    def __init__(self, params: list, lr: float = STEP):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(group["lr"])


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@families
def test_one_chunk_is_dense_adamw_bit_for_bit(name: str, max_grad_norm: float | None) -> None:
    ours, batch = tiny(name)
    dense, _ = tiny(name)
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    mine = ChunkedOptimizer(
        ours, torch.optim.AdamW, chunks=1, interval=2, max_grad_norm=max_grad_norm, **settings
    )
    stock = torch.optim.AdamW(dense.parameters(), **settings)
    for i in range(5):
        batch = {key: value.roll(i, 0) for key, value in batch.items()}
        losses = [loss_of(model, batch) for model in (ours, dense)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), max_grad_norm or 1e9)
        assert max_grad_norm is None or norm > max_grad_norm
        mine.step()
        stock.step()
        stock.zero_grad()
        assert mine.grad_norm == float(norm)
        for (key, p), q in zip(ours.named_parameters(), dense.parameters(), strict=True):
            assert torch.equal(p, q), f"{key} after step {i}"


def leaf_gradients(optimizer: ChunkedOptimizer) -> dict[Slice, Tensor]:
    """What the inner rule will see, by slice, through the public group dicts."""
    (group,) = optimizer.param_groups
    chunk = optimizer.partition[optimizer.active]
    return {s: p.grad for s, p in zip(chunk, group["params"], strict=True) if p.grad is not None}


def changed_rows(before: dict[str, Tensor], after: dict[str, Tensor]) -> Iterator[tuple[str, int]]:
    for name, old in before.items():
        different = (old != after[name]).reshape(len(old) if old.dim() else 1, -1).any(1)
        yield from ((name, int(row)) for row in different.nonzero())


def rows(tensor: Tensor | None, piece: Slice) -> Tensor:
    assert tensor is not None, piece
    tensor = tensor.to_dense()
    return tensor[piece.start : piece.stop] if tensor.dim() else tensor


def check_a_cycle(
    ours: nn.Module, dense: nn.Module, batch: dict[str, Tensor], loss: Loss, **settings: Any
) -> None:
    """SGD with lr 1, so that a step is minus the gradient; compare each chunk with dense."""
    optimizer = ChunkedOptimizer(ours, torch.optim.SGD, lr=1.0, interval=1, **settings)
    for k, chunk in enumerate(optimizer.partition):
        assert optimizer.active == k
        before = weights(ours)
        dense.load_state_dict(ours.state_dict())
        dense.zero_grad()
        loss(dense, batch).backward()
        loss(ours, batch).backward()
        assert all(p.grad is None for p in ours.parameters())
        found = leaf_gradients(optimizer)
        assert list(found) == list(chunk)
        wanted = {s: rows(dense.get_parameter(s.name).grad, s) for s in chunk}
        floor = 1e-4 * max(float(g.abs().max()) for g in wanted.values())
        for piece, gradient in found.items():
            # where the true gradient is zero (a key's bias) there is rounding to compare only
            scale = max(float(wanted[piece].abs().max()), floor)
            error = float((gradient.to_dense() - wanted[piece]).abs().max())
            assert error <= 1e-5 * scale, f"{piece}: {error:.1e} of {scale:.1e}"
        optimizer.step()
        check_the_step(before, weights(ours), found)
    optimizer.detach()


def check_the_step(
    before: dict[str, Tensor], after: dict[str, Tensor], gradients: dict[Slice, Tensor]
) -> None:
    """Active rows moved by minus their gradient; all others are the bits they were."""
    for piece, gradient in gradients.items():
        old, new = (rows(w[piece.name], piece) for w in (before, after))
        assert torch.equal(new, old - gradient), piece
    active = {(s.name, row) for s in gradients for row in range(s.start, s.stop)}
    assert set(changed_rows(before, after)) <= active


@layouts
@families
def test_every_chunk_has_the_rows_of_the_dense_gradient(name: str, layout: str) -> None:
    ours, batch = tiny(name)
    check_a_cycle(ours, tiny(name)[0], batch, loss_of, chunks=7, layout=layout)


def loss_that_reads_the_head(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The head's weight by attribute, as TRL's chunked loss does, and by its forward as well."""
    hidden = model.base_model(batch["input_ids"]).last_hidden_state
    logits = F.linear(hidden, model.lm_head.weight) + 0.5 * model.lm_head(hidden)
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


@layouts
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "moe"])
def test_a_loss_that_reads_the_head_weight_itself(name: str, layout: str) -> None:
    ours, batch = tiny(name)
    check_a_cycle(ours, tiny(name)[0], batch, loss_that_reads_the_head, chunks=7, layout=layout)


@layouts
@families
def test_a_cycle_updates_every_element_once(name: str, layout: str) -> None:
    model, batch = tiny(name)
    start = weights(model)
    optimizer = ChunkedOptimizer(model, Increment, chunks=7, interval=1, layout=layout)
    sizes = optimizer.partition.sizes()
    assert sum(sizes) == sum(p.numel() for p in start.values())
    assert max(sizes) <= 1.5 * min(sizes)
    for chunk in optimizer.partition:
        before = weights(model)
        loss_of(model, batch).backward()
        optimizer.step()
        after, expected = weights(model), before
        for piece in chunk:
            expected[piece.name][piece.start : piece.stop] += STEP
        assert all(torch.equal(after[key], expected[key]) for key in start)
    assert all(torch.equal(p, start[key] + STEP) for key, p in weights(model).items())
    audit = optimizer.audit()
    assert (audit.cycles, audit.waiting, audit.without_gradient) == (1, 0, ())
    assert set(audit.updates.values()) == {1}


# -- layers that no rule knows: the hook alone -----------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attention(nn.Module):
    """Never calls `out_proj.forward`: it reads the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Lookup(nn.Module):
    """Tables with a kernel of their own; one matrix used three ways, one padded."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 8, mode="mean")
        self.fair = nn.Embedding(9, 8, scale_grad_by_freq=True)
        self.sparse = nn.Embedding(9, 8, sparse=True)
        self.padded = nn.Embedding(9, 8, padding_idx=2)
        self.head = nn.Linear(8, 9)
        self.head.weight = self.padded.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = x.argsort(-1)
        y = self.bag(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]) + self.padded(ids).mean(-2)
        y = y + self.fair(ids).sum(-2) + self.sparse(ids).sum(-2) + x
        return self.head(y) @ self.padded.weight


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(1, 6, 3), nn.ConvTranspose2d(6, 4, 3)
        self.norm, self.group = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.bilinear = nn.Bilinear(4, 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.group(self.norm(self.up(self.conv(x[:, None]).tanh())))
        y = y.transpose(1, -1)
        return self.bilinear(y, y)


class Computed(nn.Module):
    """Weights that are functions of the parameters, bare parameters, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.table = nn.Parameter(torch.randn(5, 8))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.rms = nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.rms(self.normed(x)) + x @ self.table.T @ self.table


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) * batch["weight"]).tanh().sum()


@layouts
@pytest.mark.parametrize("kind", [Recurrent, Attention, Lookup, Images, Computed])
def test_layers_that_take_the_hook(kind: type[nn.Module], layout: str) -> None:
    ours, dense = kind(), kind()
    x = torch.randn(3, 5, 8)
    batch = {"x": x, "weight": torch.randn_like(dense(x).detach())}
    check_a_cycle(ours, dense, batch, squares, chunks=4, layout=layout)


@pytest.mark.parametrize("active", [[(0, 2), (2, 5)], [(0, 2), (5, 6)], [(3, 4)], [(0, 6)]])
def test_a_chunk_may_hold_several_slices_of_a_tensor(active: list[tuple[int, int]]) -> None:
    """As after loading a state of another K; the sliced rule takes them where they adjoin."""
    model, x = nn.Linear(4, 6), torch.randn(3, 4)
    model(x).pow(2).sum().backward()
    dense = model.weight.grad
    working_set = WorkingSet(model)
    working_set.attach(tuple(Slice("weight", *rows) for rows in active))
    model(x).pow(2).sum().backward()
    assert dense is not None and model.weight.grad is None and model.bias.grad is None
    found = {leaf.piece: gradient for leaf, gradient in working_set.gradients()}
    assert [(s.start, s.stop) for s in found] == active
    for piece, gradient in found.items():
        torch.testing.assert_close(gradient, rows(dense, piece))


# -- what is attached, and what a second try finds -------------------------------------------------


def stock(model: nn.Module) -> bool:
    """Nothing of ours on it, everything trainable."""
    return all(
        p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters()
    ) and (not any("forward" in module.__dict__ for module in model.modules()))


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": 1}, {"lr": -1.0}, {"lr": 1e-3, "chunks": 10**6}]
)
def test_a_constructor_that_fails_leaves_the_model_as_it_was(wrong: dict[str, Any]) -> None:
    """Or a second try would find the first chunk trainable, and nothing else."""
    model, _ = tiny("llama")
    settings: dict[str, Any] = {"chunks": 3} | wrong
    with pytest.raises((TypeError, ValueError)):
        ChunkedOptimizer(model, torch.optim.AdamW, **settings)
    assert stock(model)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_second_optimizer_is_refused_until_the_first_lets_go(chunks: int) -> None:
    model, _ = tiny("llama")
    first = ChunkedOptimizer(model, torch.optim.AdamW, chunks=chunks)
    with pytest.raises(InputError, match=r"belongs to a ChunkedOptimizer already.*detach\(\)"):
        ChunkedOptimizer(model, torch.optim.AdamW, chunks=3)
    first.detach()
    assert stock(model)
    second = ChunkedOptimizer(model, torch.optim.AdamW, chunks=3)
    assert second.partition.sizes() and sum(second.partition.sizes()) == 21664


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_empty_groups_stay(empty: int) -> None:
    """Trainer makes a group for what decays and one for what does not, also if it has nothing."""
    model, batch = tiny("llama")
    params = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": params[:5]}, {"params": params[5:], "lr": 0.5}]
    groups.insert(empty, {"params": [], "weight_decay": 0.0})
    optimizer = ChunkedOptimizer(
        model, torch.optim.SGD, groups=groups, lr=0.1, chunks=3, interval=1
    )
    identities = [id(group) for group in optimizer.param_groups]
    for _ in range(3):
        loss_of(model, batch).backward()
        optimizer.step()
        assert [id(group) for group in optimizer.param_groups] == identities
        assert optimizer.param_groups[empty]["params"] == []
    state = optimizer.state_dict()
    assert [len(group["params"]) for group in state["param_groups"]] == [
        len(g["params"]) for g in groups
    ]
    optimizer.load_state_dict(state)
