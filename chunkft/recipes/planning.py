"""`chunkft plan`: what fine-tuning a model takes, from its config alone.

config -> the model on fake tensors (trial.py) -> dry runs (memory/dry_run.py) -> plan
(memory/plan.py)
"""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from chunkft.core.store import GIB
from chunkft.errors import InputError
from chunkft.memory.budget import DEVICES, Device, devices_of, parse_bytes, smallest_of
from chunkft.memory.eight_bit import EightBitMoments
from chunkft.memory.plan import Choice, DoesNotFitError, Limits, Plan, make_plan
from chunkft.models.shapes import config_of
from chunkft.recipes.trial import Workload, trial_of
from chunkft.train.config import FEWEST_CHUNKS

# transformers' own: inputs of checkpointed layers in page-locked memory until backward
OFFLOAD = {"offload": True}
SEQ = 1024  # tokens of a row, as TRL's max_length
FREE = ("chunks", "checkpointing", "offload", "block", "shard", "stream_weights")


def run(options: argparse.Namespace) -> int:
    """`chunkft plan`; returns the exit code: 0, or 2 when it does not fit."""
    memory = parse_bytes(options.memory) if options.memory else None
    ranks = 1
    if options.gpus == "none":
        device = DEVICES["laptop-16gib"]
    elif options.gpus:
        device, ranks = devices_of(options.gpus)
    elif memory is not None:
        device = smallest_of(memory)
    else:
        raise InputError("give --memory 24GiB, or --gpus with one of " + ", ".join(DEVICES))
    if options.shard == "fsdp" and (ranks == 1 or options.stream_weights):
        beside = "--stream-weights" if options.stream_weights else "one device: --gpus 2xNAME"
        raise InputError(f"--shard fsdp does not go with {beside}")
    for name in ("seq", "batch", "accumulation", "interval"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)} must be at least 1")
    limits = Limits(
        device.memory - device.reserved if memory is None else memory,
        parse_bytes(options.host_memory) if options.host_memory else None,
        parse_bytes(options.disk) if options.disk else None,
    )
    if options.recipe:
        from chunkft.recipes import presets  # it takes PEFT and bitsandbytes

        if ranks > 1:
            raise InputError(f"--recipe {options.recipe} plans one device, not {options.gpus}")
        config, seq = config_of(options.model), options.seq or 2 * presets.TOKENS
        return presets.show(options.model, config, limits, device, seq, options.json)
    rows = None
    if options.dataset_name:
        rows = _padding().measure(options, options.seq or SEQ)
    if options.seq is None:
        options.seq = rows.longest if rows else SEQ
    load = Workload(options.seq, options.batch, options.accumulation, getattr(torch, options.dtype))
    start = Choice(options.method, options.chunks or FEWEST_CHUNKS, options.interval)
    start = replace(start, layout=options.layout or "spread", store=options.store)
    start = replace(start, ranks=ranks, shard=options.shard == "fsdp")
    if start.shard and options.layout is None and options.method == "chunk":
        start = replace(start, layout="stream")
    start = replace(start, stream_weights=options.stream_weights, state_bits=options.state_bits)
    start = replace(start, block=options.state_block, resident_layers=options.resident_layers)
    if options.resident_layers < 0:
        raise InputError(f"--resident-layers {options.resident_layers} must be at least 0")
    if options.method == "full":  # nothing rests
        start = replace(start, chunks=1, block=None, state_bits=32)
    free = FREE[1:] if options.chunks else FREE
    if ranks == 1 or options.shard != "auto":
        free = tuple(name for name in free if name != "shard")
    if options.layout is None:
        free = (*free, "layout")
    try:
        found = plan(config_of(options.model), load, limits, device, start, free)
    except DoesNotFitError as error:
        if not options.json:
            raise
        print(json.dumps(refusal(error, options.model), indent=1))
        return 2
    if options.json:
        data = {"data": rows._asdict()} if rows else {}
        print(json.dumps(as_json(found, options.model, load) | data, indent=1))
        return 0
    print(as_text(found, options.model, load))
    if rows:
        print(_padding().as_text(rows, options.batch))
    return 0


def _padding() -> Any:
    """It needs datasets and trl, which no plan does."""
    from chunkft.recipes import padding

    return padding


def plan(
    config: PretrainedConfig,
    load: Workload,
    limits: Limits,
    device: Device,
    start: Choice,
    free: tuple[str, ...] = FREE,
) -> Plan:
    """Settings for `config` within `limits`.

    Raises:
        DoesNotFitError: there are none.
    """
    return make_plan(trial_of(config, load, device.bus == 0), start, limits, device, free)


def as_text(found: Plan, name: str, load: Workload) -> str:
    """The plan as a table."""
    choice = found.choice
    lines = [f"{name}, {load.batch} x {load.seq} tokens, {str(load.dtype).removeprefix('torch.')}"]
    where = "on the device, at its peak"
    if choice.ranks > 1:
        lines[0] += f", on each of {choice.ranks} devices"
        where = "on each device, at its peak"
    lines += ["", f"{where:<34}{'GiB':>9}"]
    lines += [f"  {kind:<32}{size / GIB:>9.2f}" for kind, size in found.bytes.items() if size]
    if found.pools:
        lines += [f"  {'kept for the streams of FSDP':<32}{found.pools / GIB:>9.2f}"]
    lines += [f"  {'total':<32}{found.needed / GIB:>9.2f}   of {found.memory / GIB:.2f}"]
    of_all = " of all ranks" if choice.ranks > 1 else ""
    lines += [f"{'host memory' + of_all:<34}{found.host / GIB:>9.2f}"]
    lines += [f"{'disk':<34}{found.disk / GIB:>9.2f}"]
    if found.homes:
        homes = found.homes * choice.ranks
        lines += [f"{'  of these streamed weights':<34}{homes / GIB:>9.2f}"]
    if choice.ranks > 1:
        lines += ["", f"{'a rank sends to the others a step':<34}{'GiB':>9}"]
        lines += [f"{'  weights that they share':<34}{found.gathered / GIB:>9.2f}"]
        lines += [f"{'  means of gradients, at most':<34}{found.averaged / GIB:>9.2f}"]
    lines += [""]
    bounds = ", ".join(f"{name} {value:.3g}" for name, value in found.seconds.items())
    lines += [f"seconds a step, at least: {max(found.seconds.values()):.3g}  (bounds: {bounds})"]
    words = []
    if choice.ranks > 1:
        words = [f"torchrun --nproc-per-node {choice.ranks} -m chunkft sft"]
        words.append("--shard fsdp" if choice.shard else "--shard ddp")
    words.append(f"--method {choice.method}")
    if choice.method != "full":
        words.append(f"--chunks {choice.chunks} --store {choice.store}")
        words += ["--state_bits 8"] if choice.state_bits == 8 else []
        words += [f"--state_block {choice.block}"] if choice.block else []
    if choice.method == "chunk":
        words.append(f"--layout {choice.layout} --interval {choice.interval}")
    words.append(f"--gradient_checkpointing {str(choice.checkpointing).lower()}")
    if choice.offload:
        words.append("--gradient_checkpointing_kwargs '" + json.dumps(OFFLOAD) + "'")
    if choice.stream_weights:
        words.append("--stream_weights true")
    if choice.stream_weights and choice.resident_layers:
        words.append(f"--resident_layers {choice.resident_layers}")
    return "\n".join([*lines, "settings: " + " ".join(words)])


def refusal(error: DoesNotFitError, name: str) -> dict[str, Any]:
    """What `as_json` would be, where nothing fits."""
    return {"model": name, "fits": False, "needed": error.needed, "why": str(error)}


def as_json(found: Plan, name: str, load: Workload) -> dict[str, Any]:
    """The plan for programs; amounts in bytes."""
    told = asdict(found) | {"total": found.total, "model": name, "fits": True}
    told["needed"] = found.needed
    # a Store is no JSON, and would make its directory
    choice = found.choice
    plain = replace(found, choice=replace(choice, state_bits=32, block=None)).settings
    if choice.state_bits == 8 or choice.block:
        codec = EightBitMoments.__name__ if choice.state_bits == 8 else None
        plain["store"] = {"kind": choice.store, "codec": codec, "block": choice.block}
    return told | {"seq": load.seq, "batch": load.batch, "settings": plain}
