"""`chunkft plan`: what fine-tuning a model takes, from its config alone.

config -> the model on fake tensors -> dry runs (memory/dry_run.py) -> plan (memory/plan.py)
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.store import GIB
from chunkft.errors import as_input_error
from chunkft.memory.budget import Device
from chunkft.memory.dry_run import DryRun, dry_run, fake
from chunkft.memory.plan import Choice, Limits, Plan, make_plan
from chunkft.models.losses import install_head, is_plain_head


@dataclass(frozen=True)
class Workload:
    """One micro-batch, and the optimizer."""

    seq: int = 1024
    """Tokens of a row."""
    batch: int = 1
    """Rows."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    dtype: torch.dtype = torch.bfloat16
    rule: type[torch.optim.Optimizer] = torch.optim.AdamW
    kwargs: dict[str, Any] | None = None
    """Of the rule."""
    attention: str = "sdpa"


def trial_of(config: PretrainedConfig, load: Workload) -> Callable[[Choice], DryRun]:
    """A dry run of the model of `config` under a choice of settings."""

    def trial(choice: Choice) -> DryRun:
        with fake(), as_input_error(f"a dry run of {type(config).__name__}"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=load.dtype, attn_implementation=load.attention
            ).train()
            if choice.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            settings: dict[str, Any] = {"chunks": choice.chunks, "exact": choice.method == "exact"}
            if choice.method != "exact":
                settings |= {"interval": choice.interval, "layout": choice.layout}
            optimizer = ChunkedOptimizer(
                model, load.rule, max_grad_norm=1.0, **settings, **(load.kwargs or {"lr": 1e-5})
            )
            install_head(model)
            ids = torch.zeros(load.batch, load.seq, dtype=torch.long)
            more = {"fused_lm_head": True} if is_plain_head(model) else {}

            def backward() -> None:
                for _ in range(load.accumulation):
                    loss = model(input_ids=ids, labels=ids, use_cache=False, **more).loss
                    (loss / load.accumulation).backward()

            chunks = (0,) if choice.layout == "spread" else (0, len(optimizer.partition) - 1)
            width = config.get_text_config().vocab_size
            return dry_run(model, optimizer, backward, chunks, width, choice.offload)

    return trial


def plan(
    config: PretrainedConfig,
    load: Workload,
    limits: Limits,
    device: Device,
    start: Choice,
    free: tuple[str, ...] = ("chunks", "checkpointing", "offload"),
) -> Plan:
    """Settings for `config` within `limits`.

    Raises:
        DoesNotFitError: there are none.
    """
    return make_plan(trial_of(config, load), start, limits, device, free)


def as_text(found: Plan, name: str, load: Workload) -> str:
    """The plan as a table."""
    choice = found.choice
    lines = [f"{name}, {load.batch} x {load.seq} tokens, {str(load.dtype).removeprefix('torch.')}"]
    lines += ["", f"{'on the device, at its peak':<34}{'GiB':>9}"]
    lines += [f"  {kind:<32}{size / GIB:>9.2f}" for kind, size in found.bytes.items() if size]
    lines += [f"  {'total':<32}{found.total / GIB:>9.2f}   of {found.memory / GIB:.2f}"]
    lines += [f"{'host memory':<34}{found.host / GIB:>9.2f}"]
    lines += [f"{'disk':<34}{found.disk / GIB:>9.2f}", ""]
    bounds = ", ".join(f"{name} {value:.3g}" for name, value in found.seconds.items())
    lines += [f"seconds a step, at least: {max(found.seconds.values()):.3g}  (bounds: {bounds})"]
    words = [f"--method {choice.method}"]
    if choice.method != "full":
        words.append(f"--chunks {choice.chunks} --store {choice.store}")
    if choice.method == "chunk":
        words.append(f"--layout {choice.layout} --interval {choice.interval}")
    words.append(f"--gradient_checkpointing {str(choice.checkpointing).lower()}")
    words.append(f"--activation_offloading {str(choice.offload).lower()}")
    return "\n".join([*lines, "settings: " + " ".join(words)])


def as_json(found: Plan, name: str, load: Workload) -> str:
    """The plan for programs; amounts in bytes."""
    told = asdict(found) | {"total": found.total, "model": name, "fits": True}
    told |= {"seq": load.seq, "batch": load.batch, "settings": found.settings}
    return json.dumps(told, indent=1)
