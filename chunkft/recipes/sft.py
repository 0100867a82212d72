"""Supervised fine-tuning: TRL's SFTTrainer on ChunkedOptimizer.

    records -> SFTTrainer (TRL) -> head and loss in tiles (models/losses.py) -> backward of the
    active chunk (core/sliced_ops.py) -> ChunkedOptimizer.step (core/optimizer.py) -> store

Everything a `trl sft` command line says keeps its meaning. What is ours: the optimizer, the head
with the active slice's gradient only, checkpoints that are whole or named, isolation of packed
sequences proven at the start, and a report.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chunkft.data.packing import check_isolation
from chunkft.errors import FOREIGN, InputError, as_input_error, one_line
from chunkft.models.adapters import METHODS
from chunkft.models.attention import choose_attention
from chunkft.recipes import methods
from chunkft.recipes.job import Job
from chunkft.recipes.loading import load, loading, settle, stream_if_need_be
from chunkft.recipes.records import Data, check_raw, check_tokenized, load_data
from chunkft.recipes.run import check, drive, prepare
from chunkft.train.trainer import ChunkTrainer


class ChunkSFTTrainer(ChunkTrainer, SFTTrainer):
    """TRL's trainer on chunks."""


def run(job: Job) -> int:
    """Do the job; returns the exit code, as `run.drive`.

    Raises:
        ChunkFTError: whatever is wrong with the input or the run, in one line.
    """
    args = job.training
    _check(job)
    found = prepare(args.resume_from_checkpoint, Path(str(args.output_dir)))
    with as_input_error("loading"), args.main_process_first(desc="loading"):
        data = load_data(job)
        model, tokenizer = load(job)
        stream_if_need_be(job, model)
        check_raw(data.train, tokenizer, args)
    if args.completion_only_loss and "completion" not in data.train.column_names:
        print("warning: --completion_only_loss without effect: the records have no completion")
    with as_input_error("building the trainer"):
        trainer = _build_trainer(job, data, model, tokenizer)
    return drive(job, trainer, model, data, found)


def _check(job: Job) -> None:
    check(job)
    args, method = job.training, job.chunk.method
    if args.packing and args.packing_strategy == "wrapped":
        raise InputError(
            "--packing_strategy wrapped lets packed records see each other; use bfd or bfd_split"
        )
    if args.use_liger_kernel and method in ("chunk", "exact"):
        raise InputError(
            f"--use_liger_kernel with --method {method}: its fused head reads the whole weight "
            f"and leaves the active slice without a gradient; leave it out (ours runs in tiles too)"
        )


def _build_trainer(job: Job, data: Data, model: PreTrainedModel, tokenizer: Any) -> ChunkSFTTrainer:
    args = job.training
    held_out, collator = data.held_out, None
    if wanted := _unpadded(job):
        collator = _collator(job, tokenizer, padding_free=True)
    columns = ("task_seed", "task_size", "task_index")
    train = data.train
    if data.task is not None:
        train = train.remove_columns(list(columns))
        held_out = None if held_out is None else held_out.remove_columns(list(columns))
    trainer = ChunkSFTTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=methods.adapter_of(job, model),
    )
    settle(job, trainer)
    assert isinstance(trainer.train_dataset, Dataset)
    check_tokenized(trainer.train_dataset, model, args, len(train))
    if wanted or args.packing:
        _isolate(job, trainer, model, optional=wanted and "padding_free" not in job.given)
    return trainer


def _unpadded(job: Job) -> bool:
    """Whether rows go end to end: the same minibatches and the same loss, without the padding.

    On unless somebody says otherwise, wherever there is padding to save.
    """
    args = job.training
    asked, args.padding_free = args.padding_free, False
    # TRL refuses padding_free beside max_length, though it cuts the rows before it collates them
    if args.packing or "padding_free" in job.given:
        return asked and not args.packing
    most = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
    virtual = job.chunk.method in METHODS and METHODS[job.chunk.method].is_virtual
    return most > 1 and not virtual and not args.use_liger_kernel


def _isolate(job: Job, trainer: ChunkSFTTrainer, model: PreTrainedModel, optional: bool) -> None:
    """Choose the attention for rows of several records, and prove that they are apart.

    Raises:
        ContaminationError: they are not, and it was asked for.
    """
    used: Any = model.config._attn_implementation
    try:
        if loading(job)["attn_implementation"] is None:
            model.set_attn_implementation(choose_attention())
        collator: Any = trainer.data_collator
        check_isolation(model, collator=collator)
    except FOREIGN as error:
        model.set_attn_implementation(used)
        if not optional:
            raise
        print(f"rows are padded: {one_line(error)}", flush=True)
        trainer.data_collator = _collator(job, trainer.processing_class)


def _collator(job: Job, tokenizer: Any, padding_free: bool = False) -> Any:
    """TRL's."""
    multiple: Any = job.training.pad_to_multiple_of
    return DataCollatorForLanguageModeling(
        tokenizer.pad_token_id, padding_free=padding_free, pad_to_multiple_of=multiple
    )
