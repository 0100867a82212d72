"""Held-out loss after equal seconds: chunk layouts, K and T against dense AdamW and LoRA.

    python -m benchmarks.quality [--steps 120] [--seeds 3] [--only spread-K16-T1 ...]

SmolLM2-135M, bf16, two reasoning-gym tasks. Dense AdamW takes `--steps` steps; every other method
as many as fit into the same seconds, by the ratio of their step times measured at the start of the
run. Counting steps instead of reading the clock keeps a noisy machine out of the result.

Learning rates by successive halving: four rates at a quarter of the budget, the better two at half,
the best at the whole, with `--seeds` seeds. Each finished training run is a line of the results
file, and is not done again when the script is called again: it can be spread over sessions.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import Batch, Method, build, loss_of
from chunkft.data.tasks import ReasoningGymTask
from chunkft.models.load import load_model

TASKS = {
    "reverse": "reasoning-gym:word_sequence_reversal?min_words=3&max_words=6",
    "sum": "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=2&max_digits=2",
}
ROWS, TRAIN, HELD_OUT = 8, 4000, 96
RATES = {"dense": 1.5e-4, "lora": 1e-3}
FACTORS = (0.5, 1.0, 2.0, 4.0)
CHUNK_RATE = 1.5e-4  # times sqrt(K)
WARM_UP = 0.05


def candidates() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"dense": {}, "lora": {}}
    for layout in ("stream", "spread"):
        for chunks in (4, 8, 16, 32):
            for interval in (1, 20):
                found[f"{layout}-K{chunks}-T{interval}"] = {
                    "layout": layout,
                    "chunks": chunks,
                    "interval": interval,
                }
    return found


class Data:
    """Batches of a task: conversations padded on the right, loss on the answers."""

    def __init__(self, task: str, tokenizer: Any):
        source = ReasoningGymTask.parse(TASKS[task])
        train = source.records(TRAIN, seed=0)
        held_out = source.held_out(HELD_OUT, 0, train).records
        self.pad = tokenizer.pad_token_id
        self.train = [self._encode(tokenizer, r) for r in train]
        self.held_out = [self._encode(tokenizer, r) for r in held_out]

    @staticmethod
    def _encode(tokenizer: Any, record: Any) -> tuple[list[int], int]:
        prompt = tokenizer.apply_chat_template(
            record["prompt"], add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(
            record["prompt"] + record["completion"], return_dict=False
        )
        return whole, len(prompt)

    def _batch(self, rows: list[tuple[list[int], int]]) -> Batch:
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), self.pad)
        labels = torch.full((len(rows), length), -100)
        for i, (tokens, prompt) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
        return {"input_ids": ids, "labels": labels, "attention_mask": (ids != self.pad).long()}

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for first in range(0, len(order) - ROWS + 1, ROWS):
                yield self._batch([self.train[i] for i in order[first : first + ROWS]])

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        model.eval()
        losses = []
        for first in range(0, len(self.held_out), ROWS):
            losses.append(loss_of(model, self._batch(self.held_out[first : first + ROWS])).item())
        model.train()
        return statistics.mean(losses)


def make(name: str, lr: float, seed: int) -> Method:
    settings = candidates()[name]
    kind = name if name in RATES else "chunk"
    return build(kind, lr, seed, **settings)


def train(name: str, lr: float, steps: int, data: Data, seed: int) -> float:
    """Held-out loss after `steps` steps; linear warm-up, then a cosine to zero."""
    method, batches = make(name, lr, seed), data.batches(seed)
    warm_up = max(1, int(WARM_UP * steps))
    for step in range(steps):
        done = (step - warm_up) / max(1, steps - warm_up)
        scale = (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * done))
        method.set_lr(lr * scale)
        if not math.isfinite(method.step(next(batches))):
            return float("inf")
    return data.loss(method.model)


def step_seconds(name: str, data: Data) -> float:
    """Mean over one cycle (T=1), after two steps of warm-up."""
    settings = candidates()[name]
    method, batches = make(name, 1e-5, 0), data.batches(0)
    count = settings.get("chunks", 8)
    for _ in range(2):
        method.step(next(batches))
    begin = time.perf_counter()
    for _ in range(count):
        method.step(next(batches))
    return (time.perf_counter() - begin) / count


def rates(name: str) -> list[float]:
    chunks = candidates()[name].get("chunks")
    base = RATES[name] if chunks is None else CHUNK_RATE * math.sqrt(chunks)
    return [base * factor for factor in FACTORS]


class Results:
    """Finished runs, one JSON line each; what is there is not run again."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def get(self, **key: Any) -> dict[str, Any] | None:
        return next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")


def race(task: str, name: str, data: Data, results: Results, budget: int, seeds: int) -> None:
    """Successive halving of the learning rate, then the finals."""
    ratio = results.get(kind="ratio", name=name)
    assert ratio is not None

    def held_out(lr: float, share: float, seed: int) -> float:
        key = {"kind": "run", "task": task, "name": name, "lr": lr, "share": share, "seed": seed}
        done = results.get(**key)
        if done is None:
            steps = max(1, round(share * budget / ratio["ratio"]))
            done = key | {"steps": steps, "loss": train(name, lr, steps, data, seed)}
            results.add(done)
            print(json.dumps(done), flush=True)
        return done["loss"]

    left = rates(name)
    for share, keep in ((0.25, 2), (0.5, 1)):
        left = sorted(left, key=lambda lr: held_out(lr, share, 0))[:keep]
    for seed in range(seeds):
        held_out(left[0], 1.0, seed)


def measure_ratios(names: list[str], data: Data, results: Results) -> None:
    missing = [n for n in names if results.get(kind="ratio", name=n) is None]
    if not missing:
        return
    speeds: dict[str, float] = {}
    for name in missing:
        # T does not change what a step computes, only how often state moves
        twin = name.replace("-T20", "-T1")
        if twin not in speeds:
            dense = [step_seconds("dense", data)]
            speed = step_seconds(twin, data)
            dense.append(step_seconds("dense", data))
            speeds[twin] = speed / statistics.mean(dense)
        row = {"kind": "ratio", "name": name, "ratio": round(speeds[twin], 3)}
        results.add(row)
        print(json.dumps(row), flush=True)


def table(results: Results, tasks: list[str]) -> str:
    lines = ["| method | s/step / dense | " + " | ".join(f"{t}: loss (lr)" for t in tasks) + " |"]
    lines.append("|---" * (2 + len(tasks)) + "|")
    for name in candidates():
        finals = [
            [r for r in results.rows if (r.get("task"), r.get("name")) == (t, name)
             and r.get("share") == 1.0]
            for t in tasks
        ]  # fmt: skip
        ratio = results.get(kind="ratio", name=name)
        if ratio is None or not any(finals):
            continue
        cells = [
            f"{statistics.mean(r['loss'] for r in rows):.3f} "
            f"({min(r['loss'] for r in rows):.3f} to {max(r['loss'] for r in rows):.3f}; "
            f"{rows[0]['lr']:.1e})"
            if rows
            else ""
            for rows in finals
        ]
        lines.append(f"| {name} | {ratio['ratio']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="of dense AdamW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/quality.jsonl"))
    options = parser.parse_args()
    names = options.only or list(candidates())
    results = Results(options.results)
    _, tokenizer = load_model("smollm2-135m")
    for i, task in enumerate(options.tasks):
        data = Data(task, tokenizer)
        if i == 0:
            measure_ratios(names, data, results)
        for name in names:
            settings = candidates()[name]
            ratio = results.get(kind="ratio", name=name)
            assert ratio is not None
            cycle = settings.get("chunks", 1) * settings.get("interval", 1)
            if 2 * cycle > options.steps / ratio["ratio"]:
                print(f"{name}: two cycles of {cycle} steps do not fit, left out", flush=True)
                continue
            race(task, name, data, results, options.steps, options.seeds)
    print(table(results, options.tasks))


if __name__ == "__main__":
    main()
