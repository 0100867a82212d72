"""The methods that are compared, each as `step(batch) -> loss` on the same model, head and loss.

dense   torch AdamW (fused) over fp32 masters of bf16 weights: the usual mixed-precision recipe
lora    peft, r=16 on every linear layer, fp32 adapters, the same AdamW
chunk   ChunkedOptimizer over the same AdamW
"""

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkft import ChunkedOptimizer
from chunkft.models.load import load_model
from chunkft.models.losses import head_log_probs

Batch = dict[str, Tensor]
LORA_RANK = 16


@dataclass(eq=False)
class Method:
    """A way to train, ready to step."""

    model: Any
    step: Callable[[Batch], float]
    set_lr: Callable[[float], None]
    working_bytes: Callable[[], int]
    """Gradient + optimizer state + master at their largest, resting state apart."""


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
    torch.manual_seed(seed)
    model, _ = load_model("smollm2-135m")
    model.train()
    if name in PEERS:
        return PEERS[name](model, lr, **settings)
    optimizer = ChunkedOptimizer(
        model,
        torch.optim.AdamW,
        lr=lr,
        weight_decay=0.0,
        fused=True,
        max_grad_norm=1.0,
        seed=seed,
        **settings,
    )

    def step(batch: Batch) -> float:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    def working() -> int:
        return sum(size for kind, size in optimizer.nbytes.items() if kind != "resting")

    return Method(model, step, _lr_setter(optimizer), working)


def _dense(model: Any, lr: float, **settings: Any) -> Method:
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=0.0, fused=True, **settings)
    peak = 0

    def step(batch: Batch) -> float:
        nonlocal peak
        loss = loss_of(model, batch)
        loss.backward()
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        peak = max(peak, _bytes(masters) + _bytes(m.grad for m in masters) + _state(optimizer))
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
                master.grad = None
        return loss.item()

    return Method(model, step, _lr_setter(optimizer), lambda: peak)


def _lora(model: Any, lr: float, **settings: Any) -> Method:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=True, **settings)
    peak = 0

    def step(batch: Batch) -> float:
        nonlocal peak
        loss = loss_of(adapted, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        peak = max(peak, _bytes(weights) + _bytes(w.grad for w in weights) + _state(optimizer))
        optimizer.zero_grad()
        return loss.item()

    return Method(adapted, step, _lr_setter(optimizer), lambda: peak)


PEERS = {"dense": _dense, "lora": _lora}


def _lr_setter(optimizer: torch.optim.Optimizer) -> Callable[[float], None]:
    def set_lr(lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr

    return set_lr


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _state(optimizer: torch.optim.Optimizer) -> int:
    return sum(_bytes(state.values()) for state in optimizer.state.values())


def random_batches(tokens: int, vocabulary: int, seed: int = 0) -> Iterator[Batch]:
    """Endless batches of one row of `tokens` random tokens, every one a label."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(0, vocabulary, (1, tokens), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def provenance() -> str:
    """Commit, processor and versions, for the head of a results file."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"at {commit}, {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


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
