"""Rows without padding against padded rows: tokens a second, activations, and the same loss.

    python -m benchmarks.packing [--runs 3] [--output FILE]

SmolLM2-135M, bf16, chunks as the command trains by default (`spread`, K=8, T=1, AdamW). The same
minibatches of 8 records go through the model padded to their longest, with transformers' sdpa, and
end to end, with each record attending to itself (models/attention.py); the two take turns on one
model. Lengths are lognormal, at most 512 tokens, of a width that gives the padding shares of FLAN
(64 %) and of OrcaMath (33 %). Tokens are random: time does not depend on them. Losses are compared
in fp32.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.methods import Batch, Method, build, loss_of, provenance, start
from chunkft.data.lengths import padding_share
from chunkft.data.packing import padding_free_batch
from chunkft.memory.meter import Meter
from chunkft.models import attention

RECORDS, LONGEST, STEPS = 8, 512, 6
SHARES = (0.64, 0.33)
PADDED, PACKED = "sdpa", attention.NAME


class Found(NamedTuple):
    """Of one padding share; ratios are packed over padded."""

    share: float
    tokens_a_second: list[float]
    activations: float
    loss: float
    """Largest relative difference."""


def lengths(share: float, count: int, seed: int = 0) -> list[int]:
    """Lognormal record lengths of which batches of RECORDS have `share` of padding."""
    draw = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = 0.0, 3.0
    for _ in range(40):
        sigma = (low + high) / 2
        # the 95th percentile at the bound: a few records are cut there, as max_length does
        found = (LONGEST * (sigma * (draw - 1.64)).exp()).round().clamp(4, LONGEST).long().tolist()
        low, high = (sigma, high) if padding_share(found, RECORDS) < share else (low, sigma)
    return found


def batches(rows: list[int], vocabulary: int, seed: int = 0) -> list[tuple[Batch, Batch]]:
    """The same minibatches padded, and end to end."""
    generator = torch.Generator().manual_seed(seed)
    made: list[tuple[Batch, Batch]] = []
    for first in range(0, len(rows), RECORDS):
        some = rows[first : first + RECORDS]
        records = [torch.randint(vocabulary, (n,), generator=generator) for n in some]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(records, batch_first=True)
        mask = pad([torch.ones_like(r) for r in records], batch_first=True)
        padded = {"input_ids": ids, "attention_mask": mask}
        padded["labels"] = ids.masked_fill(mask == 0, -100)
        flat = torch.cat(records)
        packed = padding_free_batch([{"input_ids": flat.tolist(), "seq_lengths": some}])
        packed["labels"] = flat[None].masked_fill(packed["position_ids"] == 0, -100)
        made.append((padded, packed))
    return made


def measure(method: Method, share: float, runs: int) -> Found:
    """Tokens a second in turns, and the most activations of a step each way."""
    rows = lengths(share, RECORDS * STEPS)
    model: Any = method.model
    data = batches(rows, model.config.vocab_size)
    ratios: list[float] = []
    for _ in range(runs):
        seconds = dict.fromkeys((PADDED, PACKED), 0.0)
        for pair in data:
            for name, batch in zip((PADDED, PACKED), pair, strict=True):
                model.set_attn_implementation(name)
                begin = time.perf_counter()
                method.step(batch)
                seconds[name] += time.perf_counter() - begin
        ratios.append(seconds[PADDED] / seconds[PACKED])
    most = {PADDED: 0, PACKED: 0}
    for pair in data[:2]:
        for name, batch in zip((PADDED, PACKED), pair, strict=True):
            model.set_attn_implementation(name)
            with (meter := Meter(model, torch.optim.SGD([torch.zeros(1)]), None)):
                loss_of(model, batch).backward()
            most[name] = max(most[name], meter.measured().highest["activations"])
            model.zero_grad()
    return Found(padding_share(rows, RECORDS), ratios, most[PACKED] / most[PADDED], _losses(data))


@torch.no_grad()
def _losses(data: list[tuple[Batch, Batch]]) -> float:
    model = start(0).float()
    worst = 0.0
    for pair in data[:3]:
        found: list[float] = []
        for name, batch in zip((PADDED, PACKED), pair, strict=True):
            model.set_attn_implementation(name)
            found.append(loss_of(model, batch).item())
        worst = max(worst, abs(found[1] - found[0]) / found[0])
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    attention.register()
    lines = [
        "# Rows without padding against padded rows",
        "",
        f"`python -m benchmarks.packing --runs {options.runs}`, {provenance()}.",
        "",
        f"SmolLM2-135M, bf16, chunks (spread, K=8), {STEPS} steps of {RECORDS} records of at most "
        f"{LONGEST} tokens a run; ratios are packed over padded.",
        "",
        "| padding | tokens a second (median, smallest to largest) | activations | loss, fp32 |",
        "|---|---|---|---|",
    ]
    for share in SHARES:
        method = build("chunk", 1e-5, chunks=8, interval=1, layout="spread")
        found = measure(method, share, options.runs)
        speed = sorted(found.tokens_a_second)
        lines.append(
            f"| {found.share:.0%} | {statistics.median(speed):.2f} ({speed[0]:.2f} to "
            f"{speed[-1]:.2f}) | {found.activations:.2f} | differs by {found.loss:.1e} |"
        )
        print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
