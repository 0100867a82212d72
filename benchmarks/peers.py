"""Chunks against the methods that people use instead: seconds, bytes and loss, side by side.

    python -m benchmarks.peers [--methods dense badam stream-K16 ...] [--output FILE]

SmolLM2-135M in bf16, one reasoning-gym task, the same batches in the same order for everyone. Each
method has a process of its own, one after another, and does four things there:

rate     Successive halving from the rate that its authors, or dense AdamW, suggest: three rates a
         factor of two apart at a quarter of `--steps` (up to five where the best is at the edge),
         the better two at half. The same budget for everyone; what goes the way of another row to
         the bit takes its rate.
steps    Held-out loss after `--steps` steps, the mean over seeds. In the first seed's run a meter
         looks at the tensors that live (benchmarks/meter.py). Not timed.
time     Dense AdamW and the method take turns, one step each, in the same process, and a round
         gives the ratio of their sums: what else the machine does in a minute meets both, and no
         number depends on another process's hour. Rounds are whole cycles where blocks differ in
         cost. About 512 tokens a step; with the 130 of training, dense AdamW's update would be half
         of its step and flatter whoever updates less. The table has the median round and the
         smallest and largest beside it; dense AdamW's own row is two of it taking turns, so its
         spread is the noise.
seconds  Held-out loss after as many steps as fit, by that ratio, into the seconds of dense AdamW's.
         Steps are counted, no clock is read: noise touches only the ratio.

The noise of a run is the spread of dense AdamW's own row; nothing else may run meanwhile. The goals
below the table are judged by medians, so read them with that spread. All numbers but losses are
ratios within this run.

Not equal for all: dense AdamW, LoRA and the rule of chunks start from rates that were tuned on
these tasks before (benchmarks/quality.py), the others from a package's default or from dense
AdamW's; LOMO's start was moved after a trial of 12 steps (1e-2 diverged). The ladder is to make up
for it: a rate at its end is a reason to look again.

Each finished part is a line of `peers.jsonl` and is not done again (`--fresh` forgets the lines of
the methods named). A method that fails is a row with its error. Hours for all of them.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.meter import KINDS, Meter, PrivateMemory, working
from benchmarks.methods import commit, provenance
from benchmarks.peer_methods import ENTRIES, Entry
from benchmarks.quality import TASKS, Data, Results, halving, train
from chunkft.models.load import load_model

Row = dict[str, Any]
OURS = ("stream", "spread", "exact")
TIMING_RATE = 1e-5  # time does not depend on it, and weights stay sane


class Contestant:
    """One method in its process; its parts are read from the results where they are there."""

    def __init__(self, name: str, data: Data, results: Results, options: argparse.Namespace):
        self.name, self.entry = name, ENTRIES[name]
        self.data, self.results, self.options = data, results, options
        self.key = {"name": name, "task": options.task, "budget": options.steps}

    def run(self) -> None:
        lr = self.rate()
        seeds, budget = range(self.options.seeds), self.options.steps
        losses = [self.loss("steps", lr, budget, seed, watch=seed == 0) for seed in seeds]
        timed = self.time()
        ratio = 1.0 if self.name == "dense" else seconds(timed, self.entry)
        fitting = max(1, round(budget / ratio))
        in_time = losses
        if fitting != budget:
            in_time = [self.loss("seconds", lr, fitting, seed) for seed in seeds]
        seen = self.results.all(kind="bytes", **self.key)[-1]
        found: Row = {"lr": lr, "losses": losses, "fitting": fitting, "in_time": in_time}
        found["commit"] = commit()
        found |= {part: timed[part] for part in ("ratios", "rare")}
        found |= {part: seen[part] for part in ("bytes", "held", "resting", "private")}
        self.results.add({"kind": "done", **summary_key(self.name, self.options), **found})

    def rate(self) -> float:
        if self.entry.rate_of:
            source = summary_key(self.entry.rate_of, self.options)
            done = self.results.all(kind="done", **source)
            if not done:
                raise ValueError(
                    f"{self.name} takes the rate of {self.entry.rate_of}: run it first"
                )
            return done[-1]["lr"]
        if not self.options.tune:
            return self.entry.rate

        def loss(lr: float, share: float) -> float:
            return self.loss("tune", lr, max(1, round(share * self.options.steps)), seed=0)

        return halving(self.entry.rate, loss)

    def loss(self, kind: str, lr: float, steps: int, seed: int, watch: bool = False) -> float:
        line = {"kind": kind, **self.key, "lr": lr, "steps": steps, "seed": seed}
        done = self.results.all(**line)
        if done:
            return done[0]["loss"]
        method = self.entry.make(lr, seed)
        if watch:
            meter = Meter(method)
            with PrivateMemory() as memory:
                loss = train(meter, lr, steps, self.data, seed)
            seen = {"bytes": meter.largest, "held": meter.held, "resting": meter.resting}
            self.results.add({"kind": "bytes", **self.key, **seen, "private": memory.peak})
        else:
            loss = train(method, lr, steps, self.data, seed)
        self.results.add({**line, "loss": round(loss, 6)})
        return round(loss, 6)

    def time(self) -> Row:
        turns = self.options.turns or self.entry.cycle
        line = {"kind": "time", "name": self.name, "task": self.options.task}
        line |= {"rounds": self.options.rounds, "turns": turns}
        done = self.results.all(**line)
        if done:
            return done[0]
        ratios, rare = measure(self.entry, self.data, self.options.rounds, turns)
        self.results.add(line | {"ratios": [round(r, 4) for r in ratios], "rare": round(rare, 3)})
        return self.results.rows[-1]


def measure(entry: Entry, data: Data, rounds: int, turns: int) -> tuple[list[float], float]:
    """Each round's seconds over dense AdamW's, and the first step's extra work in dense steps."""
    dense, method = ENTRIES["dense"].make(TIMING_RATE, 0), entry.make(TIMING_RATE, 0)
    batches = data.batches(0, 4)

    def turn() -> tuple[float, float]:
        batch, taken = next(batches), []
        for one in (dense, method):
            begin = time.perf_counter()
            one.step(batch)
            taken.append(time.perf_counter() - begin)
        return taken[0], taken[1]

    first = turn()[1]
    turn()  # the first ones allocate
    sums = []
    for _ in range(rounds):
        taken = [turn() for _ in range(turns)]
        sums.append([sum(times) for times in zip(*taken, strict=True)])
    dense_step = statistics.median(its for its, _ in sums) / turns
    step = statistics.median(mine for _, mine in sums) / turns
    rare = (first - step) / dense_step if entry.rare else 0.0
    return [mine / its for its, mine in sums], max(0.0, rare)


def seconds(row: Row, entry: Entry) -> float:
    """Of a step, over dense AdamW's."""
    return statistics.median(row["ratios"]) + (row["rare"] / entry.rare if entry.rare else 0.0)


def summary_key(name: str, options: argparse.Namespace) -> Row:
    """What must agree for a method's summary to be this run's."""
    names = ("task", "seeds", "rounds", "turns", "tune")
    return {"name": name, "budget": options.steps} | {n: getattr(options, n) for n in names}


def run_apart(name: str, path: Path, options: argparse.Namespace) -> None:
    """The method in a process of its own; what it dies of becomes a line of the results."""
    command = [sys.executable, "-m", "benchmarks.peers", "--alone", name, *sys.argv[1:]]
    with tempfile.TemporaryFile("w+") as stderr:
        code = subprocess.run(command, stderr=stderr, check=False).returncode
        stderr.seek(0)
        said = [line.strip() for line in stderr if line.strip()]
    if code:
        error = f"signal {-code}" if code < 0 or not said else said[-1]
        print(*said[-20:], sep="\n", file=sys.stderr)
        found = {"error": error, "commit": commit()}
        Results(path).add({"kind": "error", **summary_key(name, options), **found})


def forget(names: list[str], path: Path) -> None:
    kept = [row for row in Results(path).rows if row["name"] not in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


# -- what is shown --------------------------------------------------------------------------------


def latest(results: Results, options: argparse.Namespace) -> dict[str, Row]:
    """Each method's summary or, where it has none, its last error."""
    found: dict[str, Row] = {}
    for name in ENTRIES:
        key = summary_key(name, options)
        rows = results.all(kind="done", **key) or results.all(kind="error", **key)
        if rows:
            found[name] = rows[-1]
    return found


def table(rows: dict[str, Row]) -> str:
    """Markdown; bytes over dense AdamW's gradient + master + state + temporary."""
    columns = ["seconds a step", "/ LoRA", "working bytes", *KINDS, "at rest", "process"]
    columns += ["lr", "loss after equal steps", "loss after equal seconds (steps)"]
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    dense, lora = rows.get("dense", {}), rows.get("lora", {})
    whole = working(dense.get("bytes", {})) or math.nan
    lora_seconds = seconds(lora, ENTRIES["lora"]) if "ratios" in lora else math.nan
    for name, row in rows.items():
        entry = ENTRIES[name]
        if "error" in row:
            # a pipe would end the cell
            lines.append(f"| {entry.title} | failed: {row['error'].replace('|', '/')} |")
            continue
        step = seconds(row, entry)
        share = [row["bytes"][kind] / whole for kind in KINDS]
        process = row["private"] / (dense.get("private") or math.nan)
        cells = [f"{step:.3f} ({min(row['ratios']):.3f} to {max(row['ratios']):.3f})"]
        cells += [f"{step / lora_seconds:.3f}", f"{sum(share):.3f}"]
        cells += [f"{s:.3f}" if s else "" for s in (*share, row["resting"] / whole)]
        cells += [f"{process:.2f}", f"{row['lr']:.2g}", _mean(row["losses"])]
        cells += [f"{_mean(row['in_time'])} ({row['fitting']})"]
        lines.append(f"| {entry.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(losses: list[float]) -> str:
    spread = f" [{min(losses):.3f} to {max(losses):.3f}]" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{spread}"


def goals(rows: dict[str, Row]) -> str:
    """What the comparison is to show, with the number beside the bound."""
    done = {name: row for name, row in rows.items() if "error" not in row}
    step = {name: seconds(row, ENTRIES[name]) for name, row in done.items()}
    size = {name: working(row["bytes"]) for name, row in done.items()}
    chunk = {n: s for n, s in size.items() if n.startswith(OURS[:2])}
    peers = {n: s for n, s in size.items() if not n.startswith(OURS)}
    lines = []

    def goal(text: str, value: float, bound: float, *names: str) -> None:
        if set(names) <= set(done):
            verdict = "met" if value <= bound else "MISSED"
            lines.append(f"- {text}: {value:.3f}, at most {bound:g}: {verdict}")

    def over(one: str, other: str) -> float:
        return step.get(one, math.nan) / step.get(other, math.nan)

    goal("seconds of stream K=16 / dense", step.get("stream-K16", 0), 0.60, "stream-K16")
    for one, what in (("stream-K38", "all weights"), ("stream-layers", "BAdam's weights only")):
        text = f"seconds of stream / BAdam, equal block bytes, {what}"
        goal(text, over(one, "badam"), 1.0, one, "badam")
    goal("seconds of spread K=16 / dense", step.get("spread-K16", 0), 0.75, "spread-K16")
    goal("seconds of spread K=16 / LoRA", over("spread-K16", "lora"), 1.0, "spread-K16", "lora")
    if chunk and peers:
        least, rival = min(chunk, key=chunk.__getitem__), min(peers, key=peers.__getitem__)
        text = f"working bytes of {ENTRIES[least].title} / least peer ({ENTRIES[rival].title})"
        goal(text, chunk[least] / peers[rival], 1.0)
    if {"exact-K16", "dense"} <= set(done):
        pairs = zip(done["exact-K16"]["losses"], done["dense"]["losses"], strict=True)
        apart = max(abs(a - b) for a, b in pairs)
        text = f"loss of exact, apart from dense (its seconds: {step['exact-K16']:.2f} of dense)"
        goal(text, apart, 0.0)
    return "\n".join(lines)


def head(options: argparse.Namespace) -> str:
    tuning = "chosen by successive halving" if options.tune else "the starting ones, not tuned"
    turns = f"{options.turns} turns" if options.turns else "whole cycles, 16 turns at least"
    return (
        "# Chunks and their peers: SmolLM2-135M, bf16\n\n"
        f"`python -m benchmarks.peers --steps {options.steps} --seeds {options.seeds} "
        f"--rounds {options.rounds}`, task {options.task}, written {provenance()}. "
        f"Seconds: median over {options.rounds} rounds (smallest to largest) of {turns}, over "
        "dense AdamW's in the same process. Bytes: at the moment of the most working bytes, over "
        "dense AdamW's working bytes; `temporary` is all else that an update makes; `at rest` lies "
        "on the host beside a GPU, here in the same memory. Process: private memory, over dense "
        "AdamW's. Losses: held out, mean over seeds [smallest to largest]; learning rates "
        f"{tuning}.\n\n"
    )


def notes(rows: dict[str, Row]) -> str:
    lines = []
    for name, row in rows.items():
        entry = ENTRIES[name]
        start = f"lr from {entry.rate:.2g}, {entry.source}"
        if entry.rate_of:
            start = f"the lr of {ENTRIES[entry.rate_of].title}"
        note = f"; {entry.note}" if entry.note else ""
        lines.append(f"- {entry.title}: {start}{note}; at {row['commit']}.")
    return "\n".join(lines)


def plot(rows: dict[str, Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 5))
    done = {name: row for name, row in rows.items() if "error" not in row}
    whole = working(done["dense"]["bytes"])
    for name, row in done.items():
        ours = name.startswith(OURS)
        values = (seconds(row, ENTRIES[name]), statistics.mean(row["in_time"]))
        for panel, value in zip(panels, values, strict=True):
            at = working(row["bytes"]) / whole, value
            panel.plot(*at, "o", c="tab:blue" if ours else "tab:gray")
            panel.annotate(name, at, xytext=(4, 3), textcoords="offset points", fontsize=8)
    panels[0].set(title="seconds a step / dense AdamW")
    panels[1].set(title="held-out loss after equal seconds", yscale="log")
    for panel in panels:
        panel.set(xlabel="working bytes / dense AdamW", xscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", choices=list(ENTRIES), default=list(ENTRIES))
    parser.add_argument("--steps", type=int, default=100, help="of dense AdamW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--turns", type=int, help="of a round; whole cycles where left out")
    parser.add_argument("--task", choices=list(TASKS), default="reverse")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="starting rates")
    parser.add_argument("--fresh", action="store_true", help="forget what these methods did")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--output", type=Path, help="write the table to this file, the plot beside")
    parser.add_argument("--alone", choices=list(ENTRIES), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    path = options.work / "peers.jsonl"
    if options.alone:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        _, tokenizer = load_model("smollm2-135m")
        data = Data(options.task, tokenizer)
        Contestant(options.alone, data, Results(path), options).run()
        return
    options.work.mkdir(parents=True, exist_ok=True)
    # everything is told over dense AdamW, so its row is always there
    names = [name for name in ENTRIES if name in ("dense", *options.methods)]
    if options.fresh and path.exists():
        forget(options.methods, path)
    for name in names:
        if not Results(path).all(kind="done", **summary_key(name, options)):
            run_apart(name, path, options)
    rows = latest(Results(path), options)
    text = "\n\n".join((table(rows), goals(rows), notes(rows)))
    print(text)
    if options.output:
        options.output.write_text(head(options) + text + "\n")
        if "bytes" in rows["dense"]:
            plot(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
