"""On a CUDA device: where things rest changes no bit, exact mode is torch's AdamW."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chunkft import ChunkedOptimizer
from chunkft.core import precision
from chunkft.core.store import Store
from chunkft.memory.eight_bit import EightBitMoments
from chunkft.memory.streaming import stream_weights
from tests.conftest import assert_same, loss_of, tiny, weights

pytestmark = pytest.mark.gpu
ADAMW: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4, "fused": True}
STEPS = 9


def llama(dtype: torch.dtype) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    model, batch = tiny("llama", attn_implementation="eager")
    batch = {name: values.cuda() for name, values in batch.items()}
    halves = [{name: values[i::2] for name, values in batch.items()} for i in range(2)]
    return model.to(dtype).cuda(), halves


def trained(dtype: torch.dtype, store: Any, streamed: bool = False, **settings: Any) -> Any:
    """Weights after steps of two accumulated batches."""
    model, batches = llama(dtype)
    stream = stream_weights(model, device="cuda") if streamed else None
    rule = torch.optim.AdamW
    optimizer = ChunkedOptimizer(model, rule, chunks=3, store=store, **ADAMW, **settings)
    for _ in range(STEPS):
        for batch in batches:
            (loss_of(model, batch) / 2).backward()
        optimizer.step()
    optimizer.detach()
    if stream is not None:
        stream.detach()
    return {name: weight.cpu() for name, weight in weights(model).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("layout", ["stream", "spread"])
def test_where_state_rests_changes_nothing(
    layout: str, interval: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    settings = {"layout": layout, "interval": interval}
    expected = trained(dtype, "device", **settings)
    stores = ["host", tmp_path, Store("host", block=512), Store(tmp_path, block=512)]
    for store in stores:
        assert_same(trained(dtype, store, **settings), expected)
    for store in ("host", Store("host", block=512)):
        assert_same(trained(dtype, store, streamed=True, **settings), expected)


def test_eight_bit_moments_rest_alike_on_the_host_and_on_disk(tmp_path: Path) -> None:
    found: list[Any] = []
    for kind in ("host", tmp_path):
        torch.manual_seed(0)  # they round stochastically
        store = Store(kind, EightBitMoments())
        found.append(trained(torch.bfloat16, store, layout="spread", interval=1))
    assert_same(*found)


@pytest.mark.parametrize("streamed", [False, True])
def test_exact_is_torchs_adamw(streamed: bool, tmp_path: Path) -> None:
    model, batches = llama(torch.float32)
    dense = torch.optim.AdamW(model.parameters(), **ADAMW)
    for _ in range(STEPS):
        for batch in batches:
            (loss_of(model, batch) / 2).backward()
        dense.step()
        dense.zero_grad()
    expected = {name: weight.cpu() for name, weight in weights(model).items()}
    for store in ("host", tmp_path):
        assert_same(trained(torch.float32, store, streamed, exact=True), expected)


def test_masters_rest_and_wake_as_on_a_cpu() -> None:
    """To the bit, ties and a foreign write among them, also in more than one batch."""
    shapes = [(), (3,), (0,), (5, 256), (259,), (2**21 + 77,), (700, 300)]
    here = [torch.randn(shape) for shape in shapes]
    for master in here:
        master.view(-1)[::5] = 1.00390625
    there = [master.cuda() for master in here]
    found: list[Any] = []
    for masters in (here, there):
        rounded = [master.bfloat16() for master in masters]
        kept = precision.rest_all(masters, rounded)
        found.append(kept)
        assert_same(precision.wake_all(kept, rounded), masters)
        rounded[3][2, 7] = 4.0
        rounded[6][-1, -1] = 4.0
        expected = [
            w.float() if i in (3, 6) else m
            for i, (w, m) in enumerate(zip(rounded, masters, strict=True))
        ]
        assert_same(precision.wake_all(kept, rounded), expected)
        changed = precision.overwritten_all(rounded, masters, [False] * len(shapes))
        assert [i for i, foreign in enumerate(changed) if foreign] == [3, 6]
    assert_same([{k: v.cpu() for k, v in one.items()} for one in found[1]], found[0])
