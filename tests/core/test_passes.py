"""A store with blocks: state visits in the step only, and nothing of the result changes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from chunkft import ChunkedOptimizer
from chunkft.core.partition import Slice, blocks
from chunkft.core.store import Store
from chunkft.errors import InputError, UnsupportedError
from tests.conftest import NAMES, loss_of, tiny, weights

AWAY = "block=50"


def start(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Any]:
    model, batch = tiny(name, 0)
    if dtype == torch.bfloat16 and "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return model.to(dtype), batch


def build(model: nn.Module, block: int | None, kind: Any = "host", **more: Any) -> ChunkedOptimizer:
    given_: dict[str, Any] = {"lr": 1e-2, "chunks": 3, "interval": 2, "max_grad_norm": 0.5}
    rule = more.pop("rule", optim.AdamW)
    return ChunkedOptimizer(model, rule, store=Store(kind, block=block), **given_ | more)


def run(model: nn.Module, optimizer: ChunkedOptimizer, batch: Any, steps: int) -> None:
    for _ in range(steps):
        loss_of(model, batch).backward()
        optimizer.step()


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize("layout, dtype", [("stream", torch.bfloat16), ("spread", torch.float32)])
@pytest.mark.parametrize("name", NAMES)
def test_to_the_bit(name: str, layout: str, dtype: torch.dtype) -> None:
    """Every family, clipped, over two cycles; with tied parameters, and some without gradient."""
    (model, batch), (twin, _) = start(name, dtype), start(name, dtype)
    one, other = build(model, None, layout=layout), build(twin, 300, layout=layout)
    for _ in range(13):
        run(model, one, batch, 1)
        run(twin, other, batch, 1)
        assert one.grad_norm == other.grad_norm
    assert_equal(weights(model), weights(twin))
    assert one.audit() == other.audit()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("moments", ["persist", "reset", "decay"])
@pytest.mark.parametrize("order", ["cyclic", "shuffled"])
def test_what_a_visit_does_to_moments(moments: str, order: str, fused: bool) -> None:
    (model, batch), (twin, _) = start("llama"), start("llama")
    more: dict[str, Any] = {"moments": moments, "order": order, "fused": fused}
    one, other = build(model, None, **more), build(twin, 300, **more)
    run(model, one, batch, 15)
    run(twin, other, batch, 15)
    assert_equal(weights(model), weights(twin))


@pytest.mark.parametrize("moments", ["persist", "reset", "decay"])
@pytest.mark.parametrize("steps, on_disk", [(7, True), (8, False)])  # in a visit, before one
@pytest.mark.parametrize("saved, loaded", [(300, 300), (300, None), (None, 300), (300, 70)])
def test_resume(
    tmp_path: Path,
    saved: int | None,
    loaded: int | None,
    steps: int,
    moments: str,
    on_disk: bool,
) -> None:
    """To the bit, with other blocks too; saving alters nothing."""
    model, batch = start("llama")
    kind = tmp_path if on_disk else "host"
    optimizer = build(model, saved, kind, moments=moments)
    run(model, optimizer, batch, steps)
    state = torch.load(_saved(optimizer.state_dict(), tmp_path), weights_only=True)
    twin, _ = start("llama")
    twin.load_state_dict(model.state_dict())
    resumed = build(twin, loaded, kind, moments=moments)
    resumed.load_state_dict(state)
    run(model, optimizer, batch, 6)
    run(twin, resumed, batch, 6)
    assert_equal(weights(model), weights(twin))
    assert optimizer.audit() == resumed.audit()


def _saved(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_parts_are_the_whole() -> None:
    model, batch = start("llama")
    optimizer = build(model, 300, moments="decay")
    run(model, optimizer, batch, 8)
    header, parts = optimizer.in_parts()
    entries = [(n, e["start"], e["values"]) for p in parts for n, found in p.items() for e in found]
    whole = optimizer.state_dict()
    assert header.keys() | {"state"} == whole.keys()
    assert_equal(
        {(name, start): values for name, start, values in entries},
        {(n, e["start"]): e["values"] for n, found in whole["state"].items() for e in found},
    )


def test_another_k() -> None:
    """State saved in blocks goes into chunks cut otherwise as unblocked state does."""
    model, batch = start("llama")
    found = []
    for block in (None, 300):
        optimizer = build(model, block)
        run(model, optimizer, batch, 7)
        twin, _ = start("llama")
        twin.load_state_dict(model.state_dict())
        resumed = build(twin, block, chunks=5)
        resumed.load_state_dict(optimizer.state_dict())
        run(twin, resumed, batch, 10)
        found.append(weights(twin))
        optimizer.detach()
        model, _ = start("llama")
    assert_equal(*found)


def test_detached_for_a_while() -> None:
    (model, batch), (twin, _) = start("llama"), start("llama")
    one, other = build(model, None, moments="decay"), build(twin, 300, moments="decay")
    run(model, one, batch, 8)  # a visit begins
    run(twin, other, batch, 8)
    for optimizer in (one, other):
        with optimizer.detached():
            pass
    run(model, one, batch, 5)
    run(twin, other, batch, 5)
    assert_equal(weights(model), weights(twin))


def test_device_holds_a_block() -> None:
    """The largest working set: the chunk's 16-bit gradient, and one block of all else."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))).bfloat16()
    sizes = {}
    for block in (None, 512):
        optimizer = build(model, block, chunks=2)
        for _ in range(8):
            model(torch.randn(3, 64).bfloat16()).square().mean().backward()
            optimizer.step()
        sizes[block] = optimizer.nbytes
        assert optimizer.holdings()["master"] == [] or not block
        optimizer.detach()
    chunk, size = 2 * 64 * 64, 512
    assert sizes[None]["gradient"] == 4 * chunk and sizes[None]["master"] == 4 * chunk
    assert sizes[512]["master"] == 4 * size and sizes[512]["state"] == 8 * size
    assert 2 * chunk < sizes[512]["gradient"] <= 2 * chunk + 4 * size
    assert sizes[512]["resting"] >= sizes[None]["resting"]  # the active chunk's too


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3), min_size=1, max_size=5),
    size=st.integers(1, 60),
    whole=st.booleans(),
    grain=st.sampled_from([1, 8]),
    data=st.data(),
)
def test_blocks_cover_the_chunk(
    shapes: list[list[int]], size: int, whole: bool, grain: int, data: st.DataObject
) -> None:
    named = {f"p{i}": tuple(shape) for i, shape in enumerate(shapes)}
    chunk = []
    for name, shape in named.items():
        rows = shape[0] if len(shape) > 1 else 1
        begin = data.draw(st.integers(0, rows - 1))
        end = data.draw(st.integers(begin + 1, rows))
        chunk.append(
            Slice(name, begin, end) if len(shape) > 1 else Slice(name, 0, *(shape or (1,)))
        )
    found = blocks(tuple(chunk), named, size, whole, grain)
    pieces = [piece for block in found for piece in block]
    joined: dict[str, list[Slice]] = {}
    for piece in pieces:
        assert piece.stop > piece.start
        joined.setdefault(piece.name, []).append(piece)
    for around in chunk:
        parts = joined[around.name]
        assert parts[0].start == around.start and parts[-1].stop == around.stop
        assert all(a.stop == b.start for a, b in pairwise(parts))
        assert len(parts) == 1 or not (whole or len(named[around.name]) < 2)
        for piece in parts[1:]:
            row = torch.Size(named[around.name][1:]).numel()
            assert (piece.start - around.start) * row % grain == 0
    for block in found:
        elements = sum(p.rows * torch.Size(named[p.name][1:]).numel() for p in block)
        assert elements <= size or len(block) == 1
    assert all(block[piece] in chunk for block in found for piece in block)


def test_what_has_no_meaning() -> None:
    model, _ = start("llama")
    with pytest.raises(InputError, match="block=0 must be at least 1"):
        Store("host", block=0)
    with pytest.raises(InputError, match=AWAY):
        build(model, 50, exact=True, interval=20)


def test_a_rule_that_counts_in_its_group_is_refused() -> None:
    class Counting(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
            return super().step(closure)

    model, batch = start("llama")
    optimizer = build(model, 300, rule=Counting)
    loss_of(model, batch).backward()
    with pytest.raises(UnsupportedError, match=r"'k' for all parameters.*without block="):
        optimizer.step()
