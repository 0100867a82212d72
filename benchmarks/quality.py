"""Held-out loss after equal seconds: chunk layouts, K and T against dense AdamW and LoRA.

    python -m benchmarks.quality [--steps 100] [--tasks reverse] [--only spread-K16-T1-beta0.5 ...]

SmolLM2-135M, bf16, two reasoning-gym tasks. Dense AdamW takes `--steps` steps; every other method
as many as fit into the same seconds, by the ratio of their step times, measured first at about 512
tokens a step. Counting steps instead of reading the clock keeps a noisy machine out of the result,
and lets the training itself use small batches (130 tokens), which would flatter chunks if their own
clock counted: dense AdamW's update then takes half of its step.

Learning rates by successive halving: three rates a factor of two apart at a quarter of the budget
(more where the best lies at the edge), the better two at half, the best at the whole. What differs
only in T, order, deal or warm-up takes the rate found without. Finalists run with three seeds:
dense, LoRA, spread at K=16, and the best of each layout.

Each finished training run is a line of the results file and is not done again when the script is
called again, so it can be spread over sessions, and tasks over processes of one thread each (the
ratios first, `--ratios`, with nothing else running).
"""

import argparse
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.meter import Meter
from benchmarks.methods import Batch, Method, build, loss_of, provenance
from chunkft.core.partition import Partition, Slice, cut
from chunkft.core.partition import Tensor as Shape
from chunkft.core.schedule import ORDERS
from chunkft.data.tasks import ReasoningGymTask
from chunkft.models.load import load_model

# source, rows of a step: both make steps of about 130 tokens
TASKS = {
    "reverse": ("reasoning-gym:word_sequence_reversal?min_words=3&max_words=6", 4),
    "sum": ("reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=2&max_digits=2", 6),
}
TRAIN, HELD_OUT = 4000, 96
RATES = {"dense": 1.5e-4, "lora": 1e-3}
CHUNK_RATE = 1.5e-4  # times sqrt(K)
WARM_UP = 0.05
ASIDE = ("dealt", "warm")  # words of a name that are no setting of the optimizer
SEEDS = 3
GRID = [*RATES] + [
    f"{layout}-K{chunks}-T{interval}"
    for interval in (1, 20)
    for layout in ("stream", "spread")
    for chunks in (4, 8, 16, 32)
]


SERIES = (  # lines of the plot: layout, rest of the name, color, style
    ("stream", "T1", "tab:orange", "-"),
    ("stream", "T20", "tab:orange", "--"),
    ("spread", "T1", "tab:blue", "-"),
    ("spread", "T20", "tab:blue", "--"),
    ("spread", "T1-decay", "tab:green", "-"),
)


def settings_of(name: str) -> dict[str, Any]:
    """Of `layout-Kk-Tt[-word ...]`, or of dense or lora with words.

    A word is an order, a way with moments, betaX (Adam's beta1), dealt (see `dealt`), or warm: the
    learning rate warms up over a whole cycle.
    """
    base, *words = name.split("-")
    settings: dict[str, Any] = {}
    if base not in RATES:
        chunks, interval, *words = words
        settings = {"layout": base, "chunks": int(chunks[1:]), "interval": int(interval[1:])}
    for word in words:
        if word.startswith("beta"):
            settings["betas"] = (float(word.removeprefix("beta")), 0.999)
        elif word not in ASIDE:
            settings["order" if word in ORDERS else "moments"] = word
    return settings


def timed_as(name: str) -> str:
    """The method whose step and switch this one's cost."""
    base, *more = name.split("-")
    return base if base in RATES else "-".join([base, more[0], "T1"])


def tuned_as(name: str) -> str:
    """The method whose learning rate this one takes: moments and beta1 change a step's size."""
    timed = timed_as(name)
    words = name.split("-")[len(timed.split("-")) :]
    return "-".join([timed, *(w for w in words if w not in (*ORDERS, *ASIDE))])


def dealt(tensors: Sequence[Shape], chunks: int, layout: str) -> Partition:
    """The same slices, each tensor's dealt to its chunks in an order of its own.

    In `spread` chunk k holds the k-th share of every tensor; here, of each tensor another one.
    """
    generator = random.Random(0)
    partition = cut(tensors, chunks, layout)
    deal: list[list[Slice]] = [[] for _ in partition]
    for name in partition.shapes:
        pieces = [(k, p) for k, chunk in enumerate(partition) for p in chunk if p.name == name]
        keepers = [k for k, _ in pieces]
        generator.shuffle(keepers)
        for k, (_, piece) in zip(keepers, pieces, strict=True):
            deal[k].append(piece)
    return Partition(partition.shapes, deal)


class Data:
    """Batches of a task: the question's last line and the answer, padded on the right.

    Loss on the answers. Without the chat template and the instructions, which are the same in every
    row, a step is four times cheaper and the labels are the same.
    """

    def __init__(self, task: str, tokenizer: Any):
        address, self.rows = TASKS[task]
        source = ReasoningGymTask.parse(address)
        train = source.records(TRAIN, seed=0)
        held_out = source.held_out(HELD_OUT, 0, train).records
        self.pad = tokenizer.pad_token_id
        self.train = [self._encode(tokenizer, r) for r in train]
        self.held_out = [self._encode(tokenizer, r) for r in held_out]

    @staticmethod
    def _encode(tokenizer: Any, record: Any) -> tuple[list[int], int]:
        question = record["prompt"][-1]["content"].strip().splitlines()[-1] + "\n"
        prompt = tokenizer(question)["input_ids"]
        answer = tokenizer(record["completion"][0]["content"])["input_ids"]
        return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)

    def _batch(self, rows: list[tuple[list[int], int]]) -> Batch:
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), self.pad)
        labels = torch.full((len(rows), length), -100)
        for i, (tokens, prompt) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
        return {"input_ids": ids, "labels": labels, "attention_mask": (ids != self.pad).long()}

    def batches(self, seed: int, times: int = 1) -> Iterator[Batch]:
        rows = times * self.rows
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for first in range(0, len(order) - rows + 1, rows):
                yield self._batch([self.train[i] for i in order[first : first + rows]])

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        model.eval()
        losses = []
        for first in range(0, len(self.held_out), 8):
            losses.append(loss_of(model, self._batch(self.held_out[first : first + 8])).item())
        model.train()
        return statistics.mean(losses)


def kind_of(name: str) -> str:
    """dense, lora or chunk."""
    base = name.split("-", maxsplit=1)[0]
    return base if base in RATES else "chunk"


def make(name: str, lr: float, seed: int) -> Method:
    deal = dealt if "dealt" in name.split("-") else cut
    with patch("chunkft.core.optimizer.cut", deal):
        return build(kind_of(name), lr, seed, **settings_of(name))


def train(
    method: Method | Meter, lr: float, steps: int, data: Data, seed: int, warm_up: int = 0
) -> float:
    """Held-out loss after `steps` steps; linear warm-up, then a cosine to zero."""
    batches = data.batches(seed)
    warm_up = warm_up or max(1, int(WARM_UP * steps))
    for step in range(steps):
        done = (step - warm_up) / max(1, steps - warm_up)
        scale = (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * done))
        method.set_lr(lr * scale)
        if not math.isfinite(method.step(next(batches))):
            return float("inf")
    return data.loss(method.model)


def step_ratios(name: str, data: Data) -> tuple[float, float]:
    """Seconds of a step of four batches and of a switch of chunks, over those of a dense step.

    Dense AdamW and the method take turns, so that whatever else the machine does meets both; sums
    over two cycles of `stream`, whose chunks differ in cost, or 32 steps.
    """
    settings = settings_of(name)
    if kind_of(name) == "chunk":
        settings["interval"] = 2  # one step of a visit holds the switch, the other does not
    dense, method = build("dense", 1e-5), build(kind_of(name), 1e-5, **settings)
    batches, seconds = data.batches(0, 4), {dense: [0.0] * 2, method: [0.0] * 2}
    steps = 4 * settings["chunks"] if settings.get("layout") == "stream" else 32
    for step in range(2 + steps):
        batch = next(batches)
        for one in (dense, method):
            begin = time.perf_counter()
            one.step(batch)
            if step >= 2:  # the first ones allocate
                seconds[one][step % 2] += time.perf_counter() - begin
    ratios = [mine / its for mine, its in zip(seconds[method], seconds[dense], strict=True)]
    if kind_of(name) != "chunk":
        return statistics.mean(ratios), 0.0
    return min(ratios), max(ratios) - min(ratios)


class Results:
    """Finished runs, one JSON line each; what is there is not run again."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def all(self, **key: Any) -> list[dict[str, Any]]:
        return [r for r in self.rows if all(r.get(k) == v for k, v in key.items())]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def ratio(self, name: str) -> float:
        """Seconds a step over dense AdamW's."""
        row = self.all(kind="ratio", name=timed_as(name))[0]
        return row["step"] + row["switch"] / settings_of(name).get("interval", 1)

    def finals(self, task: str, name: str) -> list[dict[str, Any]]:
        return self.all(kind="run", task=task, name=name, share=1.0)


def measure_ratios(names: list[str], data: Data, results: Results) -> None:
    for name in dict.fromkeys(map(timed_as, names)):
        if not results.all(kind="ratio", name=name):
            step, switch = (1.0, 0.0) if name == "dense" else step_ratios(name, data)
            results.add(
                {"kind": "ratio", "name": name, "step": round(step, 3), "switch": round(switch, 3)}
            )


def halving(base: float, loss: Callable[[float, float], float]) -> float:
    """The best rate near `base`, by `loss(rate, share of the budget)`: successive halving."""
    ladder = [-1, 0, 1]  # powers of two

    def at(power: int, share: float) -> float:
        return loss(float(f"{base * 2.0**power:.3g}"), share)

    while True:
        best = min(ladder, key=lambda p: at(p, 0.25))
        if best not in (ladder[0], ladder[-1]) or len(ladder) == 5:
            break
        ladder = sorted([*ladder, ladder[0] - 1 if best == ladder[0] else ladder[-1] + 1])
    left = sorted(ladder, key=lambda p: at(p, 0.25))[:2]
    winner = min(left, key=lambda p: at(p, 0.5))
    return float(f"{base * 2.0**winner:.3g}")


class Race:
    """All runs of one task within the seconds of `budget` dense steps."""

    def __init__(self, task: str, data: Data, results: Results, budget: int):
        self.task, self.data, self.results, self.budget = task, data, results, budget

    def held_out(self, name: str, lr: float, share: float, seed: int = 0) -> float:
        key: dict[str, Any] = {"kind": "run", "task": self.task, "name": name}
        key |= {"lr": lr, "share": share, "seed": seed, "budget": self.budget}
        done = self.results.all(**key)
        if done:
            return done[0]["loss"]
        steps = max(1, round(share * self.budget / self.results.ratio(name)))
        warm_up = 0
        if "warm" in name.split("-"):
            warm_up = settings_of(name)["chunks"] * settings_of(name)["interval"]
        loss = train(make(name, lr, seed), lr, steps, self.data, seed, warm_up)
        self.results.add(key | {"steps": steps, "loss": round(loss, 4)})
        return loss

    def rate(self, name: str) -> float:
        """Successive halving from the rule's rate."""
        name = tuned_as(name)
        base = RATES.get(kind_of(name)) or CHUNK_RATE * math.sqrt(settings_of(name)["chunks"])
        return halving(base, lambda lr, share: self.held_out(name, lr, share))

    def final(self, name: str, seeds: int = 1, share: float = 1.0) -> float:
        rate = self.rate(name)
        return statistics.mean(self.held_out(name, rate, share, seed) for seed in range(seeds))

    def finalists(self) -> list[str]:
        found = [*RATES, "spread-K16-T1"]
        for layout in ("stream", "spread"):
            of_layout = [n for n in GRID if n.startswith(layout)]
            found.append(min(of_layout, key=self.final))
        return list(dict.fromkeys(found))


def table(results: Results, tasks: list[str]) -> str:
    """Mean (smallest to largest over seeds; learning rate; cycles)."""
    lines = ["| method | s/step |" + "".join(f" {t}: loss (seeds; lr; cycles) |" for t in tasks)]
    lines.append("|---" * (2 + len(tasks)) + "|")
    more = sorted({r["name"] for r in results.all(kind="run")} - set(GRID))
    for name in [*GRID, *more]:
        cells = []
        for task in tasks:
            rows = results.finals(task, name)
            if not rows:
                cells.append("")
                continue
            losses, settings = [r["loss"] for r in rows], settings_of(name)
            detail = f"{min(losses):.3f} to {max(losses):.3f}; " if len(rows) > 1 else ""
            detail += f"{rows[0]['lr']:.1e}"
            if "chunks" in settings:
                detail += f"; {rows[0]['steps'] / settings['chunks'] / settings['interval']:.1f}"
            cells.append(f"{statistics.mean(losses):.3f} ({detail})")
        if any(cells):
            lines.append(f"| {name} | {results.ratio(name):.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def head(options: argparse.Namespace) -> str:
    return (
        "# Held-out loss after equal seconds: SmolLM2-135M, bf16\n\n"
        f"`python -m benchmarks.quality --steps {options.steps}`, with `--only NAME` for rows "
        f"beyond its grid; written {provenance()}, from the runs in {options.results.name}. Every "
        f"method has the seconds of {options.steps} steps of dense AdamW; s/step is over dense "
        "AdamW's, switches included. A cell: mean held-out loss (over seeds: smallest to largest; "
        "learning rate, chosen on each task; cycles).\n\n"
    )


def plot(results: Results, tasks: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        for name, style in (("dense", "k-"), ("lora", "k:")):
            losses = [r["loss"] for r in results.finals(task, name)]
            if losses:
                panel.axhline(statistics.mean(losses), label=name, color=style[0], ls=style[1])
        for layout, rest, color, ls in SERIES:
            points = [
                (k, statistics.mean(r["loss"] for r in rows))
                for k in (4, 8, 16, 32)
                if (rows := results.finals(task, f"{layout}-K{k}-{rest}"))
            ]
            if points:
                label = f"{layout}, {rest}"
                panel.plot(*zip(*points, strict=True), ls, marker="o", c=color, label=label)
        panel.set(title=task, xlabel="K", ylabel="held-out loss after equal seconds")
        panel.set_xscale("log", base=2)
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="of dense AdamW")
    parser.add_argument("--only", nargs="*", help="names of methods, with `--seeds` seeds each")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of --steps, at the rates chosen for the whole"
    )
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--ratios", action="store_true", help="measure the step times and stop")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/quality.jsonl"))
    parser.add_argument("--output", type=Path, help="write the table to this file, the plot beside")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    results = Results(options.results)
    _, tokenizer = load_model("smollm2-135m")
    names = options.only or GRID
    measure_ratios(names, Data("reverse", tokenizer), results)
    for task in options.tasks if not options.ratios else []:
        race = Race(task, Data(task, tokenizer), results, options.steps)
        for name in names:
            race.final(name, options.seeds, options.share)
        for name in race.finalists() if not options.only else []:
            race.final(name, SEEDS)
    text = table(results, options.tasks)
    print(text)
    if options.output:
        options.output.write_text(head(options) + text + "\n")
        plot(results, options.tasks, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
