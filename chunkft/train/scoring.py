"""Greedy answers to verifiable questions, and the share that is exactly right."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from chunkft.core.ranks import world_size
from chunkft.data.tasks import ReasoningGymTask
from chunkft.train import processes, sharding

BATCH = 25


class Solved(NamedTuple):
    """Answers to a set of records, and their exact-match accuracy in [0, 1]."""

    accuracy: float
    answers: list[str]
    scores: list[float]
    """The task's own, of each answer."""


@torch.no_grad()
def solve(
    model: Any,
    tokenizer: Any,
    task: ReasoningGymTask,
    records: Sequence[dict[str, Any]],
    max_new_tokens: int | None = None,
    sample: bool = False,
) -> Solved:
    """Answer each record greedily; right means the task's own scorer gives the full 1.0.

    Args:
        records: rows with `prompt`, `completion` and what the task needs to score.
        max_new_tokens: None takes twice the longest reference answer, and 8 at least.
        sample: draw answers at temperature 1 instead.
    """
    if max_new_tokens is None:
        references = [record["completion"][0]["content"] for record in records]
        longest = max(len(tokenizer(text)["input_ids"]) for text in references)
        max_new_tokens = max(8, 2 * longest)
    # each rank answers its share, but where a forward pass needs all of them
    together = sharding.sharded(model)
    mine = records if together else records[processes.rank() :: world_size()]
    training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    answers: list[str] = []
    try:
        for first in range(0, len(mine), BATCH):
            prompts = [record["prompt"] for record in mine[first : first + BATCH]]
            batch = tokenizer.apply_chat_template(
                prompts,
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            ).to(model.device)
            output = model.generate(
                **batch,
                do_sample=sample,
                temperature=1.0 if sample else None,
                top_p=None,
                top_k=0 if sample else None,
                use_cache=True,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = output[:, batch["input_ids"].shape[1] :]
            answers += [t.strip() for t in tokenizer.batch_decode(new, skip_special_tokens=True)]
    finally:
        model.train(training)
        tokenizer.padding_side = side
    if not together:
        answers = processes.collected(answers)
    scores = [task.score(r, a) for r, a in zip(records, answers, strict=True)]
    return Solved(sum(score >= 1.0 for score in scores) / len(scores), answers, scores)
