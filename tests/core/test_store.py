"""Where resting state lives changes nothing but where it lives."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.store import Slab, Store
from chunkft.core.working_set import Leaf
from chunkft.errors import ChunkFTError, InputError
from tests.conftest import assert_same, loss_of, tiny, weights

CPU = torch.device("cpu")
KINDS = ("device", "host", "disk")


def place(kind: str, folder: Path) -> str | Path:
    return folder if kind == "disk" else kind


def run(store: str | Path | Store, dtype: torch.dtype, steps: int = 13, **settings: Any) -> Any:
    """Three chunks, two steps a visit: two whole cycles and a step. Weights and the optimizer."""
    model, batch = tiny("llama")
    model.to(dtype)
    settings = {"lr": 1e-3, "chunks": 3, "interval": 2} | settings
    rule = settings.pop("rule", torch.optim.AdamW)
    optimizer = ChunkedOptimizer(model, rule, store=store, **settings)
    for _ in range(steps):
        loss_of(model, batch).backward()
        optimizer.step()
    return weights(model), optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_device_host_disk_agree_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    found = {kind: run(place(kind, tmp_path), dtype)[0] for kind in KINDS}
    start = weights(tiny("llama")[0].to(dtype))
    for name, value in found["device"].items():
        assert not torch.equal(value, start[name]), name
        assert torch.equal(value, found["host"][name]), name
        assert torch.equal(value, found["disk"][name]), name


@pytest.mark.parametrize("moments", ["reset", "decay"])
def test_moments_agree_across_stores(moments: str, tmp_path: Path) -> None:
    first, _ = run("device", torch.bfloat16, moments=moments)
    second, _ = run(tmp_path, torch.bfloat16, moments=moments)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saved_states_agree_across_stores(tmp_path: Path) -> None:
    states = [run(place(k, tmp_path), torch.bfloat16)[1].state_dict() for k in KINDS]
    for other in states[1:]:
        assert_same(states[0], other)


# -- transfers ----------------------------------------------------------------------------------


@contextmanager
def counted(*names: str) -> Iterator[list[str]]:
    """Calls of these methods of Slab, in order."""
    calls: list[str] = []

    def wrap(name: str) -> Any:
        original = getattr(Slab, name)

        def call(self: Slab, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(self, *args, **kwargs)

        return patch.object(Slab, name, call)

    patches = [wrap(name) for name in names]
    for p in patches:
        p.start()
    try:
        yield calls
    finally:
        for p in patches:
            p.stop()


def test_state_moves_at_switches_only(tmp_path: Path) -> None:
    """K=3, T=4: one slab is written at each switch and one read from the second cycle on."""
    model, batch = tiny("llama")
    optimizer = ChunkedOptimizer(
        model, torch.optim.AdamW, lr=1e-3, chunks=3, interval=4, store=tmp_path
    )
    with counted("write", "read") as calls:
        for step in range(1, 25):
            calls.clear()
            loss_of(model, batch).backward()
            optimizer.step()
            switch = step % 4 == 0
            revisit = step >= 12
            assert calls == switch * (["write"] + revisit * ["read"]), step


def test_one_chunk_never_moves(tmp_path: Path) -> None:
    with counted("write", "read") as calls:
        run(tmp_path, torch.bfloat16, chunks=1)
    assert not calls


# -- files --------------------------------------------------------------------------------------


def slabs(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_files_hold_the_resting_chunks_and_go_away(tmp_path: Path) -> None:
    _, optimizer = run(tmp_path, torch.float32)
    elements = sum(optimizer.partition.sizes())
    size = sum(path.stat().st_size for path in slabs(tmp_path))
    assert len(slabs(tmp_path)) == 3
    assert 8 * elements <= size < 8.5 * elements  # two fp32 moments, aligned
    optimizer.detach()
    del optimizer
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_two_runs_share_a_directory(tmp_path: Path) -> None:
    one, kept = run(tmp_path, torch.float32)
    two, also = run(tmp_path, torch.float32)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(slabs(tmp_path)) == 6
    del kept
    gc.collect()
    assert len(slabs(tmp_path)) == 3
    del also


def test_a_directory_is_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "b")
    store.put("0", {"m": torch.ones(3)})
    assert slabs(tmp_path / "a" / "b")


@pytest.mark.parametrize("where", ["file", "below a file", "no rights"])
def test_an_unwritable_directory_is_an_error(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    target = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x"}
    folder = target.get(where, Path("/proc/chunkft"))
    with pytest.raises(InputError, match="name a writable directory") as caught:
        Store(folder)
    assert str(folder) in str(caught.value)
    assert isinstance(caught.value, ChunkFTError | ValueError)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_unwritable_directory_leaves_the_model_stock() -> None:
    model, _ = tiny("llama")
    with pytest.raises(InputError):
        ChunkedOptimizer(model, torch.optim.AdamW, lr=1e-3, chunks=3, store="/proc/chunkft")
    assert all(p.requires_grad for p in model.parameters())


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of more than 16 KiB."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_an_error_and_no_death(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("0", {"m": torch.ones(4000)})
    with pytest.raises(InputError, match=r"GiB for one chunk: .*with room") as caught:
        store.put("1", {"m": torch.ones(5000)})
    assert str(tmp_path) in str(caught.value)
    state = store.get("0", CPU)
    assert state is not None
    assert int(state["m"].sum()) == 4000


# -- the store itself ---------------------------------------------------------------------------

STATE = {
    "float": torch.randn(7, 3),
    "byte": torch.arange(5, dtype=torch.uint8),
    "empty": torch.empty(0, dtype=torch.int64),
    "strided": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": torch.tensor(3.0),
    "number": 4,
    "none": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    store = Store(place(kind, tmp_path))
    for _ in range(3):
        store.put("7", dict(STATE))
        back = store.pop("7", CPU)
        assert back is not None
        assert_same(back, STATE)
        assert {k: v.stride() for k, v in back.items() if isinstance(v, Tensor)} == {
            k: v.stride() for k, v in STATE.items() if isinstance(v, Tensor)
        }
    assert store.get("8", CPU) is None


def test_what_came_from_disk_is_no_view_of_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("0", {"m": torch.ones(3)})
    first = store.get("0", CPU)
    assert first is not None
    first["m"].zero_()
    second = store.get("0", CPU)
    assert second is not None
    assert second["m"].tolist() == [1, 1, 1]


def test_a_state_that_grows_gets_a_larger_slab(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for size in (3, 300, 30):
        store.put("0", {"m": torch.full((size,), float(size))})
        state = store.get("0", CPU)
        assert state is not None
        assert state["m"].tolist() == [size] * size
    store.clear()
    assert not slabs(tmp_path)


class Halves:
    """A codec: fp32 rests as bf16."""

    def encode(self, state: dict[Any, Any]) -> dict[Any, Any]:
        return {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in state.items()}

    def decode(self, state: dict[Any, Any]) -> dict[Any, Any]:
        return {k: v.float() if isinstance(v, Tensor) else v for k, v in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_codec_works_on_the_way_in_and_out(kind: str, tmp_path: Path) -> None:
    store = Store(place(kind, tmp_path), codec=Halves())
    store.put("0", {"m": torch.tensor([1.0, 1.001]), "step": 3})
    state = store.get("0", CPU)
    assert state is not None
    assert state["m"].dtype == torch.float32
    assert state["m"].tolist() == [1.0, 1.0]
    assert store.nbytes == 4


def test_strided_weights_under_a_fused_rule(tmp_path: Path) -> None:
    """Fused kernels walk memory: state that came back with other strides would be another's."""
    found = [convolved(place(kind, tmp_path), fused) for kind in KINDS for fused in (True, False)]
    for weight in found[1:]:
        assert torch.allclose(weight, found[0], atol=1e-6)


def convolved(store: str | Path, fused: bool) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 3, 8, 8)
    optimizer = ChunkedOptimizer(
        model, torch.optim.AdamW, lr=1e-3, eps=1e-4, fused=fused, chunks=2, interval=1, store=store
    )
    for _ in range(8):
        model(x).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_cuda_state_is_read_only_when_it_is_written(kind: str, tmp_path: Path) -> None:
    """A checkpoint at a switch reads what the side stream is still copying."""
    store, large = Store(place(kind, tmp_path)), torch.randn(2**26, device="cuda")
    store.put("0", {"m": torch.zeros(2**26)})  # of the time before model.to("cuda")
    for i in range(3):
        store.put("0", {"m": large + i})
        state = store.get("0", CPU)
        assert state is not None
        assert torch.equal(state["m"], (large + i).cpu())
        store.prefetch("0", large.device)
        state = store.get("0", large.device)
        assert state is not None
        assert torch.equal(state["m"], large + i)


# -- tensor subclasses --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_subclasses_move_with_their_insides(kind: str, tmp_path: Path) -> None:
    low_bit = pytest.importorskip("torchao.optim.subclass_8bit", reason="torchao is optional")
    state = low_bit.OptimState8bit.zeros((4, 256), signed=True)
    state.copy_(torch.randn(4, 256))
    store = Store(place(kind, tmp_path))
    store.put("0", {"m": state})
    back = store.get("0", CPU)
    assert back is not None
    assert type(back["m"]) is type(state)
    assert torch.equal(back["m"].codes, state.codes)
    assert torch.equal(back["m"].dequantize(), state.dequantize())
    if kind == "disk":
        assert back["m"].codes.data_ptr() != state.codes.data_ptr()


# -- step counts of fused rules --------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_step_counts_go_where_the_rule_reads_them(fused: bool) -> None:
    """A checkpoint has them on the host, a fused kernel reads them on the weight's device."""
    model = torch.nn.Linear(2, 2)
    optimizer = ChunkedOptimizer(model, torch.optim.AdamW, lr=1e-3, fused=fused, chunks=1)
    (piece,) = [p for p in optimizer.partition[0] if p.name == "weight"]
    elsewhere = Leaf(piece, torch.empty(2, 2, device="meta"), first=0, whole=True)
    found = optimizer._rule._counting(elsewhere, {"step": torch.tensor(3.0), "m": torch.ones(2, 2)})
    assert found["step"].device.type == ("meta" if fused else "cpu")
    assert found["m"].device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_on_a_gpu_a_resumed_run_goes_on(fused: bool, exact: bool) -> None:
    """Through a checkpoint on the host, and through chunks that rested there, to the bit."""
    found: list[torch.Tensor] = []
    for stop in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).cuda()
        settings = {"exact": True} if exact else {"interval": 1}

        def build(model: torch.nn.Module = model, more: dict[str, Any] = settings) -> Any:
            rule = torch.optim.AdamW
            return ChunkedOptimizer(model, rule, lr=1e-2, fused=fused, chunks=3, **more)

        optimizer = build()
        for i in range(8):
            if stop and i == 4:
                saved = tree_map_only(
                    torch.Tensor, lambda x: x.cpu().clone(), optimizer.state_dict()
                )
                optimizer.detach()
                optimizer = build()
                optimizer.load_state_dict(saved)
            model(torch.ones(4, 64, device="cuda")).square().mean().backward()
            optimizer.step()
        resting = [value for state in optimizer.store._kept.values() for value in state.values()]
        assert all(not x.is_cuda for x in resting if isinstance(x, torch.Tensor))
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*found)


# -- room --------------------------------------------------------------------------------------


def test_a_few_exceptions_more_fit_where_the_state_lay(tmp_path: Path) -> None:
    """How many elements of a master are exceptions changes a little from visit to visit."""
    store = Store(tmp_path)
    state = {i: torch.ones(200) for i in range(20)}
    found: set[int] = set()
    for exceptions in (0, 3, 1, 5):
        store.put("0", {**state, "index": torch.ones(exceptions)})
        found.add(id(store._slabs["0"]))
        back = store.get("0", CPU)
        assert back is not None and len(back["index"]) == exceptions
    assert len(found) == 1
