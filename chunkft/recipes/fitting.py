"""`--memory`: settings of a run that fit, by the plan."""

from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer

from chunkft.core.store import GIB
from chunkft.errors import InputError
from chunkft.memory.budget import parse_bytes, this_computer
from chunkft.memory.plan import Choice, Limits, Plan
from chunkft.recipes.job import Job
from chunkft.recipes.planning import Workload, plan
from chunkft.train.config import Rotation, choose_rotation


def fit(
    job: Job, trainer: Trainer, rotation: Rotation, steps: int, resuming: bool
) -> tuple[Rotation, Plan]:
    """K and checkpointing for `--memory`, where nobody has set them; the latter into the trainer.

    Raises:
        DoesNotFitError: nothing fits.
        InputError: what fits needs more chunks than the run has steps for.
    """
    args, settings = trainer.args, job.chunk
    if settings.stream_weights:
        raise InputError(
            "--memory with --stream_weights: streamed weights are not planned yet; leave one out"
        )
    free: list[str] = []
    if settings.chunks is None and settings.method != "full" and not resuming:
        free.append("chunks")
    checkpointing = bool(args.activation_checkpointing)
    if not {"gradient_checkpointing", "activation_checkpointing"} & job.given:
        free.append("checkpointing")
        checkpointing = False
    start = Choice(
        settings.method,
        rotation.chunks,
        rotation.interval,
        settings.layout,
        settings.store,
        checkpointing,
        bool(getattr(args, "activation_offloading", False)),
        settings.state_bits,
    )
    if settings.method == "exact":  # slices in the model's order
        start = replace(start, layout="stream")
    assert settings.memory is not None
    limits = Limits(parse_bytes(settings.memory))
    model: Any = trainer.model
    found = plan(model.config, _load(trainer, model), limits, this_computer(), start, tuple(free))
    args.activation_checkpointing = args.gradient_checkpointing = found.choice.checkpointing
    print(
        f"plan for {settings.memory}: {found.total / GIB:.2f} GiB of tensors at the peak, "
        f"{found.resting / GIB:.2f} GiB resting ({found.choice.store}), {found.choice.chunks} "
        f"chunks, activation checkpointing {'on' if found.choice.checkpointing else 'off'}",
        flush=True,
    )
    if settings.method != "chunk":
        return Rotation(found.choice.chunks, 1), found
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    chunks, interval = found.choice.chunks, found.choice.interval
    return choose_rotation(chunks, interval, steps, elements, interval), found


def _load(trainer: Trainer, model: Any) -> Workload:
    """The longest batch that the data can make."""
    args = trainer.args
    rows: Any = trainer.train_dataset
    longest = max(len(ids) for ids in rows["input_ids"])
    rule, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return Workload(
        seq=longest,
        batch=args.per_device_train_batch_size,
        accumulation=min(args.gradient_accumulation_steps, 2),  # from the second on all is alike
        dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()),
        rule=rule if isinstance(rule, type) else torch.optim.AdamW,
        kwargs=kwargs,
        attention=model.config._attn_implementation or "sdpa",
    )
