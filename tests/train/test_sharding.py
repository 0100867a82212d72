"""Weights on their way to several ranks: how much memory that takes, and back to one file."""

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from chunkft import ChunkedOptimizer
from chunkft.core.ranks import is_sharded
from chunkft.errors import CheckpointError, UnsupportedError
from chunkft.models.losses import install_head
from chunkft.recipes.trial import checkpoint_layers
from chunkft.train import sharding
from tests.conftest import assert_close, assert_same
from tests.ranks import flat, full, on_ranks

LINUX = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="counts in /proc")

SMALL: dict[str, Any] = {"vocab_size": 33, "hidden_size": 16, "intermediate_size": 24}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def private() -> int:
    """Bytes of this process that it shares with nobody."""
    told = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(n) for n in re.findall(r"Private_\w+:\s+(\d+) kB", told)) * 1024


def load_in_another_dtype(rank: int, folder: str) -> tuple[int, int]:
    """Bytes that loading, sharding and casting took, and those of this rank's share."""
    # first what imports take
    sharding.shard(LlamaForCausalLM(LlamaConfig(**SMALL)), torch.device("cpu"))
    gc.collect()
    before = private()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    sharding.shard(model, torch.device("cpu"))
    sharding.cast(model, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    gc.collect()
    return private() - before, sharding.nbytes(model)


@LINUX
@pytest.mark.slow
def test_two_ranks_load_one_copy_in_another_dtype(tmp_path: Path) -> None:
    """400 MB in bf16, 800 MB in fp32: together the ranks take little more than that."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=11
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    found = on_ranks(2, load_in_another_dtype, str(tmp_path))
    target = sum(share for _, share in found)
    assert target > 2 * 400e6
    assert sum(taken for taken, _ in found) < 1.3 * target


def saved_and_loaded(rank: int, folder: str) -> bool:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL)
    model = LlamaForCausalLM(config)
    sharding.shard(model, torch.device("cpu"))
    sharding.save(model, Path(folder))
    kept = sharding.gathered(model)
    torch.manual_seed(1 + rank)
    other = LlamaForCausalLM(config)
    sharding.shard(other, torch.device("cpu"))
    sharding.load(other, Path(folder))
    found = sharding.gathered(other)
    with pytest.raises(UnsupportedError, match="quantized"):
        model.hf_quantizer = object()
        sharding.shard(model, torch.device("cpu"))
    wider = LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="of another model"):
        sharding.load(wider, Path(folder))
    return all(torch.equal(kept[name], found[name]) for name in kept)


def test_what_ranks_save_they_load(tmp_path: Path) -> None:
    assert on_ranks(2, saved_and_loaded, str(tmp_path)) == [True, True]


def steps_on_tiles(
    rank: int, ranks: int, again: bool, settings: dict[str, Any], chunks: Any = None
) -> Any:
    """Weights after steps through the tiled head, and the state that says which chunks there are.

    Args:
        chunks: such a state of another run, whose chunks are taken.
    """
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)).train()
    if ranks > 1:
        sharding.shard(model, torch.device("cpu"))
        assert isinstance(model.lm_head, FSDPModule)
        assert isinstance(model.model.embed_tokens, FSDPModule)
    if again:
        checkpoint_layers(model)
    adam: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4, "max_grad_norm": 0.5}
    optimizer = ChunkedOptimizer(model, torch.optim.AdamW, **adam, **settings)
    begin = optimizer.state_dict()
    if chunks is not None:
        optimizer.load_state_dict(chunks)
    install_head(model)
    for step in range(8):
        source = torch.Generator().manual_seed(step)
        ids = torch.randint(33, (4, 12), generator=source)[rank::ranks]
        model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
        optimizer.step()
        assert is_sharded(model.lm_head.weight) == (ranks > 1)
    optimizer.audit()
    return full(model), begin


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(
    "settings",
    [{"exact": True}, {"interval": 1}, {"interval": 1, "layout": "spread"}],
    ids=["exact", "stream", "spread"],
)
def test_a_head_is_gathered_for_the_loss_alone(settings: dict[str, Any], again: bool) -> None:
    settings = settings | {"chunks": 3}
    (first, begin), (second, _) = on_ranks(2, steps_on_tiles, 2, again, settings)
    assert_same(first, second)
    alone, _ = steps_on_tiles(0, 1, again, settings, begin)
    assert_close(flat(first), flat(alone), 1e-6)
