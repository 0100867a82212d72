"""Seconds a step and working bytes against dense AdamW and LoRA, as ratios within one run.

    python -m benchmarks.speed [--runs 3]

SmolLM2-135M, bf16 weights, 512 tokens a step, K=16, T=1 (state moves at every step, the worst
case). Every method runs in a process of its own, one after another, `runs` times over; a process
gives the mean over one whole cycle, the table the median over processes. Random tokens: time does
not depend on them.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

TOKENS, CHUNKS, INTERVAL = 512, 16, 1
CASES = {
    "dense AdamW, fp32 master": ("dense", {}),
    "LoRA r=16, all linear": ("lora", {}),
    "chunk stream, K=16": (
        "chunk",
        {"chunks": CHUNKS, "interval": INTERVAL, "layout": "stream"},
    ),
    "chunk spread, K=16": (
        "chunk",
        {"chunks": CHUNKS, "interval": INTERVAL, "layout": "spread"},
    ),
}
DENSE, LORA = list(CASES)[:2]


def measure(case: str) -> dict[str, float]:
    """Mean seconds a step over one whole cycle, after two steps of warm-up; working bytes."""
    from benchmarks.methods import build, random_batches

    name, settings = CASES[case]
    method = build(name, lr=1e-5, **settings)
    batches = random_batches(TOKENS, method.model.config.vocab_size)
    warm_up, steps = 2, CHUNKS * INTERVAL
    for _ in range(warm_up):
        method.step(next(batches))
    begin = time.perf_counter()
    for _ in range(steps):
        method.step(next(batches))
    seconds = (time.perf_counter() - begin) / steps
    return {"seconds": seconds, "bytes": method.working_bytes()}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    seconds = {c: statistics.median(r["seconds"] for r in rows) for c, rows in found.items()}
    size = {c: rows[0]["bytes"] for c, rows in found.items()}
    lines = [
        "| method | seconds a step / dense | / LoRA | working bytes / dense |",
        "|---|---|---|---|",
    ]
    for case in found:
        lines.append(
            f"| {case} | {seconds[case] / seconds[DENSE]:.3f} | "
            f"{seconds[case] / seconds[LORA]:.3f} | {size[case] / size[DENSE]:.3f} |"
        )
    spread = {c: [round(r["seconds"], 3) for r in rows] for c, rows in found.items()}
    lines += ["", f"Seconds a step of each process: {json.dumps(spread)}", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--case", help="measure one method in this process and print JSON")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case)))
        return
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for run in range(options.runs):
        for case in CASES:
            words = [sys.executable, "-m", "benchmarks.speed", "--case", case]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found[case].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"run {run + 1}: {case}: {found[case][-1]}", flush=True)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    text = (
        "# Seconds a step and working bytes: SmolLM2-135M, bf16, 512 tokens a step, K=16\n\n"
        f"`python -m benchmarks.speed --runs {options.runs}` at {commit}, {platform.machine()} "
        f"CPU, torch threads {__import__('torch').get_num_threads()}; medians over "
        f"{options.runs} processes, means over a whole cycle (T={INTERVAL}).\n\n" + table(found)
    )
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
