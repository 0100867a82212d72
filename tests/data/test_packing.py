"""Isolation is proven where it holds; where it does not, the cause is named."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chunkft.data.packing import check_isolation, padding_free_batch
from chunkft.errors import ContaminationError, InputError

VOCABULARY = 97


def tiny(config: PretrainedConfig, attention: str = "sdpa", dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def llama(attention: str = "sdpa", **changes: Any) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return tiny(config, attention, **changes)


def gpt2(attention: str = "sdpa") -> Any:
    return tiny(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        ),
        attention,
    )


def mixtral() -> Any:
    """Wide enough that in fp32 the experts' token counts show in the rounding."""
    return tiny(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def changed(**changes: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The right batch, with these keys replaced (a function of the batch) or removed (None)."""

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = padding_free_batch(examples)
        made = {key: change and change(batch) for key, change in changes.items()}
        return {key: value for key, value in (batch | made).items() if value is not None}

    return collate


def ones(batch: dict[str, Any]) -> torch.Tensor:
    return torch.ones_like(batch["input_ids"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model", [llama, gpt2])
def test_isolated_to_the_bit(model: Callable[..., Any], attention: str) -> None:
    found = check_isolation(model(attention))
    assert found.swap == 0.0
    assert found.alone < 1e-5


def test_isolated_in_bfloat16() -> None:
    found = check_isolation(llama(dtype=torch.bfloat16))
    assert found.swap == 0.0
    assert found.alone < found.tolerance


def test_trl_s_own_collator_is_what_the_default_imitates() -> None:
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    expected, ours = theirs(rows), padding_free_batch(rows)
    del expected["labels"]
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(value)), key
    assert check_isolation(llama(), collator=theirs).swap == 0.0
    padded = DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=16)
    assert check_isolation(llama(), collator=padded).swap == 0.0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("collator", "forward", "cause"),
    [
        (changed(attention_mask=ones), None, "attention_mask is present"),
        (padding_free_batch, {}, "use_cache is on"),
        (padding_free_batch, {"use_cache": True}, "use_cache is on"),
        (changed(position_ids=None), None, "no position_ids"),
    ],
    ids=["mask of ones", "default cache", "cache", "cu_seq_lens only"],
)
def test_each_trap_is_named(
    collator: Any, forward: dict[str, Any] | None, cause: str, attention: str
) -> None:
    with pytest.raises(ContaminationError, match=cause) as caught:
        check_isolation(llama(attention), collator=collator, forward=forward)
    assert "\n" not in str(caught.value)
    named = [
        c for c in ("attention_mask", "use_cache is", "no position_ids") if c in str(caught.value)
    ]
    assert len(named) == 1, "only the cause may be named"


def test_two_traps_at_once_are_both_named() -> None:
    with pytest.raises(ContaminationError, match=r"attention_mask is present.*use_cache is on"):
        check_isolation(llama(), collator=changed(attention_mask=ones), forward={})


def test_trl_s_collator_without_padding_free_is_refused() -> None:
    with pytest.raises(ContaminationError, match="attention_mask is present"):
        check_isolation(llama(), collator=DataCollatorForLanguageModeling(pad_token_id=0))


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2), "recurrent"),
        (BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    ],
    ids=["mamba", "bloom"],
)
def test_architectures_that_cannot_be_packed(config: PretrainedConfig, cause: str) -> None:
    with pytest.raises(ContaminationError, match=cause):
        check_isolation(tiny(config, "eager"))


def test_an_attention_that_ignores_position_ids_is_named() -> None:
    """Registered without a mask function, it is given no mask at all: plain causal attention."""

    def causal(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        eager = transformers.models.llama.modeling_llama.eager_attention_forward
        future = torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(1)
        return eager(module, q, k, v, future, scaling=kwargs["scaling"])

    transformers.AttentionInterface.register("causal_only", causal)
    model = llama()
    model.set_attn_implementation("causal_only")
    with pytest.raises(ContaminationError, match=r"'causal_only' ignores.*'sdpa'"):
        check_isolation(model)
    assert model.config._attn_implementation == "causal_only"


class Toy(nn.Module):
    """Mixes each token with the mean of those before it; `forward` is up to the test."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def logits(self, mixed: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(mixed))


class NoPositions(Toy):
    def forward(self, input_ids: torch.Tensor, use_cache: Any = None, **kwargs: Any) -> Any:
        return self.logits(self.table(input_ids).cumsum(1))


class ConstantPositions(Toy):
    """Isolated, but counts positions through the row."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        count = torch.arange(input_ids.shape[1])[None, :, None]
        return self.logits(self.table(input_ids) + count)


def test_a_model_without_position_ids_is_named() -> None:
    with pytest.raises(ContaminationError, match=r"NoPositions\.forward takes no position_ids"):
        check_isolation(NoPositions())


def test_positions_that_do_not_restart_are_named() -> None:
    with pytest.raises(ContaminationError, match="does not restart its positions"):
        check_isolation(ConstantPositions())


def test_what_cannot_be_shown_is_not_passed() -> None:
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(ContaminationError, match="cannot be shown"):
        check_isolation(model)
    nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(InputError, match="NaN or infinite"):
        check_isolation(model)


def test_experts_are_judged_by_the_gradient() -> None:
    """Their rounding moves with the neighbour, so bits alone would refuse them."""
    model = mixtral()
    found = check_isolation(model)
    assert 0.0 < found.swap < 1e-5
    assert not model.get_input_embeddings()._forward_hooks
    with pytest.raises(ContaminationError, match="use_cache is on"):
        check_isolation(mixtral(), forward={})


def test_the_gradient_sees_a_leak_below_rounding() -> None:
    class Whisper(Toy):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            x = self.table(input_ids)
            return self.logits(x + 1e-5 * x.cumsum(1))

    with pytest.raises(ContaminationError, match="see each other"):
        check_isolation(Whisper())


def test_nothing_of_the_caller_s_is_disturbed() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    check_isolation(model)
    with pytest.raises(ContaminationError):
        check_isolation(model, forward={})
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_dropout_does_not_hide_the_answer() -> None:
    model = llama().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert check_isolation(model).swap == 0.0
