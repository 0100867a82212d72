"""Seconds a step and working bytes against dense AdamW and LoRA, as ratios within one run.

    python -m benchmarks.speed [--runs 3] [--output FILE]

SmolLM2-135M, bf16 weights, 512 tokens a step, K=16, T=1 (state moves at every step, the worst
case). The methods take turns, one step each, so that whatever else the machine does in a minute
meets all of them alike. A run is one whole cycle of 16 rounds and gives the ratio of the means; the
table has the median over runs. Random tokens: time does not depend on them.
"""

import argparse
import statistics
import time
from pathlib import Path

from benchmarks.meter import Meter
from benchmarks.methods import Batch, Method, build, provenance, random_batches

TOKENS, CHUNKS, INTERVAL = 512, 16, 1
DENSE, LORA = "dense AdamW, fp32 master", "LoRA r=16, all linear"
CASES = {
    DENSE: ("dense", {}),
    LORA: ("lora", {}),
    "chunk stream, K=16": (
        "chunk",
        {"chunks": CHUNKS, "interval": INTERVAL, "layout": "stream"},
    ),
    "chunk spread, K=16": (
        "chunk",
        {"chunks": CHUNKS, "interval": INTERVAL, "layout": "spread"},
    ),
}


def cycle(methods: dict[str, Method]) -> dict[str, float]:
    """Mean seconds a step of each method over one whole cycle, in turns."""
    batches = random_batches(TOKENS, next(iter(methods.values())).model.config.vocab_size)
    seconds = dict.fromkeys(methods, 0.0)
    for _ in range(CHUNKS * INTERVAL):
        batch = next(batches)
        for case, method in methods.items():
            begin = time.perf_counter()
            method.step(batch)
            seconds[case] += (time.perf_counter() - begin) / (CHUNKS * INTERVAL)
    return seconds


def held(method: Method, batch: Batch) -> int:
    """Most bytes of gradient, master, state and adapter in a cycle: its chunks differ a little."""
    meter = Meter(method)
    for _ in range(CHUNKS * INTERVAL if method.resting() else 1):
        meter.step(batch)
    return meter.held


def table(runs: list[dict[str, float]], size: dict[str, int]) -> str:
    def ratio(case: str, base: str) -> str:
        found = sorted(run[case] / run[base] for run in runs)
        return f"{statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})"

    lines = [
        "| method | seconds a step / dense | / LoRA | working bytes / dense |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        share = size[case] / size[DENSE]
        lines.append(f"| {case} | {ratio(case, DENSE)} | {ratio(case, LORA)} | {share:.3f} |")
    means = ", ".join(f"{case} {statistics.median(r[case] for r in runs):.2f} s" for case in CASES)
    return "\n".join([*lines, "", f"Medians of the seconds themselves: {means}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    methods = {case: build(name, 1e-5, **settings) for case, (name, settings) in CASES.items()}
    warm_up = next(random_batches(TOKENS, methods[DENSE].model.config.vocab_size, seed=1))
    for method in methods.values():
        method.step(warm_up)
    runs = []
    for i in range(options.runs):
        runs.append(cycle(methods))
        print(f"run {i + 1}: {runs[-1]}", flush=True)
    size = {case: held(method, warm_up) for case, method in methods.items()}
    text = (
        "# Seconds a step and working bytes: SmolLM2-135M, bf16, 512 tokens a step, K=16\n\n"
        f"`python -m benchmarks.speed --runs {options.runs}` {provenance()}. Median over "
        f"{options.runs} cycles (smallest to largest); T={INTERVAL}; the methods take turns.\n"
        "Working bytes: gradient + optimizer state + fp32 master, resting state apart.\n\n"
        + table(runs, size)
    )
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
