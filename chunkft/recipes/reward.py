"""A model that scores answers, trained on preferences: TRL's RewardTrainer on chunks.

The language model's head gives way to one output a text, new and trained with the rest; beside an
adapter it is trained as a whole (PEFT's modules_to_save).
"""

from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl import RewardTrainer

from chunkft.errors import InputError, as_input_error
from chunkft.recipes import methods
from chunkft.recipes.job import Job
from chunkft.recipes.loading import load, settle, stream_if_need_be
from chunkft.recipes.records import SAMPLE, Data, load_data
from chunkft.recipes.run import check, drive, prepare
from chunkft.train.trainer import ChunkTrainer


class ChunkRewardTrainer(ChunkTrainer, RewardTrainer):
    """TRL's trainer on chunks."""


def run(job: Job) -> int:
    """Do the job; returns the exit code, as `run.drive`.

    Raises:
        ChunkFTError: whatever is wrong with the input or the run, in one line.
    """
    check(job)
    found = prepare(job.training.resume_from_checkpoint, Path(str(job.training.output_dir)))
    with as_input_error("loading"), job.training.main_process_first(desc="loading"):
        data = load_data(job, "preference")
        model, tokenizer = load(job, AutoModelForSequenceClassification, num_labels=1)
        stream_if_need_be(job, model)
    with as_input_error("building the trainer"):
        trainer = _build_trainer(job, data, model, tokenizer)
    data.task = None  # it writes no answers that could be scored
    return drive(job, trainer, model, data, found)


def _build_trainer(
    job: Job, data: Data, model: PreTrainedModel, tokenizer: Any
) -> ChunkRewardTrainer:
    held_out = data.held_out
    if held_out is None:
        held_out = data.train.select(range(min(SAMPLE, len(data.train))))
    adapter = methods.adapter_of(job, model)
    if adapter is not None:
        adapter.task_type = "SEQ_CLS"  # of --use_peft too, whose default is CAUSAL_LM
    trainer = ChunkRewardTrainer(
        model=model,
        args=job.training,
        train_dataset=data.train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    settle(job, trainer)
    if not len(trainer.train_dataset):  # pyright: ignore[reportArgumentType]
        raise InputError(
            f"none of {len(data.train)} preferences is within --max_length "
            f"{job.training.max_length} tokens; raise it"
        )
    return trainer
