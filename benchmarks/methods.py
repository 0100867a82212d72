"""The methods that are compared, each as `step(batch) -> loss` on the same model, head and loss.

dense   torch AdamW (fused) over fp32 masters of bf16 weights: the usual mixed-precision recipe
lora    peft, r=16 on every linear layer, fp32 adapters, the same AdamW
chunk   ChunkedOptimizer over the same AdamW
"""

import os
import platform
import subprocess
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkft import ChunkedOptimizer
from chunkft.core.store import State, Store, nbytes
from chunkft.memory.eight_bit import EightBitMoments
from chunkft.models.load import load_model
from chunkft.models.losses import head_log_probs

Batch = dict[str, Tensor]
LORA_RANK = 16


Held = dict[str, Iterable[Any]]
"""Tensors (among other values) by kind: weights, gradient, master, state, adapter, resting (what
came to rest since the last look is enough)."""


@dataclass(eq=False)
class Method:
    """A way to train, ready to step."""

    model: Any
    update: Callable[[], None]
    """What follows backward: clip, step, free the gradients."""
    set_lr: Callable[[float], None]
    held: Callable[[], Held]
    """What it holds now. A tensor in two kinds belongs to the first."""
    backward: Callable[[Tensor], Any] = Tensor.backward
    resting: Callable[[], int] = lambda: 0
    """Bytes that lie on the host or on disk beside an accelerator."""

    def step(self, batch: Batch) -> float:
        loss = loss_of(self.model, batch)
        self.backward(loss)
        self.update()
        return loss.item()


def start(seed: int) -> Any:
    """The model that every method trains."""
    torch.manual_seed(seed)
    model, _ = load_model("smollm2-135m")
    return model.train()


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the labels (-100 = none), through the tiled head."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    mask = targets != -100
    log_probs, _, _ = head_log_probs(hidden[mask], causal.get_output_embeddings(), targets[mask])
    return -log_probs.mean()


def build(name: str, lr: float, seed: int = 0, **settings: Any) -> Method:
    """`dense` or `lora` with AdamW's settings, or `chunk` with ChunkedOptimizer's too."""
    model = start(seed)
    if name == "chunk":
        return chunk(model, lr, seed, **settings)
    return {"dense": dense, "lora": lora}[name](model, lr, **settings)


def chunk(model: Any, lr: float, seed: int = 0, **settings: Any) -> Method:
    """ChunkedOptimizer with `settings`, `state_bits` and the store's `block`."""
    codec = EightBitMoments() if settings.pop("state_bits", 32) == 8 else None
    shelf = Shelf(settings.pop("store", "host"), codec, settings.pop("block", None))
    if not settings.get("exact"):  # which has no order that a seed could shuffle
        settings["seed"] = seed
    optimizer = ChunkedOptimizer(
        model,
        torch.optim.AdamW,
        lr=lr,
        weight_decay=0.0,
        fused=True,
        max_grad_norm=1.0,
        store=shelf,
        **settings,
    )

    def outer() -> list[Any]:
        return [p.grad for group in optimizer.param_groups for p in group["params"]]

    def held() -> Held:
        # not optimizer.holdings(), which walks through all that rests at every look
        found = held_by(model, optimizer.rule)
        if optimizer.exact:  # whole gradients wait beside the state, their slices are views
            return {"resting": [*shelf.latest(), *outer()], **found}
        return {**found, "gradient": [*found["gradient"], *outer()], "resting": shelf.latest()}

    def resting() -> int:
        waiting = nbytes(outer()) if optimizer.exact else 0
        return optimizer.nbytes["resting"] + waiting

    return Method(model, optimizer.step, lr_setter(optimizer), held, resting=resting)


class Shelf(Store):
    """A store that knows which tensors came last, for a meter."""

    _latest: Sequence[weakref.ref[Tensor]] = ()

    def put(self, key: str, state: State, resting: bool = True) -> None:
        super().put(key, state, resting)
        self._latest = [weakref.ref(v) for v in state.values() if isinstance(v, Tensor)]

    def latest(self) -> list[Any]:
        return [reference() for reference in self._latest]


def dense(model: Any, lr: float, **settings: Any) -> Method:
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=0.0, fused=True, **settings)

    def update() -> None:
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
                master.grad = None

    return Method(model, update, lr_setter(optimizer), lambda: held_by(model, optimizer))


def lora(model: Any, lr: float, **settings: Any) -> Method:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=True, **settings)

    def held() -> Held:
        return {"adapter": weights, **held_by(adapted, optimizer)}

    return Method(adapted, clipped_step(weights, optimizer), lr_setter(optimizer), held)


def clipped_step(weights: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The update of an optimizer that steps on the gradients as backward leaves them."""

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def lr_setter(optimizer: torch.optim.Optimizer) -> Callable[[float], None]:
    def set_lr(lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr

    return set_lr


def held_by(model: Any, optimizer: torch.optim.Optimizer) -> Held:
    """What a torch optimizer and its model hold; parameters that are no weights are masters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "weights": model.parameters(),
        "gradient": [p.grad for p in (*model.parameters(), *parameters)],
        "master": [*parameters, *optimizer.state],
        "state": [value for state in optimizer.state.values() for value in state.values()],
    }


def random_batches(tokens: int, vocabulary: int, seed: int = 0) -> Iterator[Batch]:
    """Endless batches of one row of `tokens` random tokens, every one a label."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(0, vocabulary, (1, tokens), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def provenance() -> str:
    """Commit, processor and versions, for the head of a results file."""
    return (
        f"at {commit()}, {_processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def commit() -> str:
    git = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    """Its name, and which products of bf16 matrices it has instructions for."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split("\t", 1) for line in info.read_text().splitlines() if "\t" in line)
    known = {name.strip(): value.lstrip(": \t") for name, value in fields.items()}
    flags = known.get("flags", "").split()
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return f"{known.get('model name', platform.machine())} ({', '.join(bf16) or 'no bf16'})"
