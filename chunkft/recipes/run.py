"""The life of a run, whatever it trains: prepared, judged, trained, judged again, reported."""

import shlex
import signal
from pathlib import Path
from typing import Any

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.errors import InputError, as_input_error
from chunkft.memory.budget import card_peaks, slow_in_bf16
from chunkft.models.adapters import METHODS
from chunkft.models.losses import install_head
from chunkft.recipes import judging, methods
from chunkft.recipes.chunks import build_chunks, weight_bytes
from chunkft.recipes.job import Job
from chunkft.recipes.loading import model_of
from chunkft.recipes.records import Data
from chunkft.train import checkpoints, processes, report
from chunkft.train.adalora import AdaLoraCallback, config_of
from chunkft.train.metering import MeterCallback, overruns
from chunkft.train.trainer import (
    CheckpointCallback,
    ChunkTrainer,
    RunCallback,
    peak_memory_gib,
    watch,
)

# settings that some of TRL's trainers have
OF_TRAINERS = ("max_length", "packing", "beta", "loss_type", "precompute_ref_log_probs")
RESUME = "--resume_from_checkpoint"


def prepare(setting: str | bool | None, out: Path) -> Path | None:
    """Look at the output directory; returns the checkpoint to go on from."""
    resume = None if setting is None else str(setting)  # YAML has true and false

    def look() -> tuple[Path | None, list[str]]:
        found, torn = checkpoints.to_resume(resume, out)
        checkpoints.prepare_output(out, found, checkpoints.wanted(resume))
        return found, torn

    found, torn = processes.from_main(look)
    for line in torn:
        print(f"warning: {line}; passed over", flush=True)
    if checkpoints.wanted(resume):
        print(f"resuming from {found}" if found else f"no checkpoint in {out} yet: from the start")
    return found


def check(job: Job) -> None:
    """Settings that every recipe has: refuse what does not go together, say what has no effect.

    Raises:
        InputError: it names both settings.
    """
    methods.check(job)
    args = job.training
    optim = str(getattr(args.optim, "value", args.optim))
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
    # what hides trouble, or costs without use, unless asked for
    args.logging_nan_inf_filter = False
    args.prediction_loss_only = True
    if "report_to" not in job.given:
        args.report_to = []
    in_16_bits = job.model.dtype != "float32" and job.chunk.method not in METHODS
    if job.model.dtype in (None, "bfloat16") and slow_in_bf16():
        # weights, low bits and moments are 12 bytes an element in bf16, and weights and moments too
        print(
            "warning: this CPU multiplies bf16 in software, tens of times slower than fp32; "
            "--dtype float32 --bf16 false takes the same memory where states rest in RAM"
        )
    if "bf16" not in job.given and in_16_bits:  # autocast would only add casts
        args.bf16 = False
        # what accelerate reads was made of `bf16` when the settings were parsed
        args.mixed_precision = "no"


def drive(
    job: Job,
    trainer: ChunkTrainer,
    model: Any,
    data: Data,
    found: Path | None,
    temperature: float = 1.0,
    more: bool = False,
) -> int:
    """Train and report; returns the exit code: 0, or 128 + signal number when told to stop.

    Args:
        trainer: built, with the trainable parameters marked; its optimizer is made here.
        model: without an adapter's wrapper.
        found: the checkpoint to go on from.
        temperature, more: what the trainer's loss reads of the head, as in `install_head`.

    Raises:
        ChunkFTError: whatever is wrong with the settings or the run, in one line.
    """
    args, out = job.training, Path(str(job.training.output_dir))
    with as_input_error("building the optimizer"):
        optimizer, planned = build_chunks(job, trainer, found)
    saves = CheckpointCallback(out, args.save_total_limit)
    watching = RunCallback(optimizer, trainer.tokens_seen)
    trained: Any = trainer.model  # around `model` where there is an adapter
    if config_of(trained):  # before the one that seals what this one writes
        trainer.add_callback(AdaLoraCallback(trained, out, found))
    watch(trainer, watching, saves)
    meter = _meter(trainer, optimizer, model)
    trainer.add_callback(meter)
    undo_head = install_head(model, temperature, more)
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
        settings=_settings(job, optimizer, trained),
        history=[row for row in trainer.state.log_history if "loss" in row],
        before=before,
        after=after,
        audit=audit,
        bytes_by_kind={**weight_bytes(trained), **sizes},
        peak_gib=peak_memory_gib(),
        card=card_peaks(),
        seconds=watching.seconds,
        parameters=sum(optimizer.partition.sizes()),
        measured=meter.measured,
        plan=planned,
        samples=judging.samples(data, answers, solved),
    )
    if processes.is_main():
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


def _meter(trainer: Any, optimizer: ChunkedOptimizer, model: Any) -> MeterCallback:
    reference = getattr(trainer, "ref_model", None)
    beside = [] if reference is None else [reference]
    width = model.config.get_text_config().vocab_size
    return MeterCallback(trainer.model, optimizer, width, beside)


def _settings(job: Job, optimizer: ChunkedOptimizer, model: Any) -> dict[str, Any]:
    args, chunks = job.training, dict[str, Any](chunks=optimizer.schedule.chunks)
    if not optimizer.exact:
        chunks |= {
            "interval": optimizer.schedule.interval,
            "layout": job.chunk.layout,
            "order": job.chunk.order,
            "moments": optimizer.moments,
        }
    for name in ("store", "state_bits", "state_block", "stream_weights", "resident_layers"):
        chunks[name] = getattr(job.chunk, name)
    recipe = {"recipe": job.chunk.recipe} if job.chunk.recipe else {}
    return recipe | {
        "model": model_of(job),
        "dtype": job.model.dtype,
        "data": [d.path or d.data_files for d in job.mixture.datasets] or job.script.dataset_name,
        "method": job.chunk.method,
        **(methods.told(model, job) if job.chunk.method in METHODS else chunks),
        "optim": str(getattr(args.optim, "value", args.optim)),
        "learning_rate": args.learning_rate,
        "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight_decay": args.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "batch": f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}",
        **_of_ranks(args.world_size, optimizer),
        **{name: getattr(args, name) for name in OF_TRAINERS if hasattr(args, name)},
        "activation checkpointing": args.gradient_checkpointing,
        "seed": args.seed,
    }


def _of_ranks(count: int, optimizer: ChunkedOptimizer) -> dict[str, Any]:
    if count == 1:
        return {}
    each = optimizer.reduced_bytes / max(optimizer.steps, 1) / 2**20
    return {"ranks": count, "gradients averaged a step": f"{each:.2f} MiB"}


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
