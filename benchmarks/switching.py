"""What a switch of chunks costs: seconds a step with T=10 over those without a switch.

    python -m benchmarks.switching [--rounds 8] [--store DIR] [--output FILE]

SmolLM2-135M, bf16 weights, AdamW, `spread`, K=16, resting state in files. Two models take turns,
one step each: one moves on every 10 steps, the other stays on its first chunk. A round is a visit:
ten steps, with the switch at their end. Steps of 8 tokens come first, until every chunk has state,
so that each switch reads one chunk and writes one.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.methods import chunk, provenance, random_batches, start

TOKENS, CHUNKS, INTERVAL, NEVER = 512, 16, 10, 10**9


def measure(folder: Path, rounds: int) -> list[float]:
    """Each round's seconds with switches over those without."""
    settings = {"chunks": CHUNKS, "layout": "spread"}
    moving, staying = (
        chunk(start(0), 1e-5, store=folder / name, interval=interval, **settings)
        for name, interval in (("moving", INTERVAL), ("staying", NEVER))
    )
    vocabulary = moving.model.config.vocab_size
    short, full = random_batches(8, vocabulary), random_batches(TOKENS, vocabulary)
    for _ in range(CHUNKS * INTERVAL):
        moving.step(next(short))
    for _ in range(2):
        staying.step(next(full))
    found = []
    for _ in range(rounds):
        taken = {"moving": 0.0, "staying": 0.0}
        for _ in range(INTERVAL):
            batch = next(full)
            for name, method in (("moving", moving), ("staying", staying)):
                begin = time.perf_counter()
                method.step(batch)
                taken[name] += time.perf_counter() - begin
        found.append(taken["moving"] / taken["staying"])
        print(f"{found[-1]:.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--store", type=Path, help="directory; a temporary one where left out")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.store) as folder:
        found = measure(Path(folder), options.rounds)
    text = (
        "# A switch of chunks: SmolLM2-135M, bf16, 512 tokens a step, K=16, store on disk\n\n"
        f"`python -m benchmarks.switching --rounds {options.rounds}` {provenance()}.\n\n"
        f"Seconds a step with T={INTERVAL} over those without a switch: median "
        f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f}) of "
        f"{options.rounds} rounds of {INTERVAL} steps each.\n"
    )
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
