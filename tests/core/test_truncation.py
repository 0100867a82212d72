"""Backward stops below the lowest active layer: no graph, no kept activations, no recomputation."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chunkft import ChunkedOptimizer
from chunkft.errors import LostGradientError, UnsupportedError
from tests.conftest import dense_gradients, loss_of, tiny

LAYERS = 5


def llama() -> tuple[Any, dict[str, Tensor]]:
    return tiny("llama", num_hidden_layers=LAYERS)


def stream(model: nn.Module, chunks: int = 9, **settings: Any) -> ChunkedOptimizer:
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
    kept = {i for i in range(LAYERS) if seen.bytes[i]}
    assert kept == above


def test_the_watch_sees_dense_training() -> None:
    model, batch = llama()
    with watching(model) as seen:
        loss_of(model, batch).backward()
    check(seen, 0)
    model.gradient_checkpointing_enable()
    with watching(model) as seen:
        loss_of(model, batch).backward()
    assert set(seen.forwards.values()) == {2}


def test_stream_stops_below_the_lowest_active_layer() -> None:
    model, batch = llama()
    optimizer = stream(model)
    stops, kept = [], []
    for _ in optimizer.partition:
        stops.append(lowest(optimizer))
        with watching(model) as seen:
            loss = loss_of(model, batch)
            kept.append(sum(seen.bytes.values()))
            loss.backward()
        check(seen, stops[-1])
        optimizer.step()
    assert set(stops) == set(range(LAYERS + 1))
    # the logits and the loss stay; each layer below the active ones takes its share away
    assert kept[-1] < kept[0] / 3
    assert all(a >= b for a, b in zip(kept, kept[1:], strict=False))


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
    model.gradient_checkpointing_enable()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
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
    for _ in range(len(optimizer.partition) - 1):
        with watching(model) as seen:
            loss_of(model, batch).backward()
        check(seen, lowest(optimizer), recomputed=trap is switch)
        optimizer.step()


def test_checkpointing_changes_no_gradient() -> None:
    (model, batch), (plain, _) = llama(), llama()
    optimizer, reference = stream(model), stream(plain)
    model.gradient_checkpointing_enable()
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
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    Trainer(
        model,
        arguments,
        train_dataset=rows * 2,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
        callbacks=[Check()],
    ).train()
    assert optimizer.steps == len(stops) == len(optimizer.partition)
    assert set(stops) == set(range(LAYERS + 1))
    assert optimizer.audit().cycles == 1


# -- reentrant checkpointing loses gradients below a frozen input: it must not pass ----------------


def reentrant(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
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
        model, batch = tiny(name)
        dense = dense_gradients(model, batch)
        optimizer = stream(model, chunks, order="cyclic" if k == 0 else "reversed")
        by_hand(model)
        if k:
            optimizer.load_state_dict(optimizer.state_dict() | {"steps": k - 1})
        leaves = dict(
            zip(optimizer.partition[optimizer.active], optimizer.param_groups[0]["params"])
        )
        try:
            loss_of(model, batch).backward()
            gradients = {piece: leaf.grad for piece, leaf in leaves.items()}
            optimizer.step()
        except (LostGradientError, RuntimeError) as e:
            assert "use_reentrant=False" in str(e) or "does not require grad" in str(e)
            raised += 1
            continue
        for piece, gradient in gradients.items():
            expected = dense[piece.name][piece.start : piece.stop]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert raised == 0 if chunks == 1 else raised
