"""Ranks on CUDA, where FSDP works in streams of its own: `pytest -m gpu` runs them.

Each has a card, over NCCL. Where there is one only they share it, over gloo, where two with shards
ended without a word; so those are tested in one process too, the first of two, of which the other
one seems to send what this one does.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from chunkft import ChunkedOptimizer
from chunkft.core.store import Store
from chunkft.models.losses import install_head
from chunkft.recipes.trial import checkpoint_layers, simulated_ranks
from chunkft.train import sharding
from tests.conftest import assert_close, assert_same, tiny
from tests.ranks import flat, on_ranks

pytestmark = pytest.mark.gpu
RANKS, STEPS = 2, 12
ADAMW: dict[str, Any] = {"lr": 1e-3, "eps": 1e-4, "fused": True}
TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs a card a rank")
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}


class OwnShare(ReduceScatter):
    """What torch 2.13's fake group does; that of 2.11 leaves the result as it was."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        output_tensor.copy_(input_tensor.view(-1)[: output_tensor.numel()].view_as(output_tensor))


def run(rank: int, ranks: int, kind: str, settings: dict[str, Any], header: Any = None) -> Any:
    """`train` on a rank's card."""
    torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh("cuda", (ranks,)) if kind == "fsdp" else None
    return train(rank, ranks, "cuda", settings, mesh, header)


def train(
    rank: int, ranks: int, device: str, settings: dict[str, Any], mesh: Any, header: Any = None
) -> Any:
    """Whole weights after the steps, losses, and the state at the beginning."""
    torch.backends.cuda.matmul.allow_tf32 = False
    settings = dict(settings)
    settings["store"] = Store("host", block=settings.pop("block", None))
    settings.setdefault("max_grad_norm", 0.5)
    model, batch = tiny("llama", attn_implementation="sdpa", tie_word_embeddings=False, **WIDE)
    model.to(device)
    if mesh is not None:
        sharding.shard(model, torch.device(device), mesh)
        if dist.get_backend(mesh.get_group()) == "fake":
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_custom_reduce_scatter(OwnShare())
    checkpoint_layers(model)
    optimizer = ChunkedOptimizer(model, torch.optim.AdamW, **settings, **ADAMW)
    install_head(model)
    if header is not None:
        optimizer.load_state_dict(header)
    begun = optimizer.state_dict()
    mine = {name: values[rank::ranks].to(device) for name, values in batch.items()}
    losses: list[Tensor] = []
    for _ in range(STEPS):
        total = torch.zeros((), device=device)
        for half in range(2):
            part = {name: values[half::2] for name, values in mine.items()}
            loss = model(**part, fused_lm_head=True).loss / 2
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)  # nothing waits for the device within the steps
    optimizer.detach()
    return sharding.gathered(model), torch.stack(losses).cpu(), begun


WAYS: dict[str, dict[str, Any]] = {
    "stream": {"chunks": 4, "interval": 1, "layout": "stream"},
    "spread": {"chunks": 4, "interval": 2, "layout": "spread"},
    "blocks": {"chunks": 4, "interval": 1, "layout": "stream", "block": 4096},
    "exact": {"chunks": 4, "exact": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=TWO_CARDS)])
def test_ranks_on_cards_train_what_one_process_trains(kind: str, way: str) -> None:
    found = on_ranks(RANKS, run, RANKS, kind, WAYS[way])
    again = on_ranks(RANKS, run, RANKS, kind, WAYS[way])
    for weights, *_ in (*found, *again):
        assert_same(weights, found[0][0])  # to the bit, between ranks and between runs
    expected, losses, _ = run(0, 1, "one", WAYS[way], found[0][2])
    assert_close(flat(found[0][0]), flat(expected), 1e-5)
    assert_close(torch.stack([told for _, told, _ in found]).mean(0), losses, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_shards_train_on_a_card_as_on_a_cpu(way: str) -> None:
    found: dict[str, Any] = {}
    for name, device in (("cpu", "cpu"), ("cuda", "cuda"), ("again", "cuda")):
        with simulated_ranks(RANKS, device) as mesh:
            found[name] = train(0, RANKS, device, WAYS[way], mesh)
    assert_same(found["again"][:2], found["cuda"][:2])
    assert_close(flat(found["cuda"][0]), flat(found["cpu"][0]), 1e-4)
    assert_close(found["cuda"][1], found["cpu"][1], 1e-4)


def test_blocks_change_no_shard() -> None:
    found: list[Any] = []
    for way in ("stream", "blocks"):
        settings = WAYS[way] | {"max_grad_norm": None}  # norms are summed in another order
        with simulated_ranks(RANKS, "cuda") as mesh:
            found.append(train(0, RANKS, "cuda", settings, mesh)[0])
    assert_same(*found)
