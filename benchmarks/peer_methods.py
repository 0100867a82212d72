"""Every method of the comparison by name, the peers' packages as their authors ship them.

No class of theirs is changed. Each trains SmolLM2-135M in bf16 and clips to a norm of 1, except
LOMO and AdaLomo, whose gradient is never there as a whole (LOMO's own clipping takes a second
backward pass; AdaLomo normalises each update).
"""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.methods import (
    Held,
    Method,
    build,
    chunk,
    clipped_step,
    held_by,
    lr_setter,
    start,
)
from benchmarks.quality import RATES

DENSE_RATE = RATES["dense"]
BLOCK_STEPS = 3  # BAdam: 30 blocks are visited once in 90 steps; its default, 50, reaches 2 in 100
GALORE_RANK, GALORE_GAP = 128, 200


def adamw_bf16(model: Any, lr: float) -> Method:
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=True)
    return _plain(model, optimizer, weights)


def adam_8bit(model: Any, lr: float) -> Method:
    weights = list(model.parameters())
    optimizer = _package("bitsandbytes").optim.AdamW8bit(weights, lr=lr, weight_decay=0.0)
    return _plain(model, optimizer, weights)


def galore(model: Any, lr: float) -> Method:
    weights = list(model.parameters())
    layers = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("attn" in name or "mlp" in name)
    ]
    inside = {id(weight) for weight in layers}
    projected = {"rank": GALORE_RANK, "update_proj_gap": GALORE_GAP, "scale": 0.25}
    groups = [
        {"params": [weight for weight in weights if id(weight) not in inside]},
        {"params": layers, "proj_type": "std", **projected},
    ]
    adamw = _package("galore_torch").GaLoreAdamW
    optimizer = adamw(groups, lr=lr, weight_decay=0.0, no_deprecation_warning=True)

    def held() -> Held:
        found = held_by(model, optimizer)
        projectors = [state.get("projector") for state in optimizer.state.values()]
        matrices = [projector.ortho_matrix for projector in projectors if projector]
        return {**found, "state": [*found["state"], *matrices]}

    return Method(model, clipped_step(weights, optimizer), lr_setter(optimizer), held)


def lomo(model: Any, lr: float) -> Method:
    return _fused(model, lr, _package("lomo_optim").Lomo(model, lr=lr))


def adalomo(model: Any, lr: float) -> Method:
    # its constructor puts its state on CUDA, whatever the model is on
    with nullcontext() if torch.cuda.is_available() else _CudaIsHere():
        optimizer = _package("lomo_optim").AdaLomo(model, lr=lr)
    return _fused(model, lr, optimizer)


def badam(model: Any, lr: float, embedding: bool = False) -> Method:
    names = list(model.named_parameters())
    weights = list(model.parameters())
    base = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=True)
    optimizer = _package("badam").BlockOptimizer(
        base,
        names,
        switch_block_every=BLOCK_STEPS,
        include_embedding=embedding,
        include_lm_head=embedding,
        verbose=0,
    )

    def held() -> Held:
        found = held_by(model, base)
        return {**found, "master": [*found["master"], *optimizer.param_idx2hp.values()]}

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return Method(model, update, lr_setter(optimizer), held)


def chunk_of_layers(model: Any, lr: float, **settings: Any) -> Method:
    """Chunks of what BAdam trains by default: the decoder layers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers" in name)
    return chunk(model, lr, **settings)


def _plain(model: Any, optimizer: torch.optim.Optimizer, weights: list[Any]) -> Method:
    step = clipped_step(weights, optimizer)
    return Method(model, step, lr_setter(optimizer), lambda: held_by(model, optimizer))


def _fused(model: Any, lr: float, optimizer: Any) -> Method:
    """LOMO and AdaLomo: each weight moves in backward, as its gradient arrives."""
    rate = lr

    def set_lr(new: float) -> None:
        nonlocal rate
        rate = new

    def held() -> Held:
        state = [
            tensor
            for name in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
            for tensor in getattr(optimizer, name, {}).values()
        ]
        return {**held_by(model, optimizer), "state": state}

    def backward(loss: Tensor) -> None:
        optimizer.fused_backward(loss, rate)

    return Method(model, lambda: None, set_lr, held, backward)


def _package(name: str) -> Any:
    """A peer's package; only `make bench` installs them, so no import says their names."""
    return importlib.import_module(name)


class _CudaIsHere(TorchFunctionMode):
    """`tensor.cuda()` gives the tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.cuda else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Entry:
    """A row of the comparison."""

    title: str
    rate: float
    """Where tuning starts."""
    source: str
    """Where that rate comes from."""
    builder: Callable[..., Method] | str
    """Of this file, or the name for `methods.build`."""
    settings: dict[str, Any] = field(default_factory=dict)
    cycle: int = 16
    """Steps of a round of timing: all blocks once where they differ in cost."""
    rare: int = 0
    """The first step's extra work comes again after so many steps."""
    rate_of: str = ""
    """Takes the tuned rate of this method instead of one of its own."""
    note: str = ""

    def make(self, lr: float, seed: int) -> Method:
        if isinstance(self.builder, str):
            return build(self.builder, lr, seed, **self.settings)
        return self.builder(start(seed), lr, **self.settings)


STREAM = {"layout": "stream", "interval": 1, "moments": "decay"}  # the command's defaults
SPREAD = STREAM | {"layout": "spread"}


def _chunk(layout: str, chunks: int) -> Entry:
    factor = sqrt(chunks) if layout == "stream" else min(chunks, 2 * sqrt(chunks))
    settings = (STREAM if layout == "stream" else SPREAD) | {"chunks": chunks}
    source = f"dense's times {factor:.3g}, the command's rule"
    title, rate = f"chunk {layout}, K={chunks}", DENSE_RATE * factor
    return Entry(
        title, rate, source, "chunk", settings, max(16, chunks) if layout == "stream" else 16
    )


ENTRIES = {
    "dense": Entry("dense AdamW, fp32 master", DENSE_RATE, "as in benchmarks/quality.py", "dense"),
    "adamw-bf16": Entry("AdamW, pure bf16", DENSE_RATE, "dense's", adamw_bf16),
    "adam-8bit": Entry(
        "8-bit AdamW", DENSE_RATE, "dense's", adam_8bit, note="bitsandbytes; no master"
    ),
    "lora": Entry("LoRA r=16, all linear", RATES["lora"], "as in benchmarks/quality.py", "lora"),
    "galore": Entry(
        f"GaLore r={GALORE_RANK}",
        4 * DENSE_RATE,
        "dense's over its scale, 0.25",
        galore,
        rare=GALORE_GAP,
        note="scale, gap (200 steps) and projection of its README; no master; the decomposition "
        "counts 1/200 in each step, more often than which it does not come",
    ),
    "lomo": Entry("LOMO", 4e-3, "the package's default times 4", lomo, note="no clipping"),
    "adalomo": Entry(
        "AdaLomo",
        1e-3,
        "the package's default",
        adalomo,
        note="its constructor calls `.cuda()`: without a GPU that is answered with the CPU tensor",
    ),
    "badam": Entry(
        "BAdam, blocks of a layer",
        4 * DENSE_RATE,
        "dense's times 4",
        badam,
        cycle=30 * BLOCK_STEPS,
        note=f"its default blocks, T={BLOCK_STEPS}; the embedding, 21 % of the weights, stays "
        "untrained",
    ),
    "badam-all": Entry(
        "BAdam, embedding too",
        4 * DENSE_RATE,
        "dense's times 4",
        badam,
        {"embedding": True},
        cycle=32 * BLOCK_STEPS,
        note="its switches for embedding and head on",
    ),
    "stream-K8": _chunk("stream", 8),
    "stream-K16": _chunk("stream", 16),
    "stream-K38": _chunk("stream", 38),  # 134.5M / 38 elements: a decoder layer, BAdam's block
    "stream-layers": Entry(
        "chunk stream, layers only, K=30",
        DENSE_RATE * sqrt(30),
        "dense's times 5.48, the command's rule",
        chunk_of_layers,
        STREAM | {"chunks": 30},
        cycle=30,
        note="trains the weights that BAdam trains, in blocks of the same bytes",
    ),
    "stream-K64": _chunk("stream", 64),
    "spread-K8": _chunk("spread", 8),
    "spread-K8-blocks": Entry(
        "chunk spread, K=8, blocks of 256K",
        0.0,
        "",
        "chunk",
        SPREAD | {"chunks": 8, "block": 2**18},
        rate_of="spread-K8",
        note="state visits in the step only, 2^18 elements at a time",
    ),
    "spread-K16": _chunk("spread", 16),
    "spread-K64": _chunk("spread", 64),
    "exact-K16": Entry(
        "chunk exact, K=16",
        DENSE_RATE,
        "",
        "chunk",
        {"chunks": 16, "exact": True},
        rate_of="dense",
    ),
}
