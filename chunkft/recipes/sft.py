"""Supervised fine-tuning: TRL's SFTTrainer on ChunkedOptimizer.

    records -> SFTTrainer (TRL) -> head and loss in tiles (models/losses.py) -> backward of the
    active chunk (core/sliced_ops.py) -> ChunkedOptimizer.step (core/optimizer.py) -> store

Everything a `trl sft` command line says keeps its meaning. What is ours: the optimizer, the head
with the active slice's gradient only, checkpoints that are whole or named, isolation of packed
sequences proven at the start, and a report.
"""

import json
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.data.lengths import Lengths, check_lengths
from chunkft.data.packing import check_isolation
from chunkft.data.sources import load_records
from chunkft.data.tasks import PREFIX, ReasoningGymTask
from chunkft.errors import InputError, as_input_error
from chunkft.models.load import learned_positions, load_model
from chunkft.models.losses import install_head
from chunkft.train import checkpoints, report
from chunkft.train.config import (
    ChunkArguments,
    Rotation,
    choose_learning_rate,
    choose_rotation,
    longest_visit,
)
from chunkft.train.scoring import Solved, solve
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
SAMPLE = 64  # training records whose loss is told before and after when nothing is held out
METRICS = "metrics.json"
RESUME = "--resume_from_checkpoint"


@dataclass
class Job:
    """One command line, parsed."""

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    mixture: Any
    chunk: ChunkArguments
    given: set[str] = field(default_factory=set)
    """Names of the settings that the user wrote down."""
    command: str = "chunkft sft"
    """As it was typed, for the report and the line that resumes."""


@dataclass
class Data:
    """Records of a run; `task` scores them where they come from reasoning-gym."""

    train: Any
    held_out: Any | None = None
    task: ReasoningGymTask | None = None


class ChunkSFTTrainer(SFTTrainer):
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
        data = _load_data(job)
        model, tokenizer = load_model(
            job.model.model_name_or_path or DEFAULT_MODEL,
            trust_remote_code=args.trust_remote_code,
            cache_dir=Path(job.chunk.cache_dir).expanduser(),
            **_loading(job),
        )
        _check_lengths(data.train, model, tokenizer, args)
    if args.completion_only_loss and "completion" not in data.train.column_names:
        print("warning: --completion_only_loss without effect: the records have no completion")
    with as_input_error("building the trainer"):
        trainer = _build_trainer(job, data, model, tokenizer)
        optimizer = _build_chunks(job, trainer, found)
    saves = CheckpointCallback(out, args.save_total_limit)
    watching = RunCallback(optimizer, trainer.tokens_seen)
    watch(trainer, watching, saves)

    undo_head = install_head(model)
    with as_input_error("the first forward passes"):
        before, answers = _before(out, trainer, data, job.chunk.score_samples, fresh=found is None)
    trainer.run = watching
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
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
    after, solved = _evaluate(trainer, data, job.chunk.score_samples)
    undo_head()
    outcome = report.Outcome(
        command=job.command,
        settings=_settings(job, optimizer),
        history=[row for row in trainer.state.log_history if "loss" in row],
        before=before,
        after=after,
        audit=audit,
        bytes_by_kind={"weights": _weight_bytes(model), **sizes},
        peak_gib=peak_memory_gib(),
        seconds=watching.seconds,
        parameters=sum(optimizer.partition.sizes()),
        samples=_samples(data, answers, solved),
    )
    path = report.write(out, outcome)
    _write_metrics(out, outcome, watching)
    _tell(outcome, path)
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
    if job.chunk.method == "chunk" and job.model.use_peft:
        raise InputError(
            "--use_peft with --method chunk: chunks train all weights and need no adapter; leave "
            "--use_peft out, or use --method full for LoRA"
        )
    if not job.model.use_peft and (job.model.load_in_4bit or job.model.load_in_8bit):
        raise InputError(
            "--load_in_4bit and --load_in_8bit freeze the weights, so there is nothing to train; "
            "leave them out, or add --use_peft --method full"
        )
    idle = {"chunks", "interval", "layout", "order", "moments"} & job.given
    if job.chunk.method == "full" and idle:
        names = " ".join(f"--{name}" for name in sorted(idle))
        print(f"warning: {names} without effect: --method full trains all weights at once")
    if job.mixture.datasets and job.script.dataset_name:
        print(f"warning: --dataset_name {job.script.dataset_name} without effect beside datasets")
    if job.script.dataset_streaming:
        print("warning: --dataset_streaming has no effect, records are read whole")
    args = job.training
    if args.packing and args.packing_strategy == "wrapped":
        raise InputError(
            "--packing_strategy wrapped lets packed records see each other; use bfd or bfd_split"
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


def _load_data(job: Job) -> Data:
    script, size = job.script, job.chunk.train_samples
    if job.mixture.datasets:
        mixed: Any = get_dataset(job.mixture)
        return Data(mixed["train"], mixed.get("test"))
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
        return Data(train, held_out.records, task)
    more: dict[str, Any] = {"text_field": job.training.dataset_text_field}
    if script.dataset_config:
        more["config"] = {"name": script.dataset_config}
    train = load_records(source, split=script.dataset_train_split, **more)
    held_out = None
    if str(getattr(job.training.eval_strategy, "value", job.training.eval_strategy)) != "no":
        held_out = load_records(source, split=script.dataset_test_split, **more)
    return Data(train, held_out)


def _check_lengths(records: Any, model: PreTrainedModel, tokenizer: Any, args: SFTConfig) -> None:
    """Say what max_length cuts off; on a sample first, on all if all of it is too long."""

    def tokens(record: dict[str, Any]) -> dict[str, list[int]]:
        turns = record.get("messages") or record.get("prompt")
        if isinstance(turns, list):
            turns = turns + (record.get("completion") or [])
            return {"input_ids": tokenizer.apply_chat_template(turns, return_dict=False)}
        field = args.dataset_text_field
        text = record[field] if field in record else record["prompt"] + record["completion"]
        # TRL ends what is no conversation with eos
        eos = tokenizer.eos_token or ""
        return {"input_ids": tokenizer(text.removesuffix(eos) + eos)["input_ids"]}

    split = args.packing and args.packing_strategy == "bfd_split"
    truncation = "split" if split else "keep_start"

    def look(count: int) -> Lengths:
        sample = records.select(range(count)).map(tokens, desc="measuring lengths")
        return check_lengths(sample, args.max_length, truncation=truncation)

    try:
        found = look(min(1000, len(records)))
    except InputError:
        found = look(len(records))
    longest = min(found.longest, args.max_length or found.longest)
    reach = learned_positions(model)
    if reach is not None and longest > reach:
        raise InputError(
            f"records of {longest} tokens, but {type(model).__name__} knows {reach} positions; use "
            f"--max_length {reach}"
        )


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
    check_lengths(trainer.train_dataset, None)  # pyright: ignore[reportArgumentType]
    left = len(train) - len(trainer.train_dataset)  # pyright: ignore[reportArgumentType]
    if left > 0 and not args.packing:
        print(
            f"warning: {left} of {len(train)} records have no token to learn within --max_length "
            f"{args.max_length} and are left out"
        )
    if args.packing or args.padding_free:
        check_isolation(model, collator=trainer.data_collator)  # pyright: ignore[reportArgumentType]
    return trainer


def _build_chunks(job: Job, trainer: ChunkSFTTrainer, found: Path | None) -> ChunkedOptimizer:
    """The optimizer; what nobody set comes from the checkpoint `found`, else from our rules."""
    args, steps = trainer.args, planned_steps(trainer)
    kept = checkpoints.kept(found) if found else None
    rotation = Rotation(1, 1)  # dense training with an fp32 master is one chunk
    if job.chunk.method == "chunk":
        rotation = _rotation(job, trainer, steps, kept)
        if "learning_rate" not in job.given:
            args.learning_rate = choose_learning_rate(rotation.chunks, job.chunk.layout)
    if kept:
        if "learning_rate" in job.given and args.learning_rate != kept.learning_rate:
            print(
                f"warning: --learning_rate {args.learning_rate:g} without effect: the schedule "
                f"goes on from {kept.learning_rate:g}, as it was saved"
            )
        args.learning_rate = kept.learning_rate
    check_schedule(args, steps)
    optimizer = build_optimizer(trainer, job.chunk, rotation)
    sizes = optimizer.partition.sizes()
    print(
        f"{sum(sizes):,} trainable parameters in {rotation.chunks} chunks of "
        f"{max(sizes):,} at most ({job.chunk.layout}), {rotation.interval} steps each; "
        f"learning rate {trainer.args.learning_rate:.2e}",
        flush=True,
    )
    return optimizer


def _rotation(
    job: Job, trainer: ChunkSFTTrainer, steps: int, kept: checkpoints.Kept | None
) -> Rotation:
    chunks, interval = job.chunk.chunks, job.chunk.interval
    if kept and kept.chunks > 1:  # one chunk was dense training
        if chunks is None and interval is None:
            return Rotation(kept.chunks, kept.interval)
        chunks, interval = chunks or kept.chunks, interval or kept.interval
    assert trainer.model is not None
    elements = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    longest = longest_visit(job.chunk.layout, job.chunk.store)
    return choose_rotation(chunks, interval, steps, elements, longest)


def _evaluate(
    trainer: ChunkSFTTrainer, data: Data, score_samples: int
) -> tuple[dict[str, float], Solved | None]:
    if trainer.eval_dataset is not None:
        result = {"loss": trainer.evaluate()["eval_loss"]}
    else:
        train: Any = trainer.train_dataset
        sample = train.select(range(min(SAMPLE, len(train))))
        measured = trainer.evaluate(eval_dataset=sample, metric_key_prefix="sample")
        result = {f"loss of {len(sample)} training rows": measured["sample_loss"]}
    solved = None
    if data.task is not None and score_samples > 0:
        assert data.held_out is not None
        records = data.held_out.select(range(min(score_samples, len(data.held_out)))).to_list()
        solved = solve(trainer.model, trainer.processing_class, data.task, records)
        result["exact-match accuracy"] = solved.accuracy
    return result, solved


def _before(
    out: Path, trainer: ChunkSFTTrainer, data: Data, score_samples: int, fresh: bool
) -> tuple[dict[str, float], list[str]]:
    """The numbers before training; a resumed run reads those of its beginning."""
    path = out / checkpoints.BEFORE
    if not fresh and path.exists():
        kept = json.loads(path.read_text())
        return kept["numbers"], kept["answers"]
    numbers, solved = _evaluate(trainer, data, score_samples)
    answers = solved.answers if solved else []
    path.write_text(json.dumps({"numbers": numbers, "answers": answers}))
    print("before: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()), flush=True)
    return numbers, answers


def _samples(
    data: Data, before: Sequence[str], after: Solved | None, count: int = 5
) -> list[tuple[str, str, str, str]]:
    if after is None or data.held_out is None:
        return []
    rows = data.held_out.select(range(min(count, len(after.answers)))).to_list()
    earlier = list(before) + [""] * len(rows)
    return [
        (row["prompt"][0]["content"], row["completion"][0]["content"], earlier[i], after.answers[i])
        for i, row in enumerate(rows)
    ]


def _settings(job: Job, optimizer: ChunkedOptimizer) -> dict[str, Any]:
    args = job.training
    return {
        "model": job.model.model_name_or_path or DEFAULT_MODEL,
        "dtype": job.model.dtype,
        "data": [d.path or d.data_files for d in job.mixture.datasets] or job.script.dataset_name,
        "method": job.chunk.method,
        "chunks": optimizer.schedule.chunks,
        "interval": optimizer.schedule.interval,
        "layout": job.chunk.layout,
        "order": job.chunk.order,
        "moments": optimizer.moments,
        "store": job.chunk.store,
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


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _write_metrics(out: Path, outcome: report.Outcome, watching: RunCallback) -> None:
    numbers = {
        "before": outcome.before,
        "after": outcome.after,
        "steps": outcome.audit.steps,
        "seconds": outcome.seconds,
        "step_seconds": watching.step_seconds,
        "peak_gib": outcome.peak_gib,
        "bytes_by_kind": outcome.bytes_by_kind,
        "parameters": outcome.parameters,
        "history": list(outcome.history),
        "samples": list(outcome.samples),
    }
    (out / METRICS).write_text(json.dumps(numbers, indent=1))


def _tell(outcome: report.Outcome, path: Path) -> None:
    for key, value in outcome.after.items():
        print(f"{key}: {outcome.before.get(key, float('nan')):.4f} -> {value:.4f}")
    print(f"peak memory {outcome.peak_gib:.2f} GiB; report: {path}")


def _how_to_go_on(command: str, out: Path) -> str:
    found, _ = checkpoints.last_whole(out)
    if found is None or not (found / checkpoints.STATE).exists():
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
