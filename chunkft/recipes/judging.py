"""What a model can do before and after a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from chunkft.core.ranks import world_size
from chunkft.recipes.records import SAMPLE, Data
from chunkft.train import processes
from chunkft.train.checkpoints import BEFORE
from chunkft.train.scoring import Solved, solve

PREFERRED = ("rewards/accuracies", "rewards/margins", "accuracy", "margin")


def evaluate(
    trainer: Trainer, data: Data, score_samples: int
) -> tuple[dict[str, float], Solved | None]:
    """Loss on what is held out, or on a sample of training; and the share of right answers.

    Of rollouts the mean reward in the place of the loss; where a task scores the answers they write
    greedily, its scores alone.
    """
    result: dict[str, float] = {}
    if data.by_loss or data.task is None:
        result = _evaluated(trainer, data)
    solved = None
    if data.task is not None and score_samples > 0:
        assert data.items is not None
        records = data.items.select(range(min(score_samples, len(data.items)))).to_list()
        solved = solve(trainer.model, trainer.processing_class, data.task, records)
        result["exact-match accuracy"] = solved.accuracy
        result["mean score"] = sum(solved.scores) / len(solved.scores)
    return result, solved


def _evaluated(trainer: Trainer, data: Data) -> dict[str, float]:
    """What the trainer's own evaluation says."""
    rows: Any = trainer.eval_dataset
    prefix, what = "eval", "loss"
    given = None  # TRL prepares rows that are handed to it, and its own are prepared already
    if rows is None:
        train: Any = trainer.train_dataset
        given = rows = train.select(range(min(SAMPLE, len(train))))
        prefix, what = "sample", f"loss of {len(rows)} training rows"
    args = trainer.args
    drops = args.dataloader_drop_last
    if len(rows) < args.eval_batch_size * world_size():
        args.dataloader_drop_last = False  # it would drop all there are
    try:
        measured = trainer.evaluate(eval_dataset=given, metric_key_prefix=prefix)
    finally:
        args.dataloader_drop_last = drops
    result = {what: measured[f"{prefix}_loss"]}
    told: Mapping[str, float] = getattr(trainer, "judged", {})
    if not data.by_loss:
        return {"mean reward": told["reward"]}
    return result | {name: told[name] for name in PREFERRED if name in told}


def before(
    out: Path, trainer: Trainer, data: Data, score_samples: int, fresh: bool
) -> tuple[dict[str, float], list[str]]:
    """The numbers before training; a resumed run reads those of its beginning."""
    path = out / BEFORE

    def read() -> dict[str, Any] | None:
        return None if fresh or not path.exists() else json.loads(path.read_text())

    if (kept := processes.from_main(read)) is not None:
        return kept["numbers"], kept["answers"]
    numbers, solved = evaluate(trainer, data, score_samples)
    answers = solved.answers if solved else []
    if processes.is_main():
        path.write_text(json.dumps({"numbers": numbers, "answers": answers}))
    print("before: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()), flush=True)
    return numbers, answers


def samples(
    data: Data, before: Sequence[str], after: Solved | None, count: int = 5
) -> list[tuple[str, str, str, str]]:
    if after is None or data.items is None:
        return []
    rows = data.items.select(range(min(count, len(after.answers)))).to_list()
    earlier = list(before) + [""] * len(rows)
    return [
        (row["prompt"][0]["content"], row["completion"][0]["content"], earlier[i], after.answers[i])
        for i, row in enumerate(rows)
    ]
