"""The tiled head: its gradient is right, whichever part of the head is active, and never dense."""

import copy
import inspect
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from chunkft import ChunkedOptimizer
from chunkft.models import losses
from chunkft.models.losses import (
    HeadLogProbs,
    HeadOutput,
    head_log_probs,
    install_head,
    is_plain_head,
)

VOCABULARY = 61


def model(tie=True, **more):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tie,
            **more,
        )
    )


def batch(ignored=5):
    ids = torch.randint(0, VOCABULARY, (3, 14), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("tile", [2, 4, 100])
@pytest.mark.parametrize("rows", [(3,), (2, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck_over_tiles_and_leaves(monkeypatch, tile, rows, temperature):
    monkeypatch.setattr(losses, "tile_rows", lambda vocabulary: tile)
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64)
    labels = torch.randint(0, 11, (7,))
    parts = list(weight[2 : 2 + sum(rows)].clone().split(rows))
    leaves = [part.requires_grad_() for part in parts]

    def log_probs(hidden, *leaves):
        whole = torch.cat([weight[:2], *leaves, weight[2 + sum(rows) :]])
        more = temperature != 1.0
        return HeadLogProbs.apply(hidden, whole.detach(), labels, 2, temperature, more, *leaves)[0]

    assert gradcheck(log_probs, (hidden, *leaves))


def test_values_are_those_of_log_softmax(monkeypatch):
    monkeypatch.setattr(losses, "tile_rows", lambda vocabulary: 3)
    head = torch.nn.Linear(8, VOCABULARY, bias=False)
    hidden, labels = torch.randn(10, 8), torch.randint(0, VOCABULARY, (10,))
    found, entropy, top1 = head_log_probs(hidden, head, labels)
    logits = head(hidden)
    reference = F.log_softmax(logits, -1)
    torch.testing.assert_close(found, reference.gather(-1, labels[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(reference.exp() * reference).sum(-1))
    assert torch.equal(top1, logits.argmax(-1) == labels)


def test_sums_over_the_vocabulary_are_in_32_bits_under_autocast():
    head = torch.nn.Linear(8, VOCABULARY, bias=False).bfloat16()
    hidden, labels = torch.randn(10, 8).bfloat16(), torch.randint(0, VOCABULARY, (10,))
    plain = head_log_probs(hidden, head, labels, more=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = head_log_probs(hidden, head, labels, more=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize("layout", ["stream", "spread"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_every_chunk_gets_the_gradient_of_stock_trl(layout, tie, temperature):
    """And all the numbers that DPO, GRPO and RLOO read beside the log-probabilities."""
    net = model(tie)
    optimizer = ChunkedOptimizer(net, torch.optim.SGD, lr=0.0, chunks=5, interval=1, layout=layout)
    extra = ("entropy", "mean_logits", "log_sum_sq_probs")
    add_fused_lm_head(net, temperature, outputs=("log_probs", "is_top1", *extra))
    for _ in range(5):
        found = []
        for ours in (False, True):
            undo = install_head(net, temperature, more=True) if ours else None
            out = net(**batch(), fused_lm_head=True)
            out.loss.backward()
            leaves = [p for g in optimizer.param_groups for p in g["params"]]
            found.append((out, [p.grad.clone() for p in leaves if p.grad is not None]))
            optimizer.zero_grad()
            if undo:
                undo()
        (stock, theirs), (tiled, ours) = found
        torch.testing.assert_close(tiled.loss, stock.loss)
        for name in extra:
            torch.testing.assert_close(getattr(tiled, name), getattr(stock, name))
        assert torch.equal(tiled.is_top1, stock.is_top1)
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        net(**batch(), fused_lm_head=True).loss.backward()
        optimizer.step()


def test_no_dense_gradient_of_the_head_is_made():
    net = model(tie=False)
    optimizer = ChunkedOptimizer(
        net, torch.optim.SGD, lr=0.0, chunks=4, interval=1, layout="spread"
    )
    dense: list[tuple[int, ...]] = []
    # the hook runs only when stock autograd delivers a gradient of the whole weight
    net.lm_head.weight.register_hook(lambda g: dense.append(tuple(g.shape)))
    add_fused_lm_head(net)
    install_head(net)
    net(**batch(), fused_lm_head=True).loss.backward()
    head = [x for x in optimizer.partition[0] if x.name == "lm_head.weight"]
    assert head
    assert not dense
    optimizer.step()


def test_a_batch_without_labels_has_loss_zero_and_a_graph():
    net = model()
    add_fused_lm_head(net)
    install_head(net)
    out = net(**batch(ignored=14), fused_lm_head=True)
    out.loss.backward()
    assert out.loss.item() == 0


@pytest.mark.parametrize(
    "setting", [{"logit_scale": 0.5}, {"final_logit_softcapping": 30.0}, {"logits_scaling": 8.0}]
)
def test_heads_that_do_more_keep_trls_own_path(setting):
    net = model()
    assert is_plain_head(net)
    for name, value in setting.items():
        setattr(net.config, name, value)
    assert not is_plain_head(net)


def test_a_head_with_bias_keeps_trls_own_path():
    net = model(tie=False)
    net.lm_head = torch.nn.Linear(16, VOCABULARY)
    assert not is_plain_head(net)


def test_undo_and_generation():
    net = model()
    add_fused_lm_head(net)
    theirs = net.forward
    undo = install_head(net)
    assert inspect.signature(net.forward) == inspect.signature(type(net).forward.__get__(net))
    out = net.generate(batch()["input_ids"], max_new_tokens=3, do_sample=False)
    assert out.shape == (3, 17)
    copy.deepcopy(net)
    undo()
    assert net.forward == theirs


def test_the_output_has_trls_fields() -> None:
    """TRL's trainers read them by name; a field that TRL adds must be seen here first."""
    theirs = {field.name for field in fields(FusedCausalLMOutput)}
    assert {field.name for field in fields(HeadOutput)} == theirs
