"""Weights written tensor by tensor are those that `save_pretrained` writes."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2Model,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

from chunkft.train import shards, weights
from tests.conftest import NAMES, ROOM, tiny

SMALL = ROOM | {"vocab_size": 96, "intermediate_size": 48, "num_key_value_heads": 2}


def mixtral(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


def dinov2() -> Any:
    """Its published checkpoints have two of its tensors as one."""
    config = Dinov2Config(**ROOM, image_size=16, patch_size=4, use_swiglu_ffn=True)
    return Dinov2Model(config)


def shared(model: Any) -> Any:
    """All weights views of one storage, as in a mapped file."""
    parameters = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    start = 0
    for parameter in parameters.values():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return model


@pytest.mark.parametrize("name", [*NAMES, "mixtral", "dinov2", "shared"])
def test_the_finished_model_is_what_save_pretrained_writes(tmp_path: Any, name: str) -> None:
    others = {"mixtral": mixtral, "dinov2": dinov2, "shared": lambda: shared(tiny("qwen3")[0])}
    model = others[name]() if name in others else tiny(name)[0]
    model.save_pretrained(tmp_path / "stock")
    weights.write(model, tmp_path, original=True)
    theirs = load_file(tmp_path / "stock" / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, ours[key]), key
        assert tensor.dtype == ours[key].dtype


def test_experts_are_converted_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, most = mixtral(), 0
    stock = weights.revert_weight_conversion

    def counted(model: Any, state: dict[str, Any]) -> dict[str, Any]:
        nonlocal most
        most = max(most, sum(not t.is_meta for t in state.values()))
        return stock(model, state)

    monkeypatch.setattr(weights, "revert_weight_conversion", counted)
    own = weights.of(model)
    found = weights._Original(model, own, own.__getitem__)
    for name in found.outline:
        found.read(name)
    assert most == 1


@pytest.mark.parametrize("size", [1, 30_000, 10**9])
def test_a_checkpoint_goes_on_from_any_number_of_shards(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """By the model's own names: by the original ones Trainer would leave out the experts."""
    monkeypatch.setattr(weights, "SHARD", size)
    model = mixtral()
    (tmp_path / "model-00001-of-00009.safetensors").write_text("of an earlier save")
    weights.write(model, tmp_path, original=False)
    model.config.save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (size < 10**9)
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == {"model.safetensors"} or files == set(
        json.loads(index.read_text())["weight_map"].values()
    )
    other = mixtral(seed=1)
    Trainer(model=other)._load_from_checkpoint(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for found in (other, loaded):
        for (name, a), b in zip(model.named_parameters(), found.parameters(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(7, 5),
        torch.randn(7, 5).t(),
        torch.randn(1, 300, 2).transpose(1, 2),
        torch.randn(600)[::2],
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(40, 3)[:, 1:],
        torch.tensor(2.0),
        torch.empty(0, 4),
    ],
    ids=lambda t: str(list(t.shape)),
)
def test_any_layout_through_a_small_buffer(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, tensor: torch.Tensor
) -> None:
    monkeypatch.setattr(shards, "BUFFER", 64)
    shards.write(
        tmp_path / "x.safetensors", {"byte": torch.ones(3, dtype=torch.uint8), "x": tensor}
    )
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    shards.write(path, {"x": torch.ones(3)})

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        shards.write(path, {"x": torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(load_file(path)["x"], torch.ones(3))
