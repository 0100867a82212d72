"""Packed rows without a mask: the same numbers as each record alone, on every kind of row."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from chunkft.data.packing import check_isolation, padding_free_batch
from chunkft.models import attention
from chunkft.models.attention import NAME
from tests.conftest import FAMILIES, tiny

attention.register()
LENGTHS = (5, 1, 9, 3)


def pair(family, **changes):
    """The same model on sdpa and on ours."""
    ours, _ = tiny(family, attn_implementation=NAME, **changes)
    stock, _ = tiny(family, attn_implementation="sdpa", **changes)
    assert ours.config._attn_implementation == NAME
    stock.load_state_dict(ours.state_dict())
    return stock.eval(), ours.eval()


def packed():
    torch.manual_seed(1)
    records = [torch.randint(96, (n,)).tolist() for n in LENGTHS]
    ids = [token for record in records for token in record]
    return records, padding_free_batch([{"input_ids": ids, "seq_lengths": list(LENGTHS)}])


ENDS = ("cu_seq_lens_q", "cu_seq_lens_k")
ROTARY = ("llama", "qwen3", "gemma", "moe")


@pytest.mark.parametrize(
    ("family", "drop"),
    [
        *itertools.product((*ROTARY, "gpt2"), [(), ENDS]),
        # rotations are relative, so that records may have any start; learned positions are not
        *itertools.product(ROTARY, [("position_ids",)]),
    ],
)
@pytest.mark.parametrize("use_cache", [False, True])
def test_each_record_is_as_if_alone(family, drop, use_cache):
    """Also under a cache, which makes transformers' own mask forget the records."""
    stock, ours = pair(family)
    records, batch = packed()
    batch = {key: value for key, value in batch.items() if key not in drop}
    found = ours(**batch, use_cache=use_cache).logits[0].split(LENGTHS)
    for record, logits in zip(records, found, strict=True):
        alone = stock(torch.tensor([record])).logits[0]
        assert (logits - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_gradients_are_those_of_sdpa_with_its_mask():
    stock, ours = pair("llama")
    _, batch = packed()
    grads = []
    for model in (stock.train(), ours.train()):
        labels = batch["input_ids"]
        model(**batch, labels=labels, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, wanted in grads[0].items():
        assert (grads[1][name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_no_tensor_of_tokens_times_tokens():
    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.numel())
            return made

    lengths, found = [16] * 32, {}
    ids = torch.randint(96, (512,)).tolist()
    batch = padding_free_batch([{"input_ids": ids, "seq_lengths": lengths}])
    for model in pair("llama"):
        with Sizes() as sizes, torch.no_grad():
            model(**batch, use_cache=False)
        found[model.config._attn_implementation] = sizes.largest
    assert found["sdpa"] >= 512 * 512 > found[NAME]


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bert"])
def test_rows_that_are_not_packed_are_sdpas_to_the_bit(family):
    stock, ours = pair(family)
    ids = torch.randint(96, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    for more in ({}, {"attention_mask": mask}, {"attention_mask": mask.flip(1)}):
        assert torch.equal(ours(ids, **more).logits, stock(ids, **more).logits)
    assert torch.equal(ours(ids[:1]).logits, stock(ids[:1]).logits)


def test_generation_is_sdpas():
    stock, ours = pair("llama")
    ids = torch.randint(96, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **settings), stock.generate(ids, **settings))


def test_a_sliding_window_still_slides():
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    _, batch = packed()
    found = []
    for name in ("sdpa", NAME):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name).eval()
        found.append(model(**batch, use_cache=False).logits)
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "moe"])
def test_isolation_is_proven(family):
    _, ours = pair(family)
    check_isolation(ours)


def test_a_saved_model_does_not_need_us(tmp_path):
    _, ours = pair("llama")
    ours.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert FAMILIES["llama"][1] in (tmp_path / "config.json").read_text()
