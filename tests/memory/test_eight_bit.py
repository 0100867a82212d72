"""Moments at rest in 8 bits: what is kept, what is lost, and that they still decay."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn, optim
from torch.testing._internal.two_tensor import TwoTensor

from chunkft.core import precision
from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.partition import Slice
from chunkft.core.store import ALIGN, Store
from chunkft.memory import eight_bit
from chunkft.memory.dry_run import dry_run, fake
from chunkft.memory.eight_bit import UNSIGNED, EightBitMoments, dynamic_map
from tests.conftest import loss_of, tiny
from tests.core.test_resume import assert_same, build, through_a_file, train
from tests.memory.test_dry_run import measure

CODEC = EightBitMoments()
PIECE = Slice("w", 0, 8)
M, V, STEP = (PIECE, "exp_avg"), (PIECE, "exp_avg_sq"), (PIECE, "step")


def through(value: Tensor, name: str = "exp_avg", step: float = 1.0) -> Tensor:
    """A moment that rested and woke."""
    state = {(PIECE, name): value, STEP: torch.tensor(step)}
    woke = CODEC.decode(CODEC.encode(state))
    assert list(woke) == list(state)
    return woke[PIECE, name]


def nearest(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.full_like(like, 0.5)


@pytest.fixture
def _small() -> Iterator[None]:
    """Slices of 64 elements and more are encoded."""
    with patch.object(eight_bit, "SMALLEST", 64):
        yield


@pytest.fixture
def _short_pieces() -> Iterator[None]:
    """Slices go through the codec in several pieces."""
    with patch.object(eight_bit, "PIECE", 512):
        yield


# -- one moment ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signed", "ends"),
    [(True, [-0.99296875, -5.5e-7, 5.5e-7, 1]), (False, [0, 3.25e-7, 0.996484375, 1])],
)
def test_the_map_has_256_levels(signed: bool, ends: list[float]) -> None:
    levels = dynamic_map(signed)
    assert len(set(levels)) == 256
    assert [levels[i] for i in ((0, 126, 128, 255) if signed else (0, 1, 254, 255))] == (
        pytest.approx(ends, rel=1e-6)
    )


@pytest.mark.slow  # some ten seconds to import
@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed)
    assert torch.allclose(torch.tensor(dynamic_map(signed)), theirs, rtol=1e-5, atol=0)


def values(name: str) -> dict[str, Tensor]:
    """Moments of many shapes and layouts."""
    spread = torch.randn(70_000) * torch.randn(70_000).mul(3).exp()
    found = {
        "blocks": spread[:8192],
        "a short block": spread[:5003].clone(),
        "a last block of one": spread[:4097],
        "matrix": spread[:66_000].view(66, 1000),
        "transposed": spread[:66_000].view(66, 1000).t(),
        "gaps": spread.view(700, 100)[:, ::2],
        "channels last": spread[:69_120].view(8, 12, 24, 30).to(memory_format=torch.channels_last),
        "one row": spread[:5000].view(1, 5000),
        "shifted": spread[3:5003],
    }
    return {k: v.square() if name in UNSIGNED else v for k, v in found.items()}


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_moment_wakes_on_a_neighbouring_level(name: str) -> None:
    levels = torch.tensor(dynamic_map(name == "exp_avg"))
    for case, value in values(name).items():
        before = value.clone()
        woke = through(value, name)
        assert torch.equal(value, before)
        assert (woke.shape, woke.dtype) == (value.shape, torch.float32), case
        if case != "gaps":
            assert woke.stride() == value.stride(), case
        flat, found = eight_bit._in_memory_order(value), eight_bit._in_memory_order(woke)
        for x, y in zip(flat.split(256), found.split(256), strict=True):
            scale = x[x.abs().argmax()]
            ratio, level = x / scale, y / scale
            at = torch.bucketize(ratio, levels, right=True).clamp(1, 255)
            below, above = levels[at - 1], levels[at]
            near = torch.minimum((level - below).abs(), (level - above).abs())
            assert float(near.max()) < 1e-6, case


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_what_has_rested_once_rests_as_it_is(name: str) -> None:
    """To the bit, whatever is drawn: saved states are decoded, and encoded again."""
    odd = torch.randn(8 * 4096)
    odd[:4096] = 0
    odd[4096:8192] *= 1e-42  # denormal
    odd[8192:12288] *= 1e-33
    odd[12288:16384] *= 1e30
    odd[16384:20480] = -odd[16384:20480].abs()
    odd[20480:24576] = torch.tensor([1.0, -1.0]).repeat(2048)
    odd[24576] = -0.0
    odd = odd.square() if name == "exp_avg_sq" else odd
    for value in [*values(name).values(), odd]:
        once = through(value, name)
        for step in range(2, 5):
            assert_bits(through(once, name, step), once)


def assert_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def test_zeros_and_denormals() -> None:
    value = torch.zeros(4096)
    assert_bits(through(value), value)
    assert_bits(through(value, "exp_avg_sq"), value)
    value[5], value[300] = -1e-40, -3.0
    assert through(value).nonzero().tolist() == [[300]]
    assert float(through(value)[300]) == -3.0
    value[300] = 3.0  # rounding may leave a second moment a hair below 0
    assert through(value, "exp_avg_sq").nonzero().tolist() == [[300]]


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_rounding_has_no_bias(name: str) -> None:
    value = torch.linspace(-0.99 if name == "exp_avg" else 1e-6, 0.99, 4096)
    value[::256] = 1.0  # levels are known then
    levels = torch.tensor(dynamic_map(name == "exp_avg"))
    at = torch.bucketize(value, levels).clamp(1, 255)
    gap = levels[at] - levels[at - 1]
    drawn = torch.stack([through(value, name, step) for step in range(400)])
    error = (drawn.mean(0) - value) / gap  # its deviation is 1 / 40 of a gap at most
    assert float(error.abs().max()) < 5 / 40
    assert abs(float(error.mean())) < 5 / 40 / 64
    assert float(((drawn - value) / gap).std()) > 0.2


def test_the_draw_is_of_the_slice_and_its_step() -> None:
    value = torch.randn(4096)
    assert torch.equal(through(value), through(value))
    assert not torch.equal(through(value), through(value, step=2))
    codec = EightBitMoments()
    other = codec.encode({(Slice("w", 8, 16), "exp_avg"): value, (Slice("w", 8, 16), "step"): 1})
    assert not torch.equal(codec.decode(other)[Slice("w", 8, 16), "exp_avg"], through(value))


def test_a_rule_without_a_step_count_draws_by_the_moment() -> None:
    """SGD's momentum, shrunk by 1 % a visit, beside one that stays."""
    codec, value = EightBitMoments(), torch.full((4096,), 0.5)
    key = (PIECE, "momentum_buffer")
    for _ in range(200):
        value[::256] = torch.rand(16) + 1
        value = codec.decode(codec.encode({key: value * 0.99}))[key]
    left = value.view(16, 256)[:, 1:].mean()
    assert float(left) == pytest.approx(0.5 * 0.99**200, rel=0.05)


def decayed(visits: int) -> float:
    """What is left of v's elements without gradient, beside one in each block that stays at 1."""
    codec, state = EightBitMoments(), {V: torch.full((4096,), 0.5), STEP: torch.tensor(0.0)}
    for _ in range(visits):
        state[V].mul_(0.999)[::256] = 1.0
        state[STEP] += 1
        state = codec.decode(codec.encode(state))
    return float(state[V].view(16, 256)[:, 1:].mean())


def test_v_decays_over_five_thousand_visits() -> None:
    assert decayed(5000) == pytest.approx(0.5 * 0.999**5000, rel=0.05)


def test_v_would_not_decay_with_rounding_to_the_nearest() -> None:
    with patch.object(eight_bit, "_uniform", nearest):
        assert decayed(1000) > 0.45


def test_a_second_moment_above_zero_never_rests_as_zero() -> None:
    value = torch.full((4096,), 1e-9)
    value[::256] = 1.0
    assert float(through(value, "exp_avg_sq").min()) > 0
    assert int((through(value) == 0).sum()) > 4000  # a first moment may


# -- what rests as what -------------------------------------------------------------------------


def test_what_is_no_moment_stays_as_it_is() -> None:
    large = torch.randn(4096)
    state = {
        (PIECE, "exp_avg"): torch.randn(4095),
        (PIECE, "max_exp_avg_sq"): large.bfloat16(),
        (PIECE, "ax"): large,  # ASGD's averaged weights
        (PIECE, "step_size"): large,
        (PIECE, "state1"): torch.zeros(4096, dtype=torch.uint8),
        **{(PIECE, key): large for key in precision.KEYS},
        STEP: torch.tensor(3.0),
        (PIECE, "n"): 4,
    }
    codec = EightBitMoments()
    with pytest.warns(UserWarning) as told:
        kept = codec.encode(state)
    assert list(kept) == list(state)
    assert all(kept[key] is value for key, value in state.items())
    assert [str(w.message).split("'")[1] for w in told] == ["ax", "step_size"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec.encode(state)  # a switch a step: once is enough


@pytest.mark.filterwarnings("ignore:EightBitMoments")
def test_moments_whose_meaning_is_open_stay_as_they_are() -> None:
    large = torch.rand(4096)
    for names in (["state1"], ["square_avg", "grad_avg", "momentum_buffer"]):
        state = {(PIECE, name): large for name in names}
        assert EightBitMoments().encode(state) == state
    both = {(PIECE, "state1"): large, (PIECE, "state2"): large}
    assert len(EightBitMoments().encode(both)) == 4


def test_tensor_subclasses_stay_as_they_are() -> None:
    """torchao's low-bit states look like fp32 too."""
    moment = TwoTensor(torch.randn(64, 256), torch.randn(64, 256))
    assert CODEC.encode({M: moment})[M] is moment


@pytest.mark.parametrize("kind", ["device", "host", "disk"])
def test_a_store_keeps_codes_and_scales(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path if kind == "disk" else kind, EightBitMoments())
    value = torch.randn(16, 1000)
    store.put("0", {M: value, STEP: torch.tensor(1.0)})
    assert store.nbytes == 16_000 + 4 * 63
    woke, seen = store.get("0", torch.device("cpu")), store.look("0")
    assert woke is not None and seen is not None
    assert torch.equal(woke[M], through(value)) and torch.equal(seen[M], woke[M])
    store.put("0", {M: value}, resting=False)
    raw = store.get("0", torch.device("cpu"))
    assert raw is not None and torch.equal(raw[M], value)


def test_resting_bytes_of_adamw() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))).bfloat16()
    for bits, each in ((32, 10.0), (8, 2 + 2 * (1 + 4 / 256))):
        codec = EightBitMoments() if bits == 8 else None
        optimizer = ChunkedOptimizer(
            model, optim.AdamW, lr=1e-3, chunks=4, interval=1, store=Store("host", codec)
        )
        for _ in range(4):
            model(torch.randn(8, 256).bfloat16()).square().mean().backward()
            optimizer.step()
        resting = optimizer.nbytes["resting"] / (3 * 256 * 256)
        assert resting == pytest.approx(each, abs=0.01)
        optimizer.detach()


@pytest.mark.usefixtures("_small", "_short_pieces")
@pytest.mark.parametrize("settings", [{"layout": "spread", "interval": 1}, {"exact": True}])
def test_the_dry_run_knows_what_rests(settings: dict[str, Any]) -> None:
    def made(model: nn.Module) -> ChunkedOptimizer:
        store = Store("host", EightBitMoments())
        return ChunkedOptimizer(model, optim.AdamW, lr=1e-3, chunks=3, store=store, **settings)

    model, batch = tiny("llama")
    real = measure(model, batch, made(model), 96)
    with fake():
        model, batch = tiny("llama")
        found = dry_run(model, made(model), lambda: loss_of(model, batch).backward(), range(3), 96)
    assert found.resting == pytest.approx(real.resting, rel=0.03)
    assert found.peak.peak.total == pytest.approx(real.peak.total, rel=0.02)
    # it takes one piece only: in a run each is gone before the next
    assert found.peak.highest["workspace"] == pytest.approx(real.highest["workspace"], rel=0.001)


# -- training -----------------------------------------------------------------------------------

RULES: dict[str, Any] = {
    "adamw": {},
    "amsgrad": {"amsgrad": True},
    "fused": {"fused": True},
    "sgd": {"rule": optim.SGD, "momentum": 0.9},
    "reset": {"moments": "reset"},
    "decay": {"moments": "decay"},
    "spread": {"layout": "spread", "interval": 1},
    "exact": {"exact": True},
    "disk": {"disk": True},
    "exact disk": {"disk": True, "exact": True},
    "exact sgd": {"exact": True, "rule": optim.SGD, "momentum": 0.9},
    "blocks": {"block": 300},
    "blocks reset": {"block": 300, "moments": "reset"},
    "blocks decay": {"block": 300, "moments": "decay"},
    "blocks sgd": {"block": 300, "moments": "decay", "rule": optim.SGD, "momentum": 0.9},
    "blocks spread disk": {
        **{"block": 300, "moments": "decay", "disk": True, "layout": "spread", "interval": 1}
    },
}


def fresh(folder: Path | None, init: int = 0, codec: bool = True, **settings: Any) -> Any:
    codec_ = EightBitMoments() if codec else None
    store = Store(folder or "host", codec_, settings.pop("block", None))
    if settings.get("exact"):
        settings["interval"] = 20
    return build(torch.bfloat16, init, store=store, **settings)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stop", [13, 15])
def test_resume_to_the_bit(stop: int, rule: str, tmp_path: Path) -> None:
    """Within a visit and at its end; to save, or to detach for a while, rounds nothing.

    A visit's state that has been decayed and not stepped yet lies between levels.
    """
    settings = dict(RULES[rule])
    folder = tmp_path if settings.pop("disk", False) else None
    whole, optimizer = fresh(folder, **settings)
    losses = train(whole, optimizer, 0, 20)
    plain, other = fresh(None, codec=False, **settings)
    # without blocks a state that is started anew at each visit never woke from 8 bits
    assert (train(plain, other, 0, 20) != losses) == (rule != "reset")
    model, first = fresh(folder, **settings)
    train(model, first, 0, stop)
    saved = through_a_file({"weights": model.state_dict(), "optimizer": first.state_dict()})
    resumed, second = fresh(folder, init=1, **settings)
    train(resumed, second, 0, 2)
    resumed.load_state_dict(saved["weights"])
    second.load_state_dict(saved["optimizer"])
    assert_same(second.state_dict(), saved["optimizer"])
    assert train(resumed, second, stop, 20) == losses[stop:]
    assert_same(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    again = train(model, first, stop, stop + 3)
    with first.detached():  # a visit begins here again, where it began at `stop`
        pass
    assert [*again, *train(model, first, stop + 3, 20)] == losses[stop:]


@pytest.mark.parametrize("block", [None, 8192])
@pytest.mark.parametrize("touch", ["save", "detach"])
def test_nothing_is_rounded_to_save_or_to_detach(touch: str, block: int | None) -> None:
    """Where a visit begins the moments have been decayed, and lie between levels by a hair."""

    def touched(how: str) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))).bfloat16()
        settings: dict[str, Any] = {"chunks": 2, "interval": 1, "moments": "decay"}
        store = Store("host", EightBitMoments(), block)
        optimizer = ChunkedOptimizer(model, optim.AdamW, lr=1e-3, store=store, **settings)
        for _ in range(6):
            model(torch.randn(8, 256).bfloat16()).square().mean().backward()
            optimizer.step()
            if how == "save":
                optimizer.state_dict()
            elif how == "detach":
                with optimizer.detached():
                    pass
        return optimizer.state_dict()

    assert_same(touched(touch), touched("nothing"))


class Watching(EightBitMoments):
    """Remembers how many elements each decoding and encoding had."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {"decode": [], "encode": []}

    def decode(self, state: dict[Any, Any]) -> dict[Any, Any]:
        awake = super().decode(state)
        self.seen["decode"].append(sum(v.numel() for k, v in awake.items() if k[1] == "exp_avg"))
        return awake

    def encode(self, state: dict[Any, Any]) -> dict[Any, Any]:
        self.seen["encode"].append(sum(v.numel() for k, v in state.items() if k[1] == "exp_avg"))
        return super().encode(state)


def test_a_step_decodes_one_block_at_a_time() -> None:
    """And between steps nothing is awake, the active chunk's state neither."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))).bfloat16()
    codec, chunk, size = Watching(), 2 * 256 * 256, 8192
    optimizer = ChunkedOptimizer(
        model, optim.AdamW, lr=1e-3, chunks=2, interval=2, store=Store("host", codec, size)
    )
    for _ in range(6):
        codec.seen["decode"], codec.seen["encode"] = [], []
        model(torch.randn(8, 256).bfloat16()).square().mean().backward()
        optimizer.step()
        # each block once; the first visit finds nothing to decode at its first step
        assert codec.seen["encode"] == [size] * (chunk // size)
        assert optimizer.holdings()["state"] == optimizer.holdings()["master"] == []
    assert codec.seen["decode"] == [size] * (chunk // size)
    assert optimizer.nbytes["state"] == 8 * size
    resting = optimizer.nbytes["resting"] / (2 * chunk)
    assert resting == pytest.approx(2 + 2 * (1 + 4 / 256), abs=0.01)


def test_a_slab_that_held_what_was_not_rounded_is_given_back(tmp_path: Path) -> None:
    """A checkpoint at a visit's beginning puts a chunk on disk as it is; it must not stay so."""
    store, value = Store(tmp_path, EightBitMoments()), torch.randn(64, 1024)
    state = {M: value, STEP: torch.tensor(1.0)}
    store.put("0", state)
    small = store._slabs["0"].size
    store.put("0", state, resting=False)
    assert 4 * value.numel() <= store._slabs["0"].size <= 4 * value.numel() + ALIGN
    store.put("0", state)
    assert store._slabs["0"].size == small
    woke = store.get("0", torch.device("cpu"))
    assert woke is not None and torch.equal(woke[M], through(value))


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("before", [True, False])
def test_a_run_goes_on_with_the_other_setting(before: bool) -> None:
    model, first = fresh(None, codec=before)
    train(model, first, 0, 14)
    saved = through_a_file(first.state_dict())
    _, second = fresh(None, codec=not before)
    second.load_state_dict(saved)
    for name, entries in second.state_dict()["state"].items():
        for entry, old in zip(entries, saved["state"][name], strict=True):
            for key, value in entry["values"].items():
                error = (torch.as_tensor(value) - old["values"][key]).double().norm()
                size = torch.as_tensor(old["values"][key]).double().norm()
                assert float(error) <= (0.0 if before else 0.05) * float(size), (name, key)
    sizes = [x.store.nbytes for x in (first, second)]
    assert (sizes[0] < 0.7 * sizes[1]) if before else (sizes[1] < 0.7 * sizes[0])


@pytest.mark.parametrize(
    "settings",
    [{"layout": "spread", "interval": 1, "moments": "decay"}, {"exact": True}],
    ids=["spread", "exact"],
)
def test_learns_as_with_32_bits(settings: dict[str, Any]) -> None:
    """A regression on a function of the input; losses of the last steps, over the first ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    y = torch.sin(x @ torch.randn(64, 64, generator=generator) / 4)
    left: dict[int, float] = {}
    for bits in (32, 8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).bfloat16()
        store = Store("host", EightBitMoments() if bits == 8 else None)
        optimizer = ChunkedOptimizer(
            model, optim.AdamW, lr=3e-3, chunks=2, betas=(0.9, 0.99), store=store, **settings
        )
        losses: list[float] = []
        for _ in range(150):
            loss = (model(x.bfloat16()).float() - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        left[bits] = sum(losses[-20:]) / 20 / losses[0]
        if bits == 8:
            assert optimizer.store.nbytes < 6 * 32_000
    assert left[32] < 0.2
    assert left[8] < 1.2 * left[32] + 0.01
