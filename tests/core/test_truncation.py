"""Backward stops below the lowest active layer: no graph, no kept activations, no recomputation."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chunkft import ChunkedOptimizer
from chunkft.errors import LostGradientError, UnsupportedError
from tests.conftest import assert_close, dense_gradients, loss_of, tiny

LAYERS = 5


def llama() -> tuple[Any, dict[str, Tensor]]:
    return tiny("llama", num_hidden_layers=LAYERS)


def stream(model: nn.Module, chunks: int = 18, **settings: Any) -> ChunkedOptimizer:
    return ChunkedOptimizer(model, torch.optim.SGD, lr=0.1, chunks=chunks, interval=1, **settings)


def lowest(optimizer: ChunkedOptimizer) -> int:
    """Index of the lowest layer that backward must run through; LAYERS is the head alone."""
    names = [piece.name for piece in optimizer.partition[optimizer.active]]
    if any("embed" in name for name in names):
        return 0
    layers = [int(name.split("layers.")[1].split(".")[0]) for name in names if "layers." in name]
    return min(layers, default=LAYERS)


@dataclass
class Seen:
    """What happened in each layer."""

    forwards: Counter[int] = field(default_factory=Counter)
    backwards: set[int] = field(default_factory=set)
    bytes: Counter[int] = field(default_factory=Counter)


@contextmanager
def watching(model: Any) -> Iterator[Seen]:
    seen, inside, handles = Seen(), [LAYERS], []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def enter(i: int, *_: Any) -> None:
        seen.forwards[i] += 1
        inside[0] = i

    def leave(i: int, module: nn.Module, args: Any, output: Tensor) -> None:
        inside[0] = LAYERS
        if output.requires_grad:
            output.register_hook(lambda g: seen.backwards.add(i))

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen.bytes[inside[0]] += tensor.nbytes
        return tensor

    for i, layer in enumerate(model.model.layers):
        # a checkpoint recomputes the layer's class forward, which ends in its attention's
        handles.append(layer.self_attn.register_forward_pre_hook(partial(enter, i)))
        handles.append(layer.register_forward_hook(partial(leave, i)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield seen
    for handle in handles:
        handle.remove()


def check(seen: Seen, first: int, recomputed: bool = False) -> None:
    """Layers from `first` on took part in backward, those below in nothing but the forward."""
    above = set(range(first, LAYERS))
    assert seen.backwards == above
    expected = {i: 2 if recomputed and i in above else 1 for i in range(LAYERS)}
    assert dict(seen.forwards) == expected
    # a checkpoint keeps a layer's input in a closure, where no hook of ours sees it
    kept = {i for i in range(LAYERS) if seen.bytes[i]}
    assert kept == (set() if recomputed else above)


def test_the_watch_sees_dense_training() -> None:
    model, batch = llama()
    with watching(model) as seen:
        loss_of(model, batch).backward()
    check(seen, 0)
    model.activation_checkpointing_enable()
    with watching(model) as seen:
        loss_of(model, batch).backward()
    assert set(seen.forwards.values()) == {2}


def test_stream_stops_below_the_lowest_active_layer() -> None:
    model, batch = llama()
    optimizer = stream(model)
    stops, kept = [], dict[int, int]()
    for _ in optimizer.partition:
        stops.append(lowest(optimizer))
        with watching(model) as seen:
            loss = loss_of(model, batch)
            kept[stops[-1]] = max(sum(seen.bytes.values()), kept.get(stops[-1], 0))
            loss.backward()
        check(seen, stops[-1])
        optimizer.step()
    # each layer below the active ones takes its share away; the logits stay
    assert list(kept) == list(range(LAYERS + 1))
    assert all(a > b for a, b in pairwise(kept.values()))
    assert kept[LAYERS] < kept[0] / 3


def test_spread_moves_every_layer_in_every_step() -> None:
    model, batch = llama()
    optimizer = stream(model, chunks=3, layout="spread")
    for _ in optimizer.partition:
        with watching(model) as seen:
            loss_of(model, batch).backward()
        check(seen, 0)
        optimizer.step()


def twice(model: Any) -> None:
    """A user switches checkpointing on, then Trainer does: the first hooks are in no list."""
    model.enable_input_require_grads()
    model.enable_input_require_grads()


def inner(model: Any) -> None:
    model.model.enable_input_require_grads()


def once(model: Any) -> None:
    model.enable_input_require_grads()


def switch(model: Any) -> None:
    model.activation_checkpointing_enable()


@pytest.mark.parametrize("when", ["before", "after", "after and Trainer"])
@pytest.mark.parametrize("trap", [once, twice, inner, switch])
def test_inputs_that_require_grad_do_not_defeat_it(trap: Callable[[Any], None], when: str) -> None:
    """Trap T1. Trainer calls `optimizer.train()` before each forward; a plain loop `step()`."""
    model, batch = llama()
    if when == "before":
        trap(model)
    optimizer = stream(model)
    if when != "before":
        trap(model)
    if when == "after":
        loss_of(model, batch).backward()
        optimizer.step()
    else:
        optimizer.train()
    assert not model.__dict__.get("_require_grads_hooks")
    for _ in range(len(optimizer.partition) - 1):
        with watching(model) as seen:
            loss_of(model, batch).backward()
        check(seen, lowest(optimizer), recomputed=trap is switch)
        optimizer.step()


def test_checkpointing_changes_no_gradient() -> None:
    (model, batch), (plain, _) = llama(), llama()
    optimizer, reference = stream(model), stream(plain)
    model.activation_checkpointing_enable()
    optimizer.train()
    for _ in optimizer.partition:
        for m, o in ((model, optimizer), (plain, reference)):
            loss_of(m, batch).backward()
            o.step()
        assert optimizer.grad_norm == reference.grad_norm
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_under_trainer_with_checkpointing_on(tmp_path: Path) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, batch = llama()
    optimizer = stream(model)
    stops: list[int] = []
    watch: list[Any] = []

    class Check(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stops.append(lowest(optimizer))
            watch.append(watching(model))
            watch.append(watch[-1].__enter__())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch[-2].__exit__(None, None, None)
            check(watch[-1], stops[-1], recomputed=True)

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=len(optimizer.partition),
        per_device_train_batch_size=4,
        activation_checkpointing=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows: Any = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    Trainer(
        model,
        arguments,
        train_dataset=rows * 2,
        optimizers=(optimizer, None),
        callbacks=[Check()],
    ).train()
    assert optimizer.steps == len(stops) == len(optimizer.partition)
    assert set(stops) == set(range(LAYERS + 1))
    assert optimizer.audit().cycles == 1


# -- reentrant checkpointing loses gradients below a frozen input: it must not pass ----------------


def reentrant(model: Any) -> None:
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})


def test_the_reentrant_switch_of_transformers_raises() -> None:
    model, _ = llama()
    optimizer = stream(model)
    reentrant(model)
    with pytest.raises(UnsupportedError, match="'use_reentrant': False"):
        optimizer.train()
    with pytest.raises(UnsupportedError):
        optimizer.step()
    model, _ = llama()
    reentrant(model)
    with pytest.raises(UnsupportedError):
        stream(model)
    assert all(p.requires_grad for p in model.parameters())  # and the model is as it was


def by_hand(model: Any) -> None:
    """Plain torch checkpointing of every layer."""
    for layer in model.model.layers:
        stock = partial(type(layer).forward, layer)

        def forward(*args: Any, _stock: Any = stock, **kwargs: Any) -> Tensor:
            return checkpoint(partial(_stock, **kwargs), *args, use_reentrant=True)

        layer.forward = forward


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("chunks", range(1, 10))
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_plain_reentrant_checkpointing_raises_or_is_right(name: str, chunks: int) -> None:
    """Where the lowest segment's input has a gradient it works; elsewhere nothing may be lost.

    A backward without any gradient is torch's own error.
    """
    raised = 0
    for k in range(chunks):
        model, batch = tiny(name, use_cache=False)
        dense = dense_gradients(model, batch)
        optimizer = stream(model, chunks)
        optimizer.load_state_dict(optimizer.state_dict() | {"steps": k})
        by_hand(model)
        try:
            loss_of(model, batch).backward()
            gradients = [leaf.grad for leaf in optimizer.param_groups[0]["params"]]
            optimizer.step()
        except RuntimeError as e:  # LostGradientError is one
            assert isinstance(e, LostGradientError) or "does not require grad" in str(e)
            raised += 1
            continue
        for piece, gradient in zip(optimizer.partition[k], gradients, strict=True):
            assert gradient is not None
            assert_close(gradient, dense[piece.name][piece.start : piece.stop], 1e-5)
    assert bool(raised) == (chunks > 1)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_the_hook_alone_serves_is_named_when_it_is_lost() -> None:
    """Experts and norms have no forward of ours to notice it: the warning must say who."""
    model, batch = tiny("moe", use_cache=False)
    optimizer = stream(model, 3, order="reversed")
    by_hand(model)
    loss_of(model, batch).backward()
    with pytest.warns(UserWarning, match=r"no gradient in a whole visit.*layers\.1\.mlp\.experts"):
        optimizer.step()
