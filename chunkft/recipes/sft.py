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
from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTTrainer, get_quantization_config
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chunkft.data.packing import check_isolation
from chunkft.errors import FOREIGN, InputError, as_input_error, one_line
from chunkft.memory.budget import this_computer
from chunkft.models import adapters
from chunkft.models.adapters import METHODS
from chunkft.models.attention import choose_attention
from chunkft.models.load import load_model
from chunkft.recipes import methods
from chunkft.recipes.chunks import stream
from chunkft.recipes.fitting import must_stream
from chunkft.recipes.job import Job
from chunkft.recipes.records import Data, check_raw, check_tokenized, load_data
from chunkft.recipes.run import drive, model_of, prepare
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
    with as_input_error("loading"):
        data = load_data(job)
        model, tokenizer = load_model(
            model_of(job),
            trust_remote_code=args.trust_remote_code,
            cache_dir=Path(job.chunk.cache_dir).expanduser(),
            **_loading(job),
        )
        job.chunk.stream_weights |= must_stream(job, model, this_computer())
        if job.chunk.stream_weights:
            stream(job, model)
        check_raw(data.train, tokenizer, args)
    if args.completion_only_loss and "completion" not in data.train.column_names:
        print("warning: --completion_only_loss without effect: the records have no completion")
    with as_input_error("building the trainer"):
        trainer = _build_trainer(job, data, model, tokenizer)
    return drive(job, trainer, model, data, found)


def _check(job: Job) -> None:
    methods.check(job)
    method = job.chunk.method
    optim = str(getattr(job.training.optim, "value", job.training.optim))
    if job.chunk.state_bits == 8 and optim.endswith(("8bit", "4bit")):
        print(
            f"warning: --state_bits 8 without effect: {optim} keeps its moments in few bits itself"
        )
        job.chunk.state_bits = 32
    if job.chunk.state_bits not in (32, 8):  # a YAML file's choices are not checked
        raise InputError(f"--state_bits {job.chunk.state_bits} must be 32 or 8")
    if job.chunk.resident_layers and not (job.chunk.stream_weights or job.chunk.memory):
        print("warning: --resident_layers without effect: --stream_weights is off")
        job.chunk.resident_layers = 0
    if job.mixture.datasets and job.script.dataset_name:
        print(f"warning: --dataset_name {job.script.dataset_name} without effect beside datasets")
    if job.script.dataset_streaming:
        print("warning: --dataset_streaming has no effect, records are read whole")
    args = job.training
    if args.packing and args.packing_strategy == "wrapped":
        raise InputError(
            "--packing_strategy wrapped lets packed records see each other; use bfd or bfd_split"
        )
    if args.use_liger_kernel and method in ("chunk", "exact"):
        raise InputError(
            f"--use_liger_kernel with --method {method}: its fused head reads the whole weight "
            f"and leaves the active slice without a gradient; leave it out (ours runs in tiles too)"
        )
    # what hides trouble, or costs without use, unless asked for
    args.logging_nan_inf_filter = False
    args.prediction_loss_only = True
    if "report_to" not in job.given:
        args.report_to = []
    if "bf16" not in job.given and job.model.dtype != "float32":
        args.bf16 = False  # the weights are 16-bit: autocast would only add casts


def _loading(job: Job) -> dict[str, Any]:
    """Arguments of `load_model`; those in --model_init_kwargs come last, as in TRL."""
    kwargs: dict[str, Any] = {
        "dtype": job.model.dtype or "bfloat16",
        "attn_implementation": job.model.attn_implementation,
        "revision": job.model.model_revision,
    }
    if quantization := get_quantization_config(job.model):
        kwargs["quantization_config"] = quantization
    more = job.training.model_init_kwargs
    return kwargs | (more if isinstance(more, dict) else {})


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
    if isinstance(trainer.model, PeftModel):
        adapters.settle(trainer.model)
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
        if _loading(job)["attn_implementation"] is None:
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
