"""The model of a job, and where its weights rest."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import get_quantization_config

from chunkft.memory.budget import this_computer
from chunkft.models import adapters
from chunkft.models.load import load_model
from chunkft.recipes.chunks import stream
from chunkft.recipes.fitting import must_stream
from chunkft.recipes.job import Job

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
    """The job's model and its tokenizer; `auto` and `more` as in `load_model`."""
    return load_model(
        model_of(job),
        auto=auto,
        trust_remote_code=job.training.trust_remote_code,
        cache_dir=Path(job.chunk.cache_dir).expanduser(),
        **loading(job),
        **more,
    )


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


def settle(trainer: Any) -> None:
    """After a trainer has put an adapter around its model (adapters.settle)."""
    if isinstance(trainer.model, PeftModel):
        adapters.settle(trainer.model)
