"""The records of a job, and what max_length and the model's reach leave of them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTConfig, get_dataset

from chunkft.data.lengths import check_lengths
from chunkft.data.shapes import Wanted
from chunkft.data.sources import load_records
from chunkft.data.tasks import PREFIX, ReasoningGymTask
from chunkft.errors import InputError
from chunkft.models.load import learned_positions
from chunkft.recipes.job import Job

SAMPLE = 64  # held-out items at least, or training records whose loss stands in for them


@dataclass
class Data:
    """Records of a run; `task` scores them where they come from reasoning-gym."""

    train: Any
    held_out: Any | None = None
    task: ReasoningGymTask | None = None
    items: Any | None = None
    """Held-out questions with their answers, for `task` to score."""
    by_loss: bool = True
    """Whether a loss on held-out records says anything; of rollouts it does not."""


def load_data(job: Job, wanted: Wanted = "training") -> Data:
    """The records that a job names."""
    script, size = job.script, job.chunk.train_samples
    if job.mixture.datasets:
        if job.mixture.streaming:
            raise InputError("streaming: true has no length to cut cycles from; leave it out")
        mixed: Any = get_dataset(job.mixture)
        return Data(mixed["train"], mixed.get("test"), by_loss=wanted != "prompt")
    source = script.dataset_name
    if not source:
        raise InputError(
            "no data: give --dataset_name a .jsonl, .json, .csv or .parquet file, a hub id, or "
            "reasoning-gym:<task>"
        )
    if source.startswith(PREFIX):
        task = ReasoningGymTask.parse(source)
        train = task.records(size, seed=job.training.seed)
        held_out = task.held_out(max(job.chunk.score_samples, SAMPLE), job.training.seed, train)
        if held_out.dropped:
            print(f"{held_out.dropped} held-out items that occur in training were dropped")
        items = held_out.records
        if wanted == "prompt":
            return Data(train.remove_columns("completion"), None, task, items, by_loss=False)
        if wanted == "preference":
            return Data(task.preferences(train), task.preferences(items), task, items)
        return Data(train, items, task, items)
    more: dict[str, Any] = {"wanted": wanted}
    if wanted == "training":
        more["text_field"] = job.training.dataset_text_field
    if script.dataset_config:
        more["config"] = {"name": script.dataset_config}
    train = load_records(source, split=script.dataset_train_split, **more)
    held_out = None
    if str(getattr(job.training.eval_strategy, "value", job.training.eval_strategy)) != "no":
        held_out = load_records(source, split=script.dataset_test_split, **more)
    return Data(train, held_out, by_loss=wanted != "prompt")


def tokens_of(record: dict[str, Any], tokenizer: Any, field: str = "text") -> dict[str, list[int]]:
    """The `input_ids` that TRL will make of a record."""
    turns = record.get("messages") or record.get("prompt")
    if isinstance(turns, list):
        turns = turns + (record.get("completion") or [])
        return {"input_ids": tokenizer.apply_chat_template(turns, return_dict=False)}
    text = record[field] if field in record else record["prompt"] + record["completion"]
    # TRL ends what is no conversation with eos
    eos = tokenizer.eos_token or ""
    return {"input_ids": tokenizer(text.removesuffix(eos) + eos)["input_ids"]}


def check_raw(records: Any, tokenizer: Any, args: SFTConfig) -> None:
    """Say what max_length cuts off; on a sample first, on all if all of it is too long."""
    field = args.dataset_text_field
    tokens = partial(tokens_of, tokenizer=tokenizer, field=field)
    if not {"messages", "prompt", field} & set(records.column_names):
        return  # another of TRL's shapes, from a mixture
    split = args.packing and args.packing_strategy == "bfd_split"
    truncation = "split" if split else "keep_start"
    for count in (min(1000, len(records)), len(records)):
        sample = records.select(range(count)).map(tokens, desc="measuring lengths")
        try:
            check_lengths(sample, args.max_length, truncation=truncation)
            return
        except InputError:
            if count == len(records):
                raise


def prompt_lengths(records: Any, tokenizer: Any) -> list[int]:
    """Tokens of each record's prompt, with what asks for an answer."""

    def tokens(record: dict[str, Any]) -> dict[str, int]:
        prompt = record["prompt"]
        if isinstance(prompt, list):
            made = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=False
            )
        else:
            made = tokenizer(prompt)["input_ids"]
        return {"length": len(made)}

    return records.map(tokens, desc="measuring prompts")["length"]


def check_prompts(records: Any, tokenizer: Any, max_length: int | None) -> None:
    """Say how many preferences TRL will leave out: their prompt alone fills `max_length`.

    Raises:
        InputError: none is left.
    """
    if max_length is None or "prompt" not in records.column_names:
        return
    lengths = prompt_lengths(records, tokenizer)
    over = sum(length >= max_length for length in lengths)
    if over == len(records):
        raise InputError(
            f"all {over} prompts have --max_length {max_length} tokens or more, the shortest "
            f"{min(lengths)}, which leaves no room for an answer; raise --max_length"
        )
    if over:
        print(
            f"warning: {over} of {len(records)} preferences have a prompt of --max_length "
            f"{max_length} tokens or more and are left out"
        )


def check_tokenized(rows: Dataset, model: PreTrainedModel, args: SFTConfig, records: int) -> None:
    """What TRL made `rows` of `records` records: something, and within the model's reach."""
    longest = check_lengths(rows, None).longest
    if args.packing:
        longest = max(max(row) for row in rows["seq_lengths"])
    elif len(rows) < records:
        print(
            f"warning: {records - len(rows)} of {records} records have no token to learn within "
            f"--max_length {args.max_length} and are left out"
        )
    reach = learned_positions(model)
    if reach is not None and longest > reach:
        raise InputError(
            f"records of {longest} tokens, but the model knows {reach} positions; use "
            f"--max_length {reach}"
        )
