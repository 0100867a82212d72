"""A simulated rank takes what a real one does."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.ranks import simulate
from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.ranks import held
from chunkft.memory.meter import Meter
from chunkft.models.losses import install_head
from chunkft.recipes.trial import checkpoint_layers
from chunkft.train import sharding
from tests.ranks import on_ranks

CONFIG: dict[str, Any] = {"vocab_size": 4000, "hidden_size": 128, "intermediate_size": 320}
CONFIG |= {"num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": False}
SEQ, CHUNKS = 64, 4


def measured(rank: int, layout: str) -> tuple[int, int, int]:
    """Bytes at the peak of a real rank's step, of its share, and averaged in a step."""
    model: Any = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16).train()
    sharding.shard(model, torch.device("cpu"))
    checkpoint_layers(model)
    settings: dict[str, Any] = {"chunks": CHUNKS, "interval": 1, "layout": layout}
    optimizer = ChunkedOptimizer(model, torch.optim.AdamW, lr=1e-5, max_grad_norm=1.0, **settings)
    install_head(model)
    ids = torch.zeros(1, SEQ, dtype=torch.long)
    peak, averaged = 0, 0
    for step in range(3 * CHUNKS):
        before = optimizer.reduced_bytes
        meter = Meter(model, optimizer, CONFIG["vocab_size"])
        with meter:
            model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
            optimizer.step()
        if step >= CHUNKS:
            peak = max(peak, meter.measured().peak.total)
            averaged = max(averaged, optimizer.reduced_bytes - before)
    share = sum(held(p).numel() * p.element_size() for p in model.parameters())
    return peak, share, averaged


@pytest.mark.parametrize("layout", ["stream", "spread"])
def test_a_simulated_rank_takes_what_a_real_one_takes(layout: str) -> None:
    found, averaged = simulate(LlamaConfig(**CONFIG), 2, CHUNKS, layout, SEQ)
    copied = 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]  # gloo copies what it reduces
    for peak, share, sent in on_ranks(2, measured, layout):
        assert found.peak.peak.bytes["weights"] >= share
        assert found.peak.peak.total <= 1.01 * peak
        assert peak <= 1.01 * (found.peak.peak.total + copied)
        assert sent == averaged
