"""Exact mode on the real model: clipped, accumulated AdamW with fp32 masters, to the bit."""

import pytest
import torch
from torch.optim import AdamW

from chunkft import ChunkedOptimizer
from chunkft.models.load import load_model
from tests.core.test_exact import Dense, equal


@pytest.mark.slow
@pytest.mark.parametrize("store", ["host", "disk"])
def test_twenty_steps_of_smollm2(store, tmp_path):
    models = [load_model("smollm2-135m")[0].train() for _ in range(2)]
    settings = {"lr": 1e-4, "weight_decay": 0.1, "max_grad_norm": 1.0, "fused": True}
    exact = ChunkedOptimizer(
        models[0],
        AdamW,
        chunks=16,
        exact=True,
        store=tmp_path if store == "disk" else store,
        **settings,
    )
    dense = Dense(models[1], AdamW, **settings)
    generator, clipped = torch.Generator().manual_seed(0), 0
    for step in range(20):
        for rows in (2, 1):  # accumulated over two micro-batches of different sizes
            ids = torch.randint(0, 49152, (rows, 48), generator=generator)
            for model in models:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        exact.step()
        dense.step()
        assert exact.grad_norm == float(dense.norm), f"step {step}"
        clipped += float(dense.norm) > 1.0
    assert clipped == 20
    assert equal(*models)
    assert set(exact.audit().updates.values()) == {20}
