"""report.md and loss.png of a run: what was set, what came of it, in numbers that were measured."""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import torch

from chunkft.core.coverage import Audit
from chunkft.core.store import GIB
from chunkft.memory.meter import KINDS, Measured
from chunkft.memory.plan import Plan
from chunkft.train import metering

matplotlib.use("agg")
import matplotlib.pyplot as plt

METRICS = "metrics.json"
PACKAGES = ("chunkft", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers")
PLOTTED = {
    "loss": "training loss",
    "rewards/margins": "reward of chosen less rejected",
    "reward": "mean reward of completions",
    "kl": "KL from the reference",
}
CARD = {
    "allocated": "allocated by tensors on the GPU",
    "reserved": "reserved by torch's allocator",
    "process": "in use on the GPU (context and other programs too)",
}


@dataclass
class Outcome:
    """All that a report tells."""

    command: str
    settings: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    before: Mapping[str, float]
    after: Mapping[str, float]
    audit: Audit
    bytes_by_kind: Mapping[str, int]
    peak_gib: float
    seconds: float
    parameters: int
    card: Mapping[str, int] = field(default_factory=dict[str, int])
    """Peak bytes by `card_peaks`; none on a CPU."""
    measured: Measured | None = None
    """What the meter saw."""
    plan: Plan | None = None
    samples: Sequence[tuple[str, str, str, str]] = field(default_factory=list)
    """Question, reference, answer before, answer after."""


def write(folder: Path, outcome: Outcome) -> Path:
    """Write `report.md` and pictures of what was logged; returns the report's path."""
    lines = ["# Run report", "", "```", outcome.command, "```", ""]
    lines += _numbers(outcome)
    if outcome.history:
        for name, label in PLOTTED.items():
            rows = [row for row in outcome.history if row.get(name) is not None]
            if rows:
                file = name.split("/")[-1] + ".png"
                _plot(folder / file, rows, name, label)
                lines += [f"![{name}]({file})", ""]
    lines += _coverage(outcome.audit, outcome.parameters)
    lines += ["## Memory by kind", "", "| kind | GiB |", "|---|---|"]
    lines += [f"| {kind} | {size / GIB:.3f} |" for kind, size in outcome.bytes_by_kind.items()]
    if outcome.card:
        for kind, size in outcome.card.items():
            lines.append(f"| {CARD[kind]}, peak | {size / GIB:.3f} |")
    else:
        lines.append(f"| peak of the process (CPU) | {outcome.peak_gib:.3f} |")
    lines.append("")
    if outcome.measured is not None:
        metering.plot(folder / "memory.png", outcome.measured)
        lines += [*_memory(outcome.measured, outcome.plan), "![memory](memory.png)", ""]
    if outcome.samples:
        lines += [
            "## Answers",
            "",
            "| question | reference | before | after |",
            "|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in outcome.samples] + [""]
    lines += ["## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {_cell(str(value))} |" for key, value in outcome.settings.items()]
    lines += ["", "## Versions", "", *_versions()]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_metrics(folder: Path, outcome: Outcome, step_seconds: Sequence[float]) -> None:
    """`metrics.json`: the numbers of the report, for programs."""
    measured = outcome.measured
    numbers = {
        "before": outcome.before,
        "after": outcome.after,
        "steps": outcome.audit.steps,
        "seconds": outcome.seconds,
        "step_seconds": list(step_seconds),
        "peak_gib": outcome.peak_gib,
        "card": outcome.card,
        "bytes_by_kind": outcome.bytes_by_kind,
        "measured": None if measured is None else measured.highest,
        "measured_at_peak": None if measured is None else measured.peak.bytes,
        "planned": None if outcome.plan is None else outcome.plan.highest,
        "parameters": outcome.parameters,
        "history": list(outcome.history),
        "samples": list(outcome.samples),
    }
    (folder / METRICS).write_text(json.dumps(numbers, indent=1))


def tell(outcome: Outcome, path: Path) -> None:
    """The last lines that a run prints."""
    for key, value in outcome.after.items():
        print(f"{key}: {outcome.before.get(key, float('nan')):.4f} -> {value:.4f}")
    print(f"peak memory {outcome.peak_gib:.2f} GiB; report: {path}")


def _numbers(outcome: Outcome) -> list[str]:
    rows = [f"| {k} | {outcome.before[k]:.4f} | {outcome.after.get(k, float('nan')):.4f} |"
            for k in outcome.before]  # fmt: skip
    table = ["| measure | before | after |", "|---|---|---|", *rows, ""] if rows else []
    speed = f"{outcome.audit.steps} optimizer steps, {outcome.seconds:.0f} s in this session."
    return ["## Before and after", "", *table, speed, ""]


def _memory(measured: Measured, plan: Plan | None) -> list[str]:
    """The meter's table; the plan's figures beside it where there was one."""
    lines = [
        f"Metered over {metering.METERED} steps, GiB on the device:",
        "",
        "| kind | most | at the peak | planned |",
        "|---|---|---|---|",
    ]

    def row(name: str, most: int, peak: int, planned: int | None) -> None:
        told = "" if planned is None else f"{planned / GIB:.3f}"
        lines.append(f"| {name} | {most / GIB:.3f} | {peak / GIB:.3f} | {told} |")

    for kind in KINDS:
        planned = None if plan is None else plan.highest[kind]
        row(kind, measured.highest[kind], measured.peak.bytes[kind], planned)
    total = None if plan is None else plan.total
    row("total", measured.peak.total, measured.peak.total, total)
    resting = None if plan is None else plan.resting
    row("resting", measured.resting, measured.peak.resting, resting)
    return [*lines, ""]


def _coverage(audit: Audit, parameters: int) -> list[str]:
    counts = audit.updates.values()
    lines = [
        "## Coverage",
        "",
        f"{parameters - audit.waiting:,} of {parameters:,} trainable elements were trained, in "
        f"{audit.cycles} whole cycles; each slice took {min(counts)} to {max(counts)} updates.",
        "",
    ]
    if audit.without_gradient:
        names = ", ".join(audit.without_gradient)
        lines += [f"Not used by the forward pass, so without gradient: {names}.", ""]
    return lines


def _plot(path: Path, history: Sequence[Mapping[str, float]], name: str, label: str) -> None:
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot([row["step"] for row in history], [row[name] for row in history])
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _versions() -> list[str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["commit"] = _commit()
    return [", ".join(f"{name} {value}" for name, value in found.items())]


def _commit() -> str:
    """The commit of the source tree the package runs from, if it runs from one."""
    here = Path(__file__)
    # a virtual environment inside somebody's repository is not from that repository
    ours = f"ls-files --error-unmatch {here.name}"
    try:
        for words in (ours, "describe --always --dirty"):
            run = subprocess.run(
                ["git", *words.split()],
                cwd=here.parent,
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            )
        return run.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
