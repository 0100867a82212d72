"""Packing changes how records lie in a batch, and nothing else: the same trajectory to rounding.

The batches are TRL's own: its collator padding-free, as bfd packing trains, against padded; and
the loss goes through the tiled head that `chunkft sft` installs.
"""

import pytest
import torch
from torch import optim
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from chunkft import ChunkedOptimizer
from chunkft.models.losses import install_head
from tests.conftest import assert_close, tiny, weights

STEPS, ROWS = 12, 5
RULES = {
    "sgd": (optim.SGD, {"lr": 1e-2}),
    "adamw": (optim.AdamW, {"lr": 1e-3, "eps": 1e-4}),
}


def records():
    """STEPS lists of ROWS records of unequal length, the first half of each a prompt."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(STEPS):
        lengths = torch.randint(3, 20, (ROWS,), generator=generator).tolist()
        rows = [torch.randint(1, 96, (n,), generator=generator).tolist() for n in lengths]
        found.append(
            [
                {"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]}
                for row in rows
            ]
        )
    return found


def train(packed, rule, layout):
    """Losses, gradients of every step's leaves, and the weights at the end."""
    model, _ = tiny("llama")
    kind, settings = RULES[rule]
    optimizer = ChunkedOptimizer(model, kind, chunks=3, interval=2, layout=layout, **settings)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    install_head(model)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
    losses, gradients = [], []
    for rows in records():
        batch = collate(rows)
        assert ("attention_mask" in batch) is not packed
        assert batch["input_ids"].shape[0] == (1 if packed else ROWS)
        loss = model(**batch, use_cache=False, fused_lm_head=True).loss
        loss.backward()
        losses.append(loss.detach())
        leaves = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append([p.grad.clone() for p in leaves if p.grad is not None])
        optimizer.step()
    return losses, gradients, weights(model)


@pytest.mark.parametrize("layout", ["stream", "spread"])
@pytest.mark.parametrize("rule", RULES)
def test_packed_is_padded(rule, layout):
    padded, packed = train(False, rule, layout), train(True, rule, layout)
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(packed[1], padded[1], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, 1e-5)
    for name, weight in padded[2].items():
        torch.testing.assert_close(packed[2][name], weight, rtol=0, atol=1e-6)
