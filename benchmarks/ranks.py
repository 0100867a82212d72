"""One rank of several, simulated: what its device holds in a step, and what is averaged.

    python -m benchmarks.ranks [--model llama-3-70b] [--ranks 2] [--chunks 256] [--output FILE]

The graph of the real model, torch's own fully_shard, our head, optimizer and meter, on tensors
without memory, in a process group without processes. Nothing is measured on a device: streams do
not overlap here, so a layer that is gathered ahead of time on CUDA comes on top.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PretrainedConfig

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.store import GIB
from chunkft.memory.dry_run import DryRun, dry_run, fake
from chunkft.memory.meter import KINDS
from chunkft.models.losses import install_head
from chunkft.models.shapes import config_of
from chunkft.recipes.trial import HostStore, checkpoint_layers
from chunkft.train import sharding

CARD, SPARE = 80e9 / GIB, 2.0  # GiB of a card of 80 GB, and what shall be left of it


def simulate(
    config: PretrainedConfig,
    ranks: int,
    chunks: int,
    layout: str = "stream",
    seq: int = 1024,
    batch: int = 1,
    block: int | None = None,
) -> tuple[DryRun, int]:
    """A step on the first, the middle and the last chunk; bytes averaged in such a step, the most.

    Weights in bf16, layers recomputed, their inputs on the host, state on the host.
    """
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        with fake():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
            sharding.shard(model, torch.device("cpu"), mesh)
            checkpoint_layers(model)
            optimizer = ChunkedOptimizer(
                model,
                torch.optim.AdamW,
                lr=1e-5,
                chunks=chunks,
                interval=1,
                layout=layout,
                max_grad_norm=1.0,
                store=HostStore(block=block),
            )
            install_head(model)
            ids = torch.zeros(batch, seq, dtype=torch.long)
            averaged: list[int] = []

            def backward() -> None:
                before = optimizer.reduced_bytes
                model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
                averaged.append(optimizer.reduced_bytes - before)

            visited = [0] if layout == "spread" else [0, chunks // 2, chunks - 1]
            width = config.get_text_config().vocab_size
            return dry_run(model, optimizer, backward, visited, width, offload=True), max(averaged)
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="llama-3-70b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=256)
    parser.add_argument("--layout", choices=["stream", "spread"], default="stream")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--block", type=int, default=2**22, help="elements; 0 is none")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found, averaged = simulate(
        config_of(options.model),
        *(options.ranks, options.chunks, options.layout, options.seq, options.batch),
        options.block or None,
    )
    peak = found.peak.peak
    total = peak.total / GIB
    fits = "fits" if total <= CARD - SPARE else "does not fit"
    dense = 2 * found.elements
    lines = [
        f"{options.model}, {options.ranks} ranks, {options.batch} x {options.seq} tokens, "
        f"K={options.chunks} {options.layout}, blocks of {options.block} elements",
        "",
        "| on the device at the peak | GiB |",
        "|---|---|",
        *(f"| {kind} | {peak.bytes[kind] / GIB:.2f} |" for kind in KINDS if peak.bytes[kind]),
        f"| **total** | **{total:.2f}** |",
        "",
        f"With {SPARE:.0f} GiB to spare that {fits} in 80 GB ({CARD:.2f} GiB). On the host: layer "
        f"inputs {found.offloaded / GIB:.2f} GiB, state {found.resting / GIB / options.ranks:.1f}.",
        f"Gradients averaged in a step: {averaged / GIB:.2f} GiB at most, "
        f"{averaged / dense:.4f} of what dense training averages.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
