"""The demo: all parameters of SmolLM2-135M-Instruct learn a reasoning-gym task on this machine.

Two runs of `chunkft sft`, one after another, each in a process of its own so that peak memory is
its own: dense AdamW for the first steps, then chunks for the whole run on the same data.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from chunkft.core.store import GIB
from chunkft.errors import ChunkFTError
from chunkft.memory.budget import slow_in_bf16
from chunkft.train.report import METRICS

TASK = "reasoning-gym:word_sequence_reversal?min_words=3&max_words=6"
STEPS = 120
COMPARED = 20  # first steps, which dense AdamW takes too
WORKING = ("gradient", "master", "state")
COMMON = [
    "--dataset_name", TASK,
    "--train_samples", "4000",
    "--per_device_train_batch_size", "6",
    "--max_length", "128",
    "--gradient_checkpointing", "false",
    "--lr_scheduler_type", "cosine",
    "--logging_steps", "5",
    "--save_strategy", "no",
]  # fmt: skip


def run(output_dir: str, steps: int | None) -> int:
    """Run both, print what came of it; returns the exit code.

    Raises:
        ChunkFTError: one of the runs failed; its own message is above.
    """
    out = Path(output_dir) / time.strftime("%Y%m%d-%H%M%S")
    steps = STEPS if steps is None else steps
    compared = min(COMPARED, steps)
    if slow_in_bf16():
        print("in fp32: this CPU multiplies bf16 in software, tens of times slower")
    print(f"1 of 2: dense AdamW, the first {compared} steps", flush=True)
    dense = _sft(
        out / "dense",
        ["--method", "full", "--max_steps", str(compared), "--score_samples", "0"],
    )
    print(f"\n2 of 2: all parameters in chunks, {steps} steps", flush=True)
    chunk = _sft(
        out / "chunk",
        ["--max_steps", str(steps), "--learning_rate", "8e-4", "--score_samples", "100"],
    )
    print(compare(dense, chunk, compared))
    print(f"the fine-tuned model, report.md and loss.png are in {out / 'chunk'}")
    return 0


def _sft(out: Path, more: list[str]) -> dict[str, Any]:
    words = [sys.executable, "-m", "chunkft", "sft", "--output_dir", str(out), *COMMON, *more]
    if slow_in_bf16():
        words += ["--dtype", "float32", "--bf16", "false"]  # or autocast goes back to it
    if subprocess.run(words, check=False).returncode:
        raise ChunkFTError(f"the run in {out} failed, see above")
    return json.loads((out / METRICS).read_text())


def compare(dense: dict[str, Any], chunk: dict[str, Any], steps: int) -> str:
    """The table that the demo ends with."""
    rows = ["", f"{'first ' + str(steps) + ' steps':<34}{'dense AdamW':>14}{'chunkft':>14}"]

    def row(name: str, values: tuple[float, float], unit: str) -> None:
        rows.append(f"{name:<34}{values[0]:>11.2f} {unit:<3}{values[1]:>10.2f} {unit}")

    both = (dense, chunk)
    seconds = [statistics.median(m["step_seconds"][1:steps] or m["step_seconds"]) for m in both]
    row("seconds a step (median)", (seconds[0], seconds[1]), "s")
    working = [sum(m["bytes_by_kind"][kind] for kind in WORKING) / GIB for m in both]
    row("gradient + state + master", (working[0], working[1]), "GiB")
    resting = [m["bytes_by_kind"]["resting"] / GIB for m in both]
    row("resting state, in RAM here", (resting[0], resting[1]), "GiB")
    row("peak memory of the process", (dense["peak_gib"], chunk["peak_gib"]), "GiB")
    rows.append("")
    name = "exact-match accuracy"
    rows.append(
        f"held-out {name}: {chunk['before'][name]:.0%} before, {chunk['after'][name]:.0%} after "
        f"{chunk['steps']} steps ({chunk['seconds']:.0f} s), {chunk['parameters']:,} parameters "
        f"trained"
    )
    for question, reference, before, after in chunk["samples"]:
        asked = " ".join(question.split())
        rows.append(f"  {asked[-70:]}")
        rows.append(f"    right: {reference!r}  before: {before[:50]!r}  after: {after!r}")
    return "\n".join(rows)
