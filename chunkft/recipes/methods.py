"""What --method asks for beside chunks: an adapter on frozen weights, by PEFT's and TRL's names."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers import PreTrainedModel
from trl import get_peft_config

from chunkft.errors import InputError
from chunkft.models import adapters
from chunkft.models.adapters import METHODS
from chunkft.recipes.job import Job
from chunkft.train.config import CHECKPOINTING

SCHEDULE = {"interval", "layout", "order", "moments", "state_block"}  # of --method chunk only
DENSE = SCHEDULE | {"chunks", "state_bits"}
IDLE = {"chunk": set[str](), "exact": SCHEDULE, "full": DENSE} | dict.fromkeys(METHODS, DENSE)
# TRL's flags for adapters, under PEFT's names; --lora_r is the size of every method
BY_PEFT = {
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_modules_to_save": "modules_to_save",
    "lora_target_parameters": "target_parameters",
    "lora_task_type": "task_type",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}
PROBE = 24  # tokens
ADAPTERS_ONLY = {"trainable", "adapter_kwargs", "lora_r", "lora_target_modules"} | BY_PEFT.keys()


def check(job: Job) -> None:
    """Settle the method, refuse what does not go with it, and say what has no effect.

    Raises:
        InputError: settings that exclude each other; it names both.
    """
    for name, known in (("method", IDLE), ("reference", ("auto", "copy"))):
        value = getattr(job.chunk, name)  # of a YAML file no choices are checked
        if value not in known:
            raise InputError(f"--{name} {value} must be one of {', '.join(known)}")
    _settle(job)
    method, given = job.chunk.method, job.given
    if method in METHODS:
        _check_adapter(job)
    else:
        if job.model.load_in_4bit or job.model.load_in_8bit:
            raise InputError(
                f"--quantize, --load_in_4bit and --load_in_8bit freeze the weights, so --method "
                f"{method} has nothing to train; leave them out, or use --method lora"
            )
        if job.chunk.trainable is not None:
            raise InputError(
                f"--trainable {job.chunk.trainable} with --method {method}, which trains all "
                f"parameters; leave it out, or use --method lora"
            )
        if idle := sorted(ADAPTERS_ONLY & given):
            names = " ".join(f"--{name}" for name in idle)
            print(f"warning: {names} without effect: --method {method} has no adapter")
    if idle := sorted(IDLE[method] & given):
        names = " ".join(f"--{name}" for name in idle)
        what = "an adapter" if method in METHODS else "all weights"
        print(f"warning: {names} without effect: --method {method} trains {what} every step")


def _settle(job: Job) -> None:
    """One way to ask for an adapter, --method, and one for a quantized base, --load_in_*."""
    chunk, model = job.chunk, job.model
    if model.use_peft and chunk.method not in METHODS:
        if "method" in job.given and chunk.method != "full":
            raise InputError(
                f"--use_peft with --method {chunk.method}: chunks train all weights and need no "
                f"adapter; leave one of the two out"
            )
        chunk.method = "dora" if model.use_dora else "rslora" if model.use_rslora else "lora"
    elif chunk.method in METHODS:
        model.use_peft = True
        job.given.discard("use_peft")
    if chunk.quantize not in (None, "nf4", "int8"):  # a YAML file's choices are not checked
        raise InputError(f"--quantize {chunk.quantize} must be nf4 or int8")
    if chunk.quantize == "nf4":
        model.load_in_4bit, model.bnb_4bit_quant_type = True, "nf4"
    elif chunk.quantize == "int8":
        model.load_in_8bit = True
    elif model.load_in_4bit or model.load_in_8bit:
        chunk.quantize = model.bnb_4bit_quant_type if model.load_in_4bit else "int8"


def _check_adapter(job: Job) -> None:
    method, args = METHODS[job.chunk.method], job.training
    name = job.chunk.method
    if job.chunk.stream_weights:
        raise InputError(
            f"--stream_weights with --method {name}: adapters are put around layers, which would "
            f"visit the device without them; leave one of the two out"
        )
    if getattr(args, "sync_ref_model", False):
        raise InputError(
            f"--sync_ref_model with --method {name}: what moves is the adapter, and the reference "
            f"has none; leave one of the two out"
        )
    if job.chunk.trainable is not None and "lora_r" in job.given:
        raise InputError("--trainable chooses the size that --lora_r sets; leave one of them out")
    if not method.is_virtual:
        return
    # 0.08 to 0.36 in the logits, measured: the tokens in front are seen by all records of a row
    for flag in ("packing", "padding_free"):
        if getattr(args, flag, False):
            raise InputError(
                f"--{flag} with --method {name}: its virtual tokens are shared by all records of a "
                f"row; leave --{flag} out, or use lora"
            )
    if name == "prefix" and args.gradient_checkpointing:
        if CHECKPOINTING & job.given:
            raise InputError(
                "--gradient_checkpointing with --method prefix: its keys and values are a cache, "
                "which checkpointed layers drop; leave it out, or use prompt"
            )
        args.activation_checkpointing = args.gradient_checkpointing = False


def adapter_of(job: Job, model: PreTrainedModel) -> PeftConfig | None:
    """PEFT's configuration for the job, or None where all weights train.

    Raises:
        InputError: a setting that PEFT does not have, or a budget that cannot be met.
    """
    name = job.chunk.method
    if name not in METHODS:
        return None
    ours = {"method", "trainable", "adapter_kwargs"} & job.given
    if "use_peft" in job.given and not ours:
        return get_peft_config(job.model)  # `trl sft --use_peft` keeps its meaning
    options, given = job.model, job.given
    known = METHODS[name].config.__dataclass_fields__
    more: dict[str, Any] = {}
    for flag, setting in BY_PEFT.items():
        if flag in given and setting in known:
            more[setting] = getattr(options, flag)
        elif flag in given:
            print(f"warning: --{flag} without effect: {name} has no {setting}")
    more |= _kwargs(job.chunk.adapter_kwargs)
    targets = options.lora_target_modules
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        targets = [targets]  # TRL makes a list of one its item, which PEFT takes for an expression
    dial = options.lora_r if "lora_r" in given else None
    if job.chunk.trainable is not None:
        budget = adapters.parse_budget(str(job.chunk.trainable), model.num_parameters())
        dial = adapters.size_for(name, model, budget, targets, more).dial
    return adapters.configure(name, model, dial, targets, more)


def _kwargs(given: str | dict[str, Any] | None) -> dict[str, Any]:
    if not isinstance(given, str):
        return dict(given or {})
    try:
        found = json.loads(given)
    except ValueError as error:
        raise InputError(f"--adapter_kwargs {given!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"--adapter_kwargs {given!r} must be an object such as '{{\"r\": 8}}'")
    return found


def probe(job: Job, model: PreTrainedModel) -> Tensor:
    """Logits of a fixed text, to be compared once an adapter is there and off.

    On the device where the trainer will have the model: another one rounds otherwise.
    """
    if not job.chunk.quantize:  # bitsandbytes has placed its own
        model.to(job.training.device)  # pyright: ignore[reportArgumentType]
    vocabulary: Any = model.config.get_text_config().vocab_size
    ids = torch.arange(PROBE, device=model.device)[None] * 7919 % vocabulary
    mode = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    model.train(mode)
    return logits


def check_off(job: Job, model: Any, before: Tensor) -> None:
    """Prove that `model` with its adapter off is the base, of which `before` are the logits.

    Raises:
        InputError: it is not; PiSSA and OLoRA take what they train out of the weights.
    """
    with model.disable_adapter():
        off = probe(job, model)
    if not torch.equal(off[:, -PROBE:], before):
        raise InputError(
            f"--method {job.chunk.method}: with the adapter off the model is not its base (logits "
            f"differ by {(off[:, -PROBE:] - before).abs().max():.2g}), so it cannot be the "
            f"reference; use --reference copy, or lora"
        )


def given_to_peft(job: Job) -> set[str]:
    """Settings of PEFT's configuration that somebody wrote down, by its own names."""
    return {BY_PEFT[flag] for flag in BY_PEFT if flag in job.given} | _kwargs(
        job.chunk.adapter_kwargs
    ).keys()


def describe(name: str, model: Any) -> str:
    """One line: the adapter in use, its size, and its share of the model."""
    count, total = adapters.trained(model), _elements(model)
    sized = adapters.dial_of(model.active_peft_config)
    return (
        f"{name}{f' ({sized})' if sized else ''}: {count:,} trainable parameters, "
        f"{count / total:.3%} of the model's {total:,}"
    )


def told(model: Any, job: Job) -> dict[str, Any]:
    """What a report says of an adapter."""
    saved = Path(str(job.training.output_dir)) / SAFETENSORS_WEIGHTS_NAME
    config = model.active_peft_config
    targets = getattr(config, "target_modules", None) or ()
    count, total = adapters.trained(model), _elements(model)
    return {
        "size": adapters.dial_of(config) or "fixed",
        "target modules": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        "trainable parameters": f"{count:,} ({count / total:.3%} of {total:,})",
        "adapter on disk": f"{saved.stat().st_size / 2**20:.2f} MiB",
        "frozen weights": job.chunk.quantize or job.model.dtype,
    }


def _elements(model: Any) -> int:
    """Of the model without its adapter; packed 4-bit weights count by what they stand for."""
    base = model.get_base_model()
    return base.num_parameters() - sum(p.numel() for p in base.parameters() if p.requires_grad)
