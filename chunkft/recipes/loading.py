"""The model of a job, and where its weights rest."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import get_quantization_config

from chunkft.core.ranks import world_size
from chunkft.errors import InputError
from chunkft.memory.budget import this_computer
from chunkft.models import adapters
from chunkft.models.adapters import METHODS
from chunkft.models.load import load_model
from chunkft.recipes.chunks import stream
from chunkft.recipes.fitting import must_shard, must_stream
from chunkft.recipes.job import Job
from chunkft.train import sharding

DEFAULT_MODEL = "smollm2-135m"


def model_of(job: Job) -> str:
    """The model's name, or the default's."""
    return job.model.model_name_or_path or DEFAULT_MODEL


def loading(job: Job) -> dict[str, Any]:
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


def load(job: Job, auto: Any = AutoModelForCausalLM, **more: Any) -> tuple[PreTrainedModel, Any]:
    """The job's model and its tokenizer; `auto` and `more` as in `load_model`.

    Weights that are to be sharded come in the checkpoint's dtype, mapped from its files: a cast
    would give every process a copy of all of them. Not under an adapter, which takes the dtype of
    its weights for that of its first values.
    """
    kwargs: dict[str, Any] = loading(job) | more
    kwargs["auto"], kwargs["trust_remote_code"] = auto, job.training.trust_remote_code
    kwargs["cache_dir"] = Path(job.chunk.cache_dir).expanduser()
    if job.chunk.shard == "fsdp" and job.chunk.stream_weights:
        raise InputError(
            "--stream_weights with --shard fsdp: weights rest in one way; leave one out"
        )
    if world_size() == 1:
        if job.chunk.shard == "fsdp":
            raise InputError("--shard fsdp needs several processes: torchrun --nproc-per-node N")
        return load_model(model_of(job), **kwargs)
    if job.chunk.shard != "ddp":
        mapped: dict[str, Any] = {} if job.chunk.method in METHODS else {"dtype": "auto"}
        found = load_model(model_of(job), **kwargs | mapped)
        if job.chunk.shard == "fsdp" or must_shard(job, found[0], this_computer()):
            job.chunk.shard = "fsdp"
            sharding.keep_from_device(found[0])
            return found
    job.chunk.shard = "ddp"
    return load_model(model_of(job), **kwargs)


def stream_if_need_be(job: Job, model: PreTrainedModel, copies: int = 1) -> None:
    """Let weights rest away from the device where that was asked for, or they have no room.

    Args:
        copies: of the model that there are in all.
    """
    job.chunk.stream_weights |= must_stream(job, model, this_computer(), copies)
    if job.chunk.stream_weights:
        stream(job, model)


def computed_in(trainer: Any) -> torch.dtype:
    """Of the forward passes: autocast's, where a run has it, else the weights'."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}
    own: torch.dtype = trainer.model.dtype
    return autocast.get(trainer.accelerator.mixed_precision, own)


def settle(job: Job, trainer: Any) -> None:
    """After a trainer has put an adapter around its model: adapters.settle, and shards."""
    if isinstance(trainer.model, PeftModel):
        adapters.settle(trainer.model)
    if job.chunk.shard != "fsdp":
        return
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            sharding.shard(model, job.training.device)
            if job.model.dtype != "auto":
                sharding.cast(model, getattr(torch, job.model.dtype or "bfloat16"))
    print(f"weights are sharded over {world_size()} ranks (FSDP2)", flush=True)
