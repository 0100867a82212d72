"""Every method on one task, after equal seconds: what it trains, holds, learns and saves.

    python -m benchmarks.side_by_side [--methods lora chunk ...] [--seconds 45] [--output FILE]

`chunkft sft` of SmolLM2-135M on word reversal. A pilot of a few steps gives each method's seconds a
step, and with them the steps that fit into the same seconds; the rate falls to 0 by a cosine over
them. Each method runs at its own default learning rate and at multiples of it, and the lowest loss
on held-out records counts: short runs want higher rates than long ones.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.methods import provenance

TASK = "reasoning-gym:word_sequence_reversal?min_words=3&max_words=6"
PILOT, ITEMS = 10, 50
METHODS = ("full", "exact", "chunk", "lora", "dora", "rslora", "pissa", "adalora", "oft", "boft")
METHODS += ("vera", "miss", "ia3", "prefix", "prompt", "ptuning")
COMMON = ["--dataset_name", TASK, "--train_samples", "4000", "--max_length", "128"]
COMMON += ["--per_device_train_batch_size", "6", "--gradient_checkpointing", "false"]
COMMON += ["--lr_scheduler_type", "cosine", "--save_strategy", "no", "--disable_tqdm", "true"]
COMMON += ["--logging_steps", "1", "--seed", "7"]
# K as of the demo, so that short runs have several cycles
OWN = {"chunk": ["--chunks", "8"], "exact": ["--chunks", "8"]}
# what trains lies in the first four; activations are told apart
WORKING = ("adapter", "gradient", "master", "state")
HEAD = (
    "| method | trained | seconds a step | working bytes, MiB | activations, MiB | steps | "
    "learning rate | loss | accuracy | saved, MiB |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


class Run(NamedTuple):
    """What came of one run."""

    metrics: dict[str, Any]
    rate: float
    saved: int
    """Bytes of the weights that it saved."""


def run(method: str, folder: Path, steps: int, rate: float | None, items: int) -> Run:
    """One `chunkft sft`; a folder that has its metrics is read and not run again."""
    words = [sys.executable, "-m", "chunkft", "sft", "--method", method, *OWN.get(method, [])]
    words += [*COMMON, "--output_dir", str(folder), "--max_steps", str(steps)]
    words += ["--score_samples", str(items)]
    words += [] if rate is None else ["--learning_rate", f"{rate:g}"]
    if not (folder / "metrics.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("w") as log:
            subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT)
    metrics = json.loads((folder / "metrics.json").read_text())
    saved = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Run(metrics, max(row["learning_rate"] for row in metrics["history"]), saved)


def step_seconds(found: Run) -> float:
    return statistics.median(found.metrics["step_seconds"][2:])


def row(method: str, pilot: float, best: Run) -> str:
    """A line of the table."""
    metrics = best.metrics
    held = metrics["bytes_by_kind"] | metrics["measured"]  # an adapter is weights to the meter
    working = sum(held.get(kind, 0) for kind in WORKING)
    after, total = metrics["after"], metrics["bytes_by_kind"]["weights"] / 2  # bf16
    cells = [
        method,
        f"{metrics['parameters'] / total:.2%}",
        f"{pilot:.2f}",
        f"{working / 2**20:.1f}",
        f"{metrics['measured']['activations'] / 2**20:.0f}",
        f"{metrics['steps']}",
        f"{best.rate:.2g}",
        f"{after['loss']:.3f}",
        f"{after['exact-match accuracy']:.0%}",
        f"{best.saved / 2**20:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seconds", type=float, default=45.0, help="of training, each run")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 4.0], help="multiples")
    parser.add_argument("--work", type=Path, default=Path("runs/side_by_side"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    multiples = ", ".join(f"{rate:g}" for rate in options.rates)
    lines = [
        "# Methods side by side",
        "",
        f"`python -m benchmarks.side_by_side --seconds {options.seconds:g}`, {provenance()}.",
        "",
        f"SmolLM2-135M, `{TASK}`, 6 records a step, no checkpointing, {options.seconds:g} seconds "
        f"of training each, by the seconds a step of a pilot. Rates: the best by held-out loss of "
        f"the method's default times {multiples}. Working bytes: adapter, gradient, master and "
        f"state, beside 257 MiB of weights. Accuracy of {ITEMS} held-out items; one seed.",
        "",
        *HEAD,
    ]
    pilots = {
        name: run(name, options.work / name / "pilot", PILOT, None, 0) for name in options.methods
    }
    for name, pilot in pilots.items():
        seconds = step_seconds(pilot)
        steps = max(PILOT, round(options.seconds / seconds))
        runs = [
            run(name, options.work / name / f"x{rate:g}", steps, rate * pilot.rate, ITEMS)
            for rate in options.rates
        ]
        best = min(runs, key=lambda found: found.metrics["after"]["loss"])
        lines.append(row(name, seconds, best))
        print(lines[-1], flush=True)
        if options.output:
            options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
