"""The optimizer of a job: how many chunks, which rate, where weights and state rest."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.ranks import held
from chunkft.core.residence import residence_of
from chunkft.core.store import GIB
from chunkft.memory.plan import Plan
from chunkft.memory.streaming import WeightStream, stream_weights
from chunkft.models import adapters
from chunkft.models.adapters import METHODS
from chunkft.recipes import methods
from chunkft.recipes.fitting import fit
from chunkft.recipes.job import Job
from chunkft.train import checkpoints
from chunkft.train.adalora import config_of, plan_ranks
from chunkft.train.config import (
    DENSE_LEARNING_RATE,
    Rotation,
    choose_chunks,
    choose_learning_rate,
    choose_rotation,
    longest_visit,
)
from chunkft.train.trainer import build_optimizer, check_schedule, planned_steps


def build_chunks(
    job: Job, trainer: Trainer, found: Path | None
) -> tuple[ChunkedOptimizer, Plan | None]:
    """The optimizer; what nobody set comes from the checkpoint `found`, else from our rules."""
    args, steps = trainer.args, planned_steps(trainer)
    model: Any = trainer.model
    kept = checkpoints.kept(found) if found else None
    if kept:
        _take_over(job, kept)
    rotation, planned = _rotation(job, trainer, steps, kept), None
    if ranks := config_of(model):
        plan_ranks(ranks, steps, methods.given_to_peft(job))
    if job.chunk.memory is not None:
        as_it_is = job.chunk.stream_weights, job.chunk.resident_layers
        rotation, planned = fit(job, trainer, rotation, steps, resuming=kept is not None)
        planned_so = job.chunk.stream_weights, job.chunk.resident_layers
        if job.chunk.stream_weights and planned_so != as_it_is:
            stream(job, model)
            if (reference := getattr(trainer, "ref_model", None)) is not None:
                stream(job, reference)
    if "learning_rate" not in job.given:
        args.learning_rate = _learning_rate(job, rotation)
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
    if job.chunk.method in METHODS:
        told = methods.describe(job.chunk.method, model)
        print(f"{told}; learning rate {args.learning_rate:.2e}", flush=True)
        return optimizer, planned
    sizes = optimizer.partition.sizes()
    each = f"({job.chunk.layout}), {rotation.interval} steps each"
    print(
        f"{sum(sizes):,} trainable parameters in {rotation.chunks} chunks of "
        f"{max(sizes):,} at most{', all in every step' if optimizer.exact else ' ' + each}; "
        f"learning rate {trainer.args.learning_rate:.2e}",
        flush=True,
    )
    return optimizer, planned


def _learning_rate(job: Job, rotation: Rotation) -> float:
    """TRL's default for the trainer, for what trains: SFT's are the ones that were measured."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(job.training)}
    dense = defaults["learning_rate"]
    if job.chunk.method == "chunk":
        return choose_learning_rate(rotation.chunks, job.chunk.layout, dense)
    if job.chunk.method in METHODS:
        return METHODS[job.chunk.method].learning_rate * dense / DENSE_LEARNING_RATE
    return dense


def _take_over(job: Job, kept: checkpoints.Kept) -> None:
    """Settings of the checkpoint in the place of those that nobody gave."""
    if "method" not in job.given and kept.exact:
        job.chunk.method = "exact"
    for name in ("layout", "order", "moments", "state_bits", "state_block"):
        if name not in job.given:
            setattr(job.chunk, name, getattr(kept, name))


def _rotation(job: Job, trainer: Trainer, steps: int, kept: checkpoints.Kept | None) -> Rotation:
    assert trainer.model is not None
    elements = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    chunks, interval = job.chunk.chunks, job.chunk.interval
    if job.chunk.method not in ("chunk", "exact"):
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


def stream(job: Job, model: PreTrainedModel) -> None:
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
    each, sizes = stream.nbytes["slots"] / 2, weight_bytes(model)
    told = ", ".join(f"{kind} {size / GIB:.2f} GiB" for kind, size in sizes.items())
    print(f"{told}; {len(stream.units)} units of {each / GIB:.3f} GiB at most visit 2 slots")


def weight_bytes(model: Any) -> dict[str, int]:
    stream = residence_of(model)
    if not isinstance(stream, WeightStream):
        total = sum(held(p).numel() * p.element_size() for p in model.parameters())
        if not isinstance(model, PeftModel):
            return {"weights": total}
        adapter = adapters.trained_bytes(model)
        return {"weights": total - adapter, "adapter": adapter}
    sizes = stream.nbytes
    (rest,) = sizes.keys() - {"slots", "resident"}
    return {"weights": sizes["slots"] + sizes["resident"], f"weights on {rest}": sizes[rest]}
