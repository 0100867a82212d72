"""The rows of docs/memory.md: what the plan says for known models on known cards.

    python -m benchmarks.plans [--only llama-2-7b] > rows.md

Predictions, each from dry runs of the model's config; none is measured.
"""

import argparse

from chunkft.core.store import GIB
from chunkft.memory.budget import DEVICES
from chunkft.memory.plan import Choice, DoesNotFitError, Limits
from chunkft.models.shapes import config_of
from chunkft.recipes.planning import plan
from chunkft.recipes.trial import Workload

# model, card, rows, tokens, GiB for tensors if less than the card has, method; `disk` after it
# rests state there, and weights too where they are streamed
ROWS: list[tuple[str, str, int, int, float | None, str]] = [
    ("smollm2-135m", "laptop-16gib", 8, 1024, None, "chunk"),
    ("smollm2-135m", "laptop-16gib", 8, 1024, None, "exact"),
    ("llama-2-7b", "rtx-4090-24gib", 1, 1024, None, "chunk"),
    ("llama-2-7b", "rtx-4090-24gib", 1, 1024, None, "exact"),
    ("llama-2-7b", "rtx-4090-24gib", 1, 1024, 13.0, "chunk"),
    ("llama-2-7b", "rtx-4090-24gib", 1, 1024, 12.9, "chunk"),
    ("llama-2-7b", "rtx-4090-24gib", 1, 1024, 2.0, "chunk"),
    ("llama-2-7b", "laptop-16gib", 1, 1024, None, "chunk disk"),
    ("llama-2-7b", "a100-80gib", 8, 1024, 26.7, "chunk"),
    ("llama-3-8b", "rtx-4090-24gib", 1, 1024, None, "chunk"),
    ("llama-3-8b", "rtx-4090-24gib", 1, 1024, 14.6, "chunk"),
    ("llama-3-8b", "h100-80gb", 8, 2048, None, "chunk"),
    ("llama-3-8b", "h100-80gb", 8, 2048, None, "exact"),
    ("llama-3-70b", "h200-141gb", 1, 1024, None, "chunk"),
    ("llama-3-70b", "rtx-4090-24gib", 1, 1024, None, "chunk"),
]


def row(name: str, card: str, batch: int, seq: int, given: float | None, method: str) -> str:
    device = DEVICES[card]
    memory = device.memory - device.reserved if given is None else round(given * GIB)
    load = Workload(seq, batch, kwargs={"lr": 1e-5, "fused": True})
    start = f"| {name} | {card} | {batch} x {seq} | {method} | {memory / GIB:.2f} |"
    kind, *disk = method.split()
    choice = Choice(kind, store="DIR" if disk else "host")
    try:
        found = plan(config_of(name), load, Limits(memory), device, choice)
    except DoesNotFitError as error:
        return f"{start} does not fit: needs {error.needed / GIB:.2f} | | | | | |"
    choice = found.choice
    saved = "offloaded" if choice.offload else "yes" if choice.checkpointing else "no"
    working = sum(found.bytes[kind] for kind in ("gradient", "master", "state", "workspace"))
    made = found.bytes["activations"] + found.bytes["logits"]
    cells = [found.total, found.bytes["weights"], working, made, found.host]
    told = " | ".join(f"{size / GIB:.2f}" for size in cells)
    settings = f"K={choice.chunks}, checkpointing {saved}"
    if choice.block:
        settings += f", blocks of {choice.block / 2**20:g}M"
    if choice.stream_weights:
        stay = choice.resident_layers
        settings += ", weights streamed" + f" but for {stay} layers" * (stay > 0)
    if found.disk:
        settings += f", {found.disk / GIB:.2f} on disk"
    return f"{start} {told} | {settings} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="rows of this model")
    options = parser.parse_args()
    print(
        "| model | card | batch | method | given | total | weights | working set | "
        "activations, logits | host | settings |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case in ROWS:
        if options.only in (None, case[0]):
            print(row(*case), flush=True)


if __name__ == "__main__":
    main()
