"""`--memory`: settings of a run that fit, by the plan."""

import inspect
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer

from chunkft.core.exact import ELEMENTWISE
from chunkft.core.ranks import world_size
from chunkft.core.store import GIB
from chunkft.errors import InputError
from chunkft.memory.budget import Device, installed, parse_bytes, this_computer
from chunkft.memory.plan import Choice, Limits, Plan
from chunkft.models import attention
from chunkft.recipes.job import Job
from chunkft.recipes.planning import OFFLOAD, plan
from chunkft.recipes.records import prompt_lengths
from chunkft.recipes.trial import Answers, Workload
from chunkft.train import processes
from chunkft.train.config import CHECKPOINTING, Rotation, choose_rotation


def must_stream(job: Job, model: Any, device: Device, copies: int = 1) -> bool:
    """Whether the weights alone have no room on a card: then they never go there as a whole.

    Args:
        copies: of the model; 2 where a reference is one.
    """
    if job.chunk.memory is None or not _may_stream(job) or device.bus == 0:
        return False
    size = copies * sum(p.numel() * p.element_size() for p in model.parameters())
    return size > parse_bytes(job.chunk.memory)


def must_shard(job: Job, model: Any, device: Device) -> bool:
    """Whether the weights have no room on one device: then each process has a share of them."""
    if job.chunk.stream_weights or getattr(model, "hf_quantizer", None) is not None:
        return False
    dtype = getattr(torch, job.model.dtype or "bfloat16", torch.bfloat16)
    size = sum(p.numel() * dtype.itemsize for p in model.parameters())
    room = device.memory - device.reserved
    if not device.bus:  # ranks of one computer share its memory
        room //= world_size()
    return size > (room if job.chunk.memory is None else parse_bytes(job.chunk.memory))


def _may_stream(job: Job) -> bool:
    free = "stream_weights" not in job.given and job.chunk.shard != "fsdp"
    return free and not job.model.use_peft


def fit(
    job: Job, trainer: Trainer, rotation: Rotation, steps: int, resuming: bool
) -> tuple[Rotation, Plan]:
    """What `--memory` leaves open, chosen: K; checkpointing and offload, set in the trainer's
    arguments; blocks, streamed weights and what stays beside them, set in the job.

    Raises:
        DoesNotFitError: nothing fits.
        InputError: what fits needs more chunks than the run has steps for.
    """
    args, settings = trainer.args, job.chunk
    model: Any = trainer.model
    load = _load(job, trainer, model)
    method = settings.method if load.adapter is None else "full"  # all at once
    free: list[str] = []
    if settings.chunks is None and method != "full" and not resuming:
        free.append("chunks")
    checkpointing = bool(args.activation_checkpointing)
    if not CHECKPOINTING & job.given:
        free.append("checkpointing")
        checkpointing = False
    kwargs = args.activation_checkpointing_kwargs
    kwargs = dict(kwargs) if isinstance(kwargs, dict) else {}
    offload = bool(getattr(args, "activation_offloading", False) or kwargs.get("offload"))
    if "activation_offloading" not in job.given and "offload" not in kwargs and _offloads(model):
        free.append("offload")
    asked = settings.stream_weights and "stream_weights" in job.given
    if _may_stream(job):
        free.append("stream_weights")
    # beside 8-bit moments blocks decide what is rounded together; of other rules they are tensors
    rounded = resuming and settings.state_bits == 8
    whole = load.adapter is None and load.rule in ELEMENTWISE
    if "state_block" not in job.given and not rounded and whole:
        free.append("block")
    start = Choice(
        method,
        rotation.chunks,
        rotation.interval,
        settings.layout,
        settings.store,
        checkpointing,
        offload,
        asked,
        settings.state_bits,
        settings.state_block if settings.method == "chunk" else None,
        settings.resident_layers,
        world_size(),
        settings.shard == "fsdp",
    )
    if settings.method == "exact":  # slices in the model's order
        start = replace(start, layout="stream")
    assert settings.memory is not None
    device = this_computer()
    limits = Limits(parse_bytes(settings.memory), _host_memory() if device.bus else None)
    found = processes.from_main(lambda: _planned(model.config, load, limits, device, start, free))
    choice = found.choice
    args.activation_checkpointing = args.gradient_checkpointing = choice.checkpointing
    if choice.offload and not offload:
        kwargs = {"use_reentrant": False} | kwargs | OFFLOAD
        args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs = kwargs
    settings.stream_weights, settings.state_block = choice.stream_weights, choice.block
    settings.resident_layers = choice.resident_layers if choice.stream_weights else 0
    saved = "offloaded" if choice.offload else "on" if choice.checkpointing else "off"
    print(
        f"plan for {settings.memory}: {found.total / GIB:.2f} GiB of tensors at the peak, "
        f"{(found.resting + found.homes) / GIB:.2f} GiB resting ({choice.store}), "
        f"{choice.chunks} chunks, activation checkpointing {saved}, weights {_where(choice)}"
        f"{', state in blocks' if choice.block else ''}",
        flush=True,
    )
    if settings.method != "chunk":
        return Rotation(found.choice.chunks, 1), found
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    chunks, interval = found.choice.chunks, found.choice.interval
    return choose_rotation(chunks, interval, steps, elements, interval), found


def _planned(*args: Any) -> Plan:
    """`plan` of the arguments; beside other ranks in a process that has none, for a plan has ranks
    of its own."""
    if world_size() == 1:
        return plan(*args)
    with ProcessPoolExecutor(1, get_context("spawn"), attention.register) as pool:
        return pool.submit(plan, *args).result()


def _host_memory() -> int:
    """Of all computers that the ranks run on, as if they were alike."""
    return installed() * -(-world_size() // max(1, torch.cuda.device_count()))


def _where(choice: Choice) -> str:
    if choice.shard:
        return f"sharded over {choice.ranks} ranks"
    if not choice.stream_weights:
        return "on the device"
    stay = choice.resident_layers
    return f"streamed but for {stay} layers" if stay else "streamed"


def _offloads(model: Any) -> bool:
    """Whether checkpointing of this transformers takes `offload`."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    return enable is not None and "offload" in inspect.signature(enable).parameters


def _load(job: Job, trainer: Trainer, model: Any) -> Workload:
    """The longest batch that the data can make.

    Raises:
        InputError: of what trains here the plan knows nothing.
    """
    args, shape = trainer.args, _shape(job, trainer)
    rule, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    attends = model.config._attn_implementation or "sdpa"
    unpadded = attends == attention.NAME and getattr(trainer.data_collator, "padding_free", False)
    return Workload(
        seq=shape.longest,
        batch=args.per_device_train_batch_size * (2 if shape.pairs else 1),
        accumulation=min(args.gradient_accumulation_steps, 2),  # from the second on all is alike
        dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()),
        rule=rule if isinstance(rule, type) else torch.optim.AdamW,
        kwargs=kwargs,
        attention=attends,
        # a row alone is never padded
        masked=shape.pairs
        or shape.answers is not None
        or args.per_device_train_batch_size > 1
        or bool(getattr(args, "packing", False)),
        unpadded=unpadded,
        adapter=getattr(model, "active_peft_config", None),
        autocast=torch.bfloat16 if trainer.accelerator.mixed_precision == "bf16" else None,
        quantize=getattr(model.config, "quantization_config", None),
        answers=shape.answers,
        reference=_reference(trainer),
    )


class _Shape(NamedTuple):
    """Of the data's longest rows."""

    longest: int
    """Tokens."""
    pairs: bool = False
    """Each record makes two: chosen and rejected."""
    answers: Answers | None = None


def _shape(job: Job, trainer: Trainer) -> _Shape:
    rows, args = trainer.train_dataset, job.training
    assert isinstance(rows, Dataset)
    if "input_ids" in rows.column_names:
        return _Shape(max(map(len, rows["input_ids"])))
    if {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(rows.column_names):
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        lengths = zip(*(map(len, rows[name]) for name in names), strict=True)
        longest = max(prompt + max(answers) for prompt, *answers in lengths)
        return _Shape(min(longest, args.max_length or longest), pairs=True)
    if hasattr(args, "max_completion_length") and "prompt" in rows.column_names:
        at_once = args.per_device_train_batch_size * args.steps_per_generation
        answers = Answers(at_once, args.max_completion_length)
        longest = max(prompt_lengths(rows, trainer.processing_class))
        return _Shape(longest + answers.tokens, answers=answers)
    raise InputError(
        f"--memory with {type(trainer).__name__}: the plan knows sft, dpo, grpo and rloo; leave it "
        f"out"
    )


def _reference(trainer: Any) -> str:
    """Where the reference's numbers come from in a step."""
    if getattr(trainer, "ref_model", None) is not None:
        return "copy"
    asked = getattr(trainer.args, "beta", 0.0) != 0.0
    made = getattr(trainer.args, "precompute_ref_log_probs", False)
    return "off" if asked and not made and isinstance(trainer.model, PeftModel) else ""
