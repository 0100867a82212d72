"""Supervised fine-tuning: TRL's SFTTrainer on ChunkedOptimizer.

    records -> SFTTrainer (TRL) -> head and loss in tiles (models/losses.py) -> backward of the
    active chunk (core/sliced_ops.py) -> ChunkedOptimizer.step (core/optimizer.py) -> store

Everything a `trl sft` command line says keeps its meaning. What is ours: the optimizer, the head
with the active slice's gradient only, checkpoints that are whole or named, isolation of packed
sequences proven at the start, and a report.
"""

import shlex
import signal
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import (
    SFTTrainer,
    get_peft_config,
    get_quantization_config,
)

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.residence import residence_of
from chunkft.core.store import GIB
from chunkft.data.packing import check_isolation
from chunkft.errors import InputError, as_input_error
from chunkft.memory.budget import card_peaks, this_computer
from chunkft.memory.plan import Plan
from chunkft.memory.streaming import WeightStream, stream_weights
from chunkft.models.load import load_model
from chunkft.models.losses import install_head
from chunkft.recipes import judging
from chunkft.recipes.fitting import fit, must_stream
from chunkft.recipes.job import Job
from chunkft.recipes.records import Data, check_raw, check_tokenized, load_data
from chunkft.train import checkpoints, report
from chunkft.train.config import (
    Rotation,
    choose_chunks,
    choose_learning_rate,
    choose_rotation,
    longest_visit,
)
from chunkft.train.metering import MeterCallback, overruns
from chunkft.train.saving import StreamingTrainer
from chunkft.train.trainer import (
    CheckpointCallback,
    RunCallback,
    build_optimizer,
    check_schedule,
    peak_memory_gib,
    planned_steps,
    watch,
)

DEFAULT_MODEL = "smollm2-135m"
RESUME = "--resume_from_checkpoint"
SCHEDULE = {"interval", "layout", "order", "moments", "state_block"}  # of --method chunk only
IDLE = {"chunk": set[str](), "exact": SCHEDULE, "full": SCHEDULE | {"chunks", "state_bits"}}


class ChunkSFTTrainer(StreamingTrainer, SFTTrainer):
    """TRL's trainer; its training logs carry what only the optimizer knows."""

    run: RunCallback | None = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.run is None:
            # the numbers before and after are told by the report; a tracker that is asked before
            # training begins does not know its folder yet
            self._metrics["eval"].clear()
            return
        self.run.extend(logs)
        super().log(logs, start_time)

    def tokens_seen(self) -> float:
        return self._total_train_tokens


def run(job: Job) -> int:
    """Do the job; returns the exit code: 0, or 128 + signal number when it was told to stop.

    Raises:
        ChunkFTError: whatever is wrong with the input or the run, in one line.
    """
    args, out = job.training, Path(str(job.training.output_dir))
    _check(job)
    found = _prepare(args.resume_from_checkpoint, out)
    with as_input_error("loading"):
        data = load_data(job)
        model, tokenizer = load_model(
            job.model.model_name_or_path or DEFAULT_MODEL,
            trust_remote_code=args.trust_remote_code,
            cache_dir=Path(job.chunk.cache_dir).expanduser(),
            **_loading(job),
        )
        job.chunk.stream_weights |= must_stream(job, model, this_computer())
        if job.chunk.stream_weights:
            _stream(job, model)
        check_raw(data.train, tokenizer, args)
    if args.completion_only_loss and "completion" not in data.train.column_names:
        print("warning: --completion_only_loss without effect: the records have no completion")
    with as_input_error("building the trainer"):
        trainer = _build_trainer(job, data, model, tokenizer)
        optimizer, planned = _build_chunks(job, trainer, found)
    saves = CheckpointCallback(out, args.save_total_limit)
    watching = RunCallback(optimizer, trainer.tokens_seen)
    watch(trainer, watching, saves)
    meter = MeterCallback(model, optimizer, model.config.get_text_config().vocab_size)
    trainer.add_callback(meter)

    undo_head = install_head(model)
    with as_input_error("the first forward passes"):
        before, answers = judging.before(
            out, trainer, data, job.chunk.score_samples, fresh=found is None
        )
    trainer.run = watching
    try:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    finally:
        watching.close()  # or an error would be told behind the bar
    trainer.run = None
    if saves.stopped_by and trainer.state.global_step < trainer.state.max_steps:
        print(f"stopped by {saves.stopped_by}; {_how_to_go_on(job.command, out)}")
        return 128 + signal.Signals[saves.stopped_by]
    sizes = optimizer.nbytes
    optimizer.detach()
    model.config.use_cache = True  # training switched it off
    # before anything that may fail or be interrupted
    trainer.save_model(str(out))
    audit = optimizer.audit()
    after, solved = judging.evaluate(trainer, data, job.chunk.score_samples)
    undo_head()
    outcome = report.Outcome(
        command=job.command,
        settings=_settings(job, optimizer),
        history=[row for row in trainer.state.log_history if "loss" in row],
        before=before,
        after=after,
        audit=audit,
        bytes_by_kind={**_weight_bytes(model), **sizes},
        peak_gib=peak_memory_gib(),
        card=card_peaks(),
        seconds=watching.seconds,
        parameters=sum(optimizer.partition.sizes()),
        measured=meter.measured,
        plan=planned,
        samples=judging.samples(data, answers, solved),
    )
    path = report.write(out, outcome)
    report.write_metrics(out, outcome, watching.step_seconds)
    report.tell(outcome, path)
    if planned is not None and meter.measured is not None:
        for line in overruns(meter.measured, planned):
            print(f"warning: more than planned: {line}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=job.script.dataset_name)
    trainer.end()  # the trackers
    return 0


def _prepare(setting: str | bool | None, out: Path) -> Path | None:
    """Look at the output directory; returns the checkpoint to go on from."""
    resume = None if setting is None else str(setting)  # YAML has true and false
    found, torn = checkpoints.to_resume(resume, out)
    checkpoints.prepare_output(out, found, checkpoints.wanted(resume))
    for line in torn:
        print(f"warning: {line}; passed over", flush=True)
    if checkpoints.wanted(resume):
        print(f"resuming from {found}" if found else f"no checkpoint in {out} yet: from the start")
    return found


def _check(job: Job) -> None:
    method = job.chunk.method
    if method != "full" and job.model.use_peft:
        raise InputError(
            f"--use_peft with --method {method}: chunks train all weights and need no adapter; "
            f"leave --use_peft out, or use --method full for LoRA"
        )
    if job.chunk.stream_weights and job.model.use_peft:
        raise InputError(
            "--stream_weights with --use_peft: adapters are put around layers, which would visit "
            "the device without them; leave one of the two out"
        )
    if not job.model.use_peft and (job.model.load_in_4bit or job.model.load_in_8bit):
        raise InputError(
            "--load_in_4bit and --load_in_8bit freeze the weights, so there is nothing to train; "
            "leave them out, or add --use_peft --method full"
        )
    idle = IDLE[method]
    if idle & job.given:
        names = " ".join(f"--{name}" for name in sorted(idle & job.given))
        print(f"warning: {names} without effect: --method {method} trains all weights every step")
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
    if args.use_liger_kernel and method != "full":
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
    held_out = data.held_out
    columns = ("task_seed", "task_size", "task_index")
    train = data.train
    if data.task is not None:
        train = train.remove_columns(list(columns))
        held_out = None if held_out is None else held_out.remove_columns(list(columns))
    trainer = ChunkSFTTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(job.model),
    )
    assert isinstance(trainer.train_dataset, Dataset)
    check_tokenized(trainer.train_dataset, model, args, len(train))
    if args.packing or args.padding_free:
        check_isolation(model, collator=trainer.data_collator)  # pyright: ignore[reportArgumentType]
    return trainer


def _build_chunks(
    job: Job, trainer: ChunkSFTTrainer, found: Path | None
) -> tuple[ChunkedOptimizer, Plan | None]:
    """The optimizer; what nobody set comes from the checkpoint `found`, else from our rules."""
    args, steps = trainer.args, planned_steps(trainer)
    model: Any = trainer.model
    kept = checkpoints.kept(found) if found else None
    if kept:
        _take_over(job, kept)
    rotation, planned = _rotation(job, trainer, steps, kept), None
    if job.chunk.memory is not None:
        as_it_is = job.chunk.stream_weights, job.chunk.resident_layers
        rotation, planned = fit(job, trainer, rotation, steps, resuming=kept is not None)
        planned_so = job.chunk.stream_weights, job.chunk.resident_layers
        if job.chunk.stream_weights and planned_so != as_it_is:
            _stream(job, model)
    if job.chunk.method == "chunk" and "learning_rate" not in job.given:
        args.learning_rate = choose_learning_rate(rotation.chunks, job.chunk.layout)
    if kept and kept.learning_rate is not None:
        if "learning_rate" in job.given and args.learning_rate != kept.learning_rate:
            print(
                f"warning: --learning_rate {args.learning_rate:g} without effect: the schedule "
                f"goes on from {kept.learning_rate:g}, as it was saved"
            )
        args.learning_rate = kept.learning_rate
    check_schedule(args, steps)
    if kept and kept.steps >= steps:
        args.max_steps, args.num_train_epochs = -1, 0  # Trainer would take one step more
    optimizer = build_optimizer(trainer, job.chunk, rotation)
    sizes = optimizer.partition.sizes()
    each = f"({job.chunk.layout}), {rotation.interval} steps each"
    print(
        f"{sum(sizes):,} trainable parameters in {rotation.chunks} chunks of "
        f"{max(sizes):,} at most{', all in every step' if optimizer.exact else ' ' + each}; "
        f"learning rate {trainer.args.learning_rate:.2e}",
        flush=True,
    )
    return optimizer, planned


def _take_over(job: Job, kept: checkpoints.Kept) -> None:
    """Settings of the checkpoint in the place of those that nobody gave."""
    if "method" not in job.given and kept.exact:
        job.chunk.method = "exact"
    for name in ("layout", "order", "moments", "state_bits", "state_block"):
        if name not in job.given:
            setattr(job.chunk, name, getattr(kept, name))


def _rotation(
    job: Job, trainer: ChunkSFTTrainer, steps: int, kept: checkpoints.Kept | None
) -> Rotation:
    assert trainer.model is not None
    elements = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    chunks, interval = job.chunk.chunks, job.chunk.interval
    if job.chunk.method == "full":
        return Rotation(1, 1)  # dense training with an fp32 master is one chunk
    if job.chunk.method == "exact":
        again = kept.chunks if kept and kept.exact else None
        return Rotation(chunks or again or choose_chunks(elements), 1)
    # one chunk is dense training, which somebody may want to leave
    if kept and (kept.chunks > 1 or "method" not in job.given):
        if chunks is None and interval is None:
            return Rotation(kept.chunks, kept.interval)
        chunks = kept.chunks if chunks is None else chunks
        interval = kept.interval if interval is None else interval
    longest = longest_visit(job.chunk.layout, job.chunk.store)
    return choose_rotation(chunks, interval, steps, elements, longest)


def _settings(job: Job, optimizer: ChunkedOptimizer) -> dict[str, Any]:
    args, rotation = job.training, {}
    if not optimizer.exact:
        rotation = {
            "interval": optimizer.schedule.interval,
            "layout": job.chunk.layout,
            "order": job.chunk.order,
            "moments": optimizer.moments,
        }
    return {
        "model": job.model.model_name_or_path or DEFAULT_MODEL,
        "dtype": job.model.dtype,
        "data": [d.path or d.data_files for d in job.mixture.datasets] or job.script.dataset_name,
        "method": job.chunk.method,
        "chunks": optimizer.schedule.chunks,
        **rotation,
        "store": job.chunk.store,
        "state_bits": job.chunk.state_bits,
        "state_block": job.chunk.state_block,
        "stream_weights": job.chunk.stream_weights,
        "resident_layers": job.chunk.resident_layers,
        "optim": str(getattr(args.optim, "value", args.optim)),
        "learning_rate": args.learning_rate,
        "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight_decay": args.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "batch": f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}",
        "max_length": args.max_length,
        "packing": args.packing,
        "activation checkpointing": args.gradient_checkpointing,
        "seed": args.seed,
    }


def _stream(job: Job, model: PreTrainedModel) -> None:
    rest = "host" if job.chunk.store in ("host", "device") else job.chunk.store
    before = residence_of(model)
    if isinstance(before, WeightStream):
        before.detach()  # some of its layers have room on the device
    del before  # or its homes would live on beside the new ones
    stay = job.chunk.resident_layers
    stream = stream_weights(model, rest=rest, device=job.training.device, resident=stay)
    if job.training.device.type == "cuda":  # where the weights were until now, which is no peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    each, sizes = stream.nbytes["slots"] / 2, _weight_bytes(model)
    told = ", ".join(f"{kind} {size / GIB:.2f} GiB" for kind, size in sizes.items())
    print(f"{told}; {len(stream.units)} units of {each / GIB:.3f} GiB at most visit 2 slots")


def _weight_bytes(model: PreTrainedModel) -> dict[str, int]:
    stream = residence_of(model)
    if not isinstance(stream, WeightStream):
        return {"weights": sum(p.numel() * p.element_size() for p in model.parameters())}
    sizes = stream.nbytes
    (rest,) = sizes.keys() - {"slots", "resident"}
    return {"weights": sizes["slots"] + sizes["resident"], f"weights on {rest}": sizes[rest]}


def _how_to_go_on(command: str, out: Path) -> str:
    found, _ = checkpoints.last_whole(out)
    if found is None or not checkpoints.has_state(found):
        return "it cannot go on: no checkpoint has the optimizer's state (--save_only_model)"
    return f"go on with:\n  {_resume_line(command)}"


def _resume_line(command: str) -> str:
    words, kept = iter(shlex.split(command)), list[str]()
    for word in words:
        if word == RESUME:
            next(words, None)  # its value
        elif not word.startswith(RESUME + "="):
            kept.append(word)
    return shlex.join([*kept, RESUME, "last"])
