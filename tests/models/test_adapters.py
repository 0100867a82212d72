"""Every adapter method on three architectures: trained, saved, read again, merged, switched off."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import MT5Config, MT5ForConditionalGeneration

from chunkft.errors import InputError
from chunkft.models import adapters
from chunkft.models.adapters import METHODS, attach, configure, parse_budget, size_for, trained
from tests.conftest import tiny

FAMILIES = ("llama", "gpt2", "t5")
LAYERS = [name for name, method in METHODS.items() if not method.is_virtual]
# PEFT has no Conv1D for these
MISSING = {(name, "gpt2") for name in ("oft", "boft", "miss")}
SMALL = {"oft": 4, "miss": 8, "ptuning": 16, "prefix": 3, "prompt": 3}
BOTH = [(m, f) for m in METHODS for f in FAMILIES if (m, f) not in MISSING]
LAYERED = [(m, f) for m, f in BOTH if m in LAYERS]


def adapted(method, family, dial=None, **more):
    """A trained adapter, its batch, and the base model's logits before it came."""
    model, batch = tiny(family)
    before = logits(model.eval(), batch)
    settings = {"total_step": 10, "tfinal": 2} if method == "adalora" else {}
    config = configure(method, model, dial or SMALL.get(method), more=settings | more)
    model = attach(model, config).train()
    # IA3 and VeRA move little at a rate for LoRA
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval(), batch, before


def logits(model, batch):
    """Without labels: PEFT's AdaLoRA, read again, takes none."""
    asked = {"input_ids": batch["input_ids"]}
    if model.config.is_encoder_decoder:
        asked["decoder_input_ids"] = batch["labels"]
    with torch.no_grad():
        return model(**asked).logits


@pytest.mark.parametrize(("method", "family"), BOTH)
def test_saved_and_read_again_it_says_the_same(method, family, tmp_path):
    model, batch, before = adapted(method, family)
    told = logits(model, batch)
    assert (told[:, -before.shape[1] :] - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = PeftModel.from_pretrained(tiny(family)[0], str(tmp_path)).eval()
    assert torch.equal(logits(again, batch), told)


@pytest.mark.parametrize(("method", "family"), LAYERED)
def test_merged_it_is_a_plain_model_that_says_the_same(method, family):
    model, batch, _ = adapted(method, family)
    told = logits(model, batch)
    plain = model.merge_and_unload()
    assert type(plain) is type(tiny(family)[0])
    assert (logits(plain, batch) - told).abs().max() <= 1e-5 * told.abs().max()


@pytest.mark.parametrize(("method", "family"), BOTH)
def test_switched_off_it_is_the_base(method, family):
    model, batch, before = adapted(method, family)
    with model.disable_adapter():
        off = logits(model, batch)
    # PiSSA takes the principal part out of the weights
    assert torch.equal(off, before) == (method != "pissa")


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"prefix", "prompt", "ptuning", "vera"}))
def test_before_training_it_changes_nothing(method):
    model, batch = tiny("llama")
    before = logits(model.eval(), batch)
    model = attach(model, configure(method, model, SMALL.get(method)))
    assert (logits(model.eval(), batch) - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize(("method", "family"), sorted(MISSING))
def test_what_peft_does_not_have_is_refused_by_name(method, family):
    model, _ = tiny(family)
    with pytest.raises(InputError, match=r"Config on GPT2LMHeadModel.*--lora_target_modules"):
        attach(model, configure(method, model, SMALL.get(method)))


def test_mt0_large():
    shape = MT5Config(
        vocab_size=250112, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16
    )
    with torch.device("meta"):
        model = MT5ForConditionalGeneration(shape)
    config = configure("lora", model, 8, ["q", "v"])
    assert config.task_type == "SEQ_2_SEQ_LM"
    assert trained(attach(model, config)) == 2_359_296


@pytest.mark.parametrize("method", sorted(m for m in METHODS if METHODS[m].dial))
@pytest.mark.parametrize("share", ["5%", "12%"])
def test_a_budget_is_met_by_the_closest_size(method, share):
    model, _ = tiny("llama", hidden_size=64, intermediate_size=96)
    budget = parse_budget(share, sum(p.numel() for p in model.parameters()))
    try:
        found = size_for(method, model, budget)
    except InputError as error:
        assert "the closest that" in str(error)  # and is it? judged below
        found = adapters.Sized(int(str(error).split("with ")[1].split(";")[0]), 0)
    counts = {}
    around = {1, 2, found.dial - 1, found.dial, found.dial + 1} - {0}
    for dial in (2, 4, 8, 16, 32) if METHODS[method].in_blocks else sorted(around):
        bare = tiny("llama", hidden_size=64, intermediate_size=96)[0]
        try:
            counts[dial] = trained(attach(bare, configure(method, bare, dial)))
        except InputError as error:
            assert "must be less than or equal to in_features (64)" in str(error)
            break
    assert abs(counts[found.dial] - budget) == min(abs(n - budget) for n in counts.values())
    assert found.count in (0, counts[found.dial])


def test_a_budget_that_cannot_be_is_told():
    model, _ = tiny("llama")
    with pytest.raises(InputError, match=r"ia3 always trains \d+ elements"):
        size_for("ia3", model, 1000)
    with pytest.raises(InputError, match="the closest that lora comes is"):
        size_for("lora", model, 10)
    for text in ("0.2", "-1%", "0%", "101%", "nonsense", ""):
        with pytest.raises(InputError, match="--trainable"):
            parse_budget(text, 1000)
    assert parse_budget("0.2%", 134_515_008) == 269_030
    assert parse_budget("500000", 134_515_008) == 500_000


def test_counts_are_not_trained():
    """PEFT's AdaLoRA divides by the number of ranks, and would train it beside 16-bit weights."""
    model, batch = tiny("llama")
    model = attach(model.bfloat16(), configure("adalora", model))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and not [name for name in names if "ranknum" in name]
    assert sum("lora_E" in name for name in names) == 14
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_settings_by_pefts_own_names():
    model, _ = tiny("llama")
    config = configure("lora", model, 4, ["q_proj"], {"lora_dropout": 0.1, "lora_alpha": 3})
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 3, 0.1)
    assert config.target_modules == {"q_proj"}
    with pytest.raises(InputError, match="no setting 'lora_drop'; did you mean lora_dropout"):
        configure("lora", model, more={"lora_drop": 0.1})
    with pytest.raises(InputError, match="unknown adapter 'lo'; one of lora, dora"):
        configure("lo", model)
    with pytest.raises(InputError, match="no target modules"):
        configure("prompt", model, targets=["q_proj"])
    with pytest.raises(InputError, match="size 0 must be at least 1"):
        configure("lora", model, 0)
    with pytest.raises(InputError, match="leave 3 out"):
        configure("ia3", model, 3)
    with pytest.raises(InputError, match="boft"):
        attach(model, configure("boft", model, 5))
