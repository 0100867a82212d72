"""Small models of many families, and what most tests do with them.

`tiny("llama")` gives a seeded model of under 200k parameters, without dropout, and a batch with
labels. Everything else here is a line or two that several files need.
"""

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from chunkft.core.partition import Tensor as Shape

ROOM = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
DECODER = ROOM | {"vocab_size": 96, "intermediate_size": 48, "num_key_value_heads": 2}
QWEN = DECODER | {"head_dim": 8, "max_position_embeddings": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# name -> (config class, model class, settings); embeddings are tied where the family ties them
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER | {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", QWEN | {"tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", QWEN | {"tie_word_embeddings": True}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        ROOM | NO_DROPOUT | {"vocab_size": 96, "intermediate_size": 64},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0},
    ),
    "moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        QWEN | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        ROOM | NO_DROPOUT | {"intermediate_size": 64, "image_size": 16, "patch_size": 4},
    ),
}
NAMES = tuple(FAMILIES)


def tiny(name: str, seed: int = 0, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model of family `name` in training mode, and a batch that has every token in it."""
    import transformers

    config_class, model_class, settings = FAMILIES[name]
    config = getattr(transformers, config_class)(**settings | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).train()
    if name == "vit":
        images = torch.randn(3, 3, 16, 16)
        return model, {"pixel_values": images, "labels": torch.tensor([0, 1, 1])}
    ids = torch.randperm(96).reshape(4, 24)
    return model, {"input_ids": ids, "labels": ids.clone()}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter by name, tied ones once."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def dense_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stock autograd's gradient of every parameter; `model` has no optimizer attached."""
    model.zero_grad()
    loss_of(model, batch).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Largest difference below `relative` of the largest expected value."""
    assert actual.shape == expected.shape
    scale = expected.detach().abs().max().clamp_min(1e-30)
    error = float((actual - expected).detach().abs().max() / scale)
    assert error <= relative, f"off by {error:.2e} of the largest value, {relative:.0e} allowed"


def assert_same(a: Any, b: Any, laid_out: bool = False) -> None:
    """Equal to the bit, in whatever containers; with `laid_out` also types and strides."""
    assert not laid_out or type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), [b[key] for key in a]
    if isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, laid_out)
    elif isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)
        assert not laid_out or a.stride() == b.stride() or a.numel() < 2
    else:
        assert a == b


def llama_tensors(
    layers: int, hidden: int, key_value: int, inner: int, vocabulary: int
) -> list[Shape]:
    """The tensors of a Llama, at 14 bytes of training cost an element."""
    layer = {
        "q": (hidden, hidden),
        "k": (key_value, hidden),
        "v": (key_value, hidden),
        "o": (hidden, hidden),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "norm1": (hidden,),
        "norm2": (hidden,),
    }
    named = {"embed": (vocabulary, hidden)}
    named |= {f"{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    named |= {"norm": (hidden,), "head": (vocabulary, hidden)}
    return [Shape(name, shape, 14 * prod(shape)) for name, shape in named.items()]


class Ops(TorchDispatchMode):
    """What ran, and the most bytes that any of it made anew."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, value.numel() * value.element_size())
        return result


@pytest.fixture(autouse=True)
def _same_numbers_everywhere() -> None:
    torch.manual_seed(0)
