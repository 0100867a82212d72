"""State in files, chunk by chunk, is the state itself: resumed runs keep their bits."""

from typing import Any

import pytest
import torch
from torch import nn, optim

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.errors import StateError
from chunkft.train import state_files
from tests.conftest import assert_same, weights
from tests.core.test_resume import Wide, build, step_wide, train


def saved(optimizer: ChunkedOptimizer, folder: Any) -> dict[str, Any]:
    state_files.save(optimizer, folder)
    return state_files.load(folder)


def assert_resumes(tmp_path: Any, stop: int, dtype: torch.dtype, **settings: Any) -> None:
    whole, optimizer = build(dtype, **settings)
    losses = train(whole, optimizer, 0, 30)
    model, first = build(dtype, **settings)
    train(model, first, 0, stop)
    state = saved(first, tmp_path / "state")
    assert_same(state, first.state_dict(), laid_out=True)
    resumed, second = build(dtype, init=1, **settings)
    train(resumed, second, 0, 2)
    resumed.load_state_dict(model.state_dict())
    second.load_state_dict(state)
    assert train(resumed, second, stop, 30) == losses[stop:]
    for (name, a), b in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize("stop", [0, 1, 12, 14, 15, 17])
def test_resume_to_the_bit(tmp_path: Any, stop: int, store: str, dtype: torch.dtype) -> None:
    """Fresh; in the first visit; at the border of a cycle; within a visit, at its border, after."""
    place = tmp_path / "store" if store == "disk" else store
    assert_resumes(tmp_path, stop, dtype, moments="decay", store=place)


@pytest.mark.parametrize(
    "settings",
    [
        {"layout": "spread", "order": "shuffled", "seed": 5},
        {"rule": optim.Adafactor},
        {"rule": optim.AdamW, "fused": True},
        {"rule": optim.SGD, "momentum": 0.9},
        {"master": "none"},
        {"exact": True, "interval": 20},
    ],
    ids=str,
)
def test_other_settings(tmp_path: Any, settings: dict[str, Any]) -> None:
    assert_resumes(tmp_path, 14, torch.bfloat16, **settings)


def test_many_parts_are_one_state(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "PART", 1)
    assert_resumes(tmp_path, 14, torch.bfloat16)
    model, optimizer = build(torch.bfloat16)
    train(model, optimizer, 0, 14)
    state_files.save(optimizer, tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.pt"))) > 5  # header, 4 chunks, one in slices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("old", "new"), [(4, 3), (2, 5)])
def test_another_number_of_chunks(tmp_path: Any, old: int, new: int, dtype: torch.dtype) -> None:
    model, first = build(dtype, chunks=old)
    train(model, first, 0, 14)
    state = saved(first, tmp_path / "state")
    found = []
    for source in (first.state_dict(), state):
        other, second = build(dtype, init=1, chunks=new, store=tmp_path / "store")
        other.load_state_dict(model.state_dict())
        second.load_state_dict(source)
        found.append(second.state_dict())
    assert_same(*found, laid_out=True)


def test_state_that_cannot_be_cut_is_refused_before_anything_changes(tmp_path: Any) -> None:
    model = Wide()
    first = ChunkedOptimizer(model, optim.Adafactor, lr=1e-2, chunks=4, interval=1)
    step_wide(model, first, 4)
    state = saved(first, tmp_path / "state")
    fresh = Wide()
    second = ChunkedOptimizer(fresh, optim.Adafactor, lr=1e-2, chunks=2, interval=1)
    step_wide(fresh, second, 2)
    before = saved(second, tmp_path / "before")
    with pytest.raises(StateError, match="not elementwise"):
        second.load_state_dict(state)
    assert_same(before, second.state_dict(), laid_out=True)


def test_a_loaded_state_outlives_its_files(tmp_path: Any) -> None:
    model, first = build(torch.bfloat16)
    train(model, first, 0, 14)
    wanted = saved(first, tmp_path / "state")
    for store in ("host", tmp_path / "store"):
        other, second = build(torch.bfloat16, store=store)
        other.load_state_dict(model.state_dict())
        second.load_state_dict(state_files.load(tmp_path / "state"))
        for path in (tmp_path / "state").glob("*.safetensors"):
            copy = path.read_bytes()
            path.write_bytes(b"\0" * len(copy))  # in place: a mapping would see it
            path.write_bytes(copy)
        assert_same(wanted, second.state_dict(), laid_out=True)


def test_tensors_come_back_as_they_lay(tmp_path: Any) -> None:
    values = {
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(5, 3).t(),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "float8": torch.randn(3).to(torch.float8_e4m3fn),
        "nothing": torch.empty(0, 3),
        "step": torch.tensor(3.0),
        "progress": 0.1,
        "none": None,
    }
    part = {"w": [{"start": 0, "stop": 2, "steps": 1, "updates": 1, "last": 0, "values": values}]}
    state_files._write(part, tmp_path / "part-00000.pt")
    assert_same(part, state_files._read(tmp_path / "part-00000.pt"), laid_out=True)


def test_the_8_bits_of_torchao(tmp_path: Any) -> None:
    low_bit = pytest.importorskip("torchao.optim.subclass_8bit", reason="torchao is optional")
    state = low_bit.OptimState8bit.zeros((16, 256), True, 256, "cpu")
    state.copy_(torch.randn(16, 256))
    entry = {"start": 0, "stop": 16, "steps": 1, "updates": 1, "last": 0}
    part = {"w": [{**entry, "values": {"exp_avg": state}}]}
    state_files._write(part, tmp_path / "part-00000.pt")
    found = state_files._read(tmp_path / "part-00000.pt")["w"][0]["values"]["exp_avg"]
    assert type(found) is type(state)
    assert torch.equal(found.dequantize(), state.dequantize())


def test_bitsandbytes(tmp_path: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 64))
    optimizer = ChunkedOptimizer(model, bnb.optim.AdamW8bit, lr=1e-3, chunks=2, interval=1)
    for _ in range(3):
        model(torch.randn(4, 128)).square().mean().backward()
        optimizer.step()
    assert_same(saved(optimizer, tmp_path / "state"), optimizer.state_dict(), laid_out=True)
