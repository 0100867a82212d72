"""SFT, then GRPO or DPO, of SmolLM2-135M on a verifiable task: does the held-out reward rise?

    python -m benchmarks.rollouts [--runs grpo-lora ...] [--output FILE] [--work FOLDER]

`chunkft sft` takes a few steps on word reversal, so that some answers are right. From there each
run takes `chunkft grpo`, with the task's own score as reward, or `chunkft dpo`, right answers
against those of other questions. Held-out items are answered before and after, greedily and sampled
at temperature 1 with the same seed; the difference of the mean scores has a paired bootstrap
interval over items.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from benchmarks.methods import provenance
from chunkft.data.tasks import ReasoningGymTask
from chunkft.models.load import load_model
from chunkft.train.scoring import solve

TASK = "reasoning-gym:word_sequence_reversal?min_words=3&max_words=4"
ITEMS, RESAMPLES, TOKENS = 200, 10_000, 24
SFT = ["--train_samples", "2000", "--max_steps", "16", "--per_device_train_batch_size", "6"]
SFT += ["--learning_rate", "8e-4", "--max_length", "128", "--lr_scheduler_type", "cosine"]
GRPO = ["--train_samples", "2000", "--max_steps", "40", "--per_device_train_batch_size", "32"]
GRPO += ["--num_generations", "8", "--max_completion_length", str(TOKENS), "--beta", "0.02"]
GRPO += ["--temperature", "1.0", "--lr_scheduler_type", "constant_with_warmup"]
GRPO += ["--warmup_steps", "4", "--logging_steps", "1"]
DPO = ["--train_samples", "2000", "--max_steps", "40", "--per_device_train_batch_size", "8"]
DPO += ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "4"]
DPO += ["--logging_steps", "1"]
LORA, CHUNK = ["--method", "lora"], ["--method", "chunk", "--chunks", "8"]
# GRPO's rates are of those tried, DPO's were not searched: LoRA's is too high (LOG.md)
RUNS = {
    "grpo-lora": ("grpo", [*GRPO, *LORA, "--learning_rate", "3e-4"]),
    "grpo-chunk": ("grpo", [*GRPO, *CHUNK, "--learning_rate", "1.5e-4"]),
    "dpo-lora": ("dpo", [*DPO, *LORA, "--learning_rate", "5e-5"]),
    "dpo-chunk": ("dpo", [*DPO, *CHUNK, "--learning_rate", "2e-5"]),
}


class Scores(NamedTuple):
    """Of each held-out item."""

    greedy: list[float]
    sampled: list[float]


def run(command: str, folder: Path, *more: str) -> dict[str, Any]:
    """`chunkft <command>`; returns its metrics, of a folder that has them without another run."""
    words = [sys.executable, "-m", "chunkft", command, "--dataset_name", TASK]
    words += ["--output_dir", str(folder), "--save_strategy", "no", "--score_samples", "10"]
    words += ["--gradient_checkpointing", "false", "--seed", "7", *more]
    if not (folder / "metrics.json").exists():
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads((folder / "metrics.json").read_text())


def model_in(folder: Path, base: Path) -> tuple[PreTrainedModel | PeftModel, Any]:
    if not (folder / "adapter_config.json").exists():
        return load_model(str(folder))
    model, tokenizer = load_model(str(base))
    return PeftModel.from_pretrained(model, str(folder)), tokenizer


def judge(folder: Path, base: Path, seed: int = 0) -> Scores:
    """Scores of the model in `folder` on items that no run has seen."""
    model, tokenizer = model_in(folder, base)
    task = ReasoningGymTask.parse(TASK)
    items = task.held_out(ITEMS, 991, task.records(2000, seed=7)).records.to_list()
    found = {}
    for name, sample in (("greedy", False), ("sampled", True)):
        torch.manual_seed(seed)
        found[name] = solve(model, tokenizer, task, items, TOKENS, sample=sample).scores
    return Scores(**found)


def interval(before: list[float], after: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean difference, and its 95 % interval by resampling items."""
    difference = torch.tensor(after) - torch.tensor(before)
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(difference), (RESAMPLES, len(difference)), generator=draw)
    means = difference[picks].mean(1).sort().values
    low, high = means[int(0.025 * RESAMPLES)].item(), means[int(0.975 * RESAMPLES)].item()
    return difference.mean().item(), low, high


def row(name: str, seconds: float, before: Scores, after: Scores) -> str:
    cells = [name, f"{seconds / 60:.1f}"]
    for kind in Scores._fields:
        old, new = getattr(before, kind), getattr(after, kind)
        mean, low, high = interval(old, new)
        cells.append(f"{sum(old) / len(old):.3f} -> {sum(new) / len(new):.3f}")
        cells.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--work", type=Path, default=Path("runs/rollouts"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    lines = [
        "# SFT, then GRPO or DPO",
        "",
        f"`python -m benchmarks.rollouts --runs {' '.join(options.runs)}`, {provenance()}.",
        "",
        f"SmolLM2-135M, `{TASK}`, {ITEMS} held-out items; 95 % intervals of the paired "
        "difference by bootstrap. Sampled: temperature 1.",
        "",
        "| | minutes of training | greedy score | difference | sampled score | difference |",
        "|---|---|---|---|---|---|",
    ]
    base = options.work / "sft"
    run("sft", base, *SFT)
    before = judge(base, base)
    for name in options.runs:
        command, flags = RUNS[name]
        found = run(command, options.work / name, "--model_name_or_path", str(base), *flags)
        lines.append(row(name, found["seconds"], before, judge(options.work / name, base)))
        print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
