"""The meter against bytes that can be counted by hand."""

import pytest
import torch
from torch import Tensor

from benchmarks import methods, peer_methods
from benchmarks.meter import GRAIN, Meter, PrivateMemory, working
from benchmarks.methods import Method
from tests.conftest import tiny

ROOM = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}


def model() -> tuple[torch.nn.Module, list[int]]:
    """In bf16, and the elements of each of its tensors."""
    made = tiny("llama", **ROOM)[0].bfloat16()
    return made, [p.numel() for p in made.parameters()]


def watched(method: Method, steps: int) -> Meter:
    meter, ids = Meter(method), torch.arange(32)[None]
    for _ in range(steps):
        meter.step({"input_ids": ids, "labels": ids})
    return meter


def test_dense() -> None:
    made, sizes = model()
    meter = watched(methods.dense(made, 1e-4), 2)
    expected = sum(sizes) * (4 + 4 + 8)
    assert meter.held == pytest.approx(expected, abs=GRAIN)
    assert working(meter.largest) == pytest.approx(expected, abs=4 * max(sizes) + GRAIN)
    assert meter.largest["master"] == 4 * sum(sizes)
    assert meter.resting == 0


@pytest.mark.parametrize("layout", ["stream", "spread"])
def test_one_chunk_of_eight(layout: str) -> None:
    made, sizes = model()
    settings = {"chunks": 8, "interval": 1, "layout": layout}
    meter = watched(methods.chunk(made, 1e-4, **settings), 10)
    assert meter.held == pytest.approx(sum(sizes) * 16 / 8, rel=0.02, abs=GRAIN)
    assert meter.resting == pytest.approx(sum(sizes) * 10 * 7 / 8, rel=0.02, abs=GRAIN)
    assert working(meter.largest) < 1.5 * meter.held


def test_exact_mode_keeps_whole_gradients_at_rest() -> None:
    made, sizes = model()
    meter = watched(methods.chunk(made, 1e-4, chunks=8, exact=True), 3)
    assert meter.held == pytest.approx(sum(sizes) * 16 / 8, rel=0.1, abs=GRAIN)
    assert meter.resting == pytest.approx(sum(sizes) * (10 + 2), rel=0.05)


def test_an_update_inside_backward() -> None:
    """As LOMO's: one gradient at a time, in fp32 beside its weight in fp32."""
    made, sizes = model()

    def move(p: Tensor) -> None:
        assert p.grad is not None
        gradient, p.grad = p.grad.float(), None
        wide = p.detach().float()
        p.data.copy_(wide.add_(gradient, alpha=-1e-3))

    for p in made.parameters():
        p.register_post_accumulate_grad_hook(move)
    nothing = torch.optim.SGD(made.parameters(), lr=0.0)
    method = Method(made, lambda: None, lambda _: None, lambda: methods.held_by(made, nothing))
    meter = watched(method, 2)
    assert working(meter.largest) == pytest.approx(8 * max(sizes), rel=0.1, abs=GRAIN)
    assert meter.largest["temporary"] > 0


@pytest.mark.slow  # only `make test-slow` installs the peers
@pytest.mark.parametrize("name", ["adamw_bf16", "adam_8bit", "badam", "galore", "lomo", "adalomo"])
def test_peers_move_their_weights(name: str) -> None:
    pytest.importorskip("badam")
    made, sizes = model()
    # a norm's weight of 1 may stay where it is: in bf16 small steps round away
    matrices = {n: p for n, p in made.named_parameters() if p.dim() > 1}
    before = {n: p.detach().clone() for n, p in matrices.items()}
    meter = watched(getattr(peer_methods, name)(made, 1e-2), 4)
    still = {n for n, p in matrices.items() if torch.equal(before[n], p)}
    untrained = {"model.embed_tokens.weight", "lm_head.weight"} if name == "badam" else set()
    assert still == untrained
    assert 0 < working(meter.largest) < 16 * sum(sizes)


def test_private_memory() -> None:
    with PrivateMemory() as memory:
        block = torch.ones(2**24)
    assert not memory.STATUS.exists() or memory.peak > block.nbytes
