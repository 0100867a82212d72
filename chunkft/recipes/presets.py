"""Settings that go together under one name, `--recipe`; each gives way to a flag of its own.

rlhf-24gb: a language model of 20B parameters learns from rewards on a card of 24 GB, near to what
it was (KL coefficient 0.04, as in arXiv 2402.03300). One of

    --method lora (or another adapter)      frozen weights in 4 bits (--quantize int8: in 8); the
                                            reference is the model with the adapter off
    --method chunk (or exact)               all parameters; weights and the reference's copy rest on
                                            the host and visit the card layer by layer, state rests
                                            in 8 bits
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

from chunkft.core.store import GIB
from chunkft.errors import InputError
from chunkft.memory.budget import DEVICES, Device
from chunkft.memory.meter import KINDS
from chunkft.memory.plan import Choice, DoesNotFitError, Limits, Plan
from chunkft.recipes.job import Job
from chunkft.recipes.planning import FREE, plan, refusal
from chunkft.recipes.planning import as_json as plan_as_json
from chunkft.recipes.trial import Answers, Workload
from chunkft.train.config import ADAPTERS, FEWEST_CHUNKS

RLHF_24GB = "rlhf-24gb"
CARD = DEVICES["rtx-4090-24gib"]
RANK, ANSWERS, TOKENS = 8, 8, 128
SETTINGS: dict[str, Any] = {
    "beta": 0.04,
    "memory": f"{(CARD.memory - CARD.reserved) / GIB - 0.005:.2f}GiB",  # rounded down
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": ANSWERS,
    "num_generations": ANSWERS,
    "max_completion_length": TOKENS,
}


def words(job: Job, command: str) -> list[str]:
    """Flags that the job's recipe adds to what was given.

    Raises:
        InputError: an unknown recipe, one of another command, or its KL coefficient given as 0.
    """
    name = job.chunk.recipe
    if name is None:
        return []
    if name != RLHF_24GB:  # of a YAML file no choices are checked
        raise InputError(f"--recipe {name} must be {RLHF_24GB}")
    if command not in ("grpo", "rloo"):
        raise InputError(f"--recipe {name} is one of chunkft grpo and rloo, not of {command}")
    if job.training.beta == 0.0 and "beta" in job.given:
        raise InputError(
            f"--recipe {name} with --beta 0: nothing would keep the policy near to what it was; "
            f"give a value above 0 ({SETTINGS['beta']}), or leave the recipe out"
        )
    added = dict(SETTINGS)
    method = job.chunk.method if "method" in job.given else "lora"
    if method in ADAPTERS:
        if not job.model.use_peft:
            added["method"] = method
        if method == "lora" and job.chunk.trainable is None:
            added["lora_r"] = RANK
        if not {"load_in_4bit", "load_in_8bit"} & job.given:
            added["quantize"] = "nf4"
    elif method != "full":
        added |= {"stream_weights": "true", "state_bits": 8}
    return [w for k, v in added.items() if k not in job.given for w in (f"--{k}", str(v))]


@dataclass(frozen=True)
class Variant:
    """One way to go by the recipe, as it is planned."""

    name: str
    flags: str
    load: Workload
    choice: Choice
    free: tuple[str, ...]


def variants(config: PretrainedConfig, seq: int, answer: int) -> list[Variant]:
    """The recipe's three, for rows of `seq` tokens of which `answer` are written."""
    from chunkft.models.adapters import configure

    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = configure("lora", outline, RANK)
    # padded, and from the second micro-batch on all are alike
    chunk = Workload(seq, 1, 2, masked=True, answers=Answers(ANSWERS, answer), reference="copy")
    adapter = replace(chunk, adapter=lora, reference="off", autocast=torch.bfloat16)
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    at_once, free = Choice("full", 1), ("checkpointing", "offload")
    streamed = Choice("chunk", FEWEST_CHUNKS, stream_weights=True, state_bits=8)
    return [
        Variant("int8, lora", "--quantize int8", replace(adapter, quantize=int8), at_once, free),
        Variant("nf4, lora", "--quantize nf4", replace(adapter, quantize=nf4), at_once, free),
        Variant("chunk, streamed", "--method chunk", chunk, streamed, FREE),
    ]


def show(
    name: str, config: PretrainedConfig, limits: Limits, device: Device, seq: int, as_json: bool
) -> int:
    """`chunkft plan MODEL --recipe rlhf-24gb`; returns the exit code: 2 when one does not fit.

    Args:
        seq: tokens of prompt and answer.

    Raises:
        InputError: there is no room for both.
    """
    if seq < 2:
        raise InputError(f"--seq {seq} must be at least 2: a token of the prompt, one of an answer")
    answer = min(TOKENS, seq // 2)
    found: dict[str, Plan | DoesNotFitError] = {}
    ways = variants(config, seq, answer)
    for way in ways:
        try:
            found[way.name] = plan(config, way.load, limits, device, way.choice, way.free)
        except DoesNotFitError as error:
            found[way.name] = error
    if as_json:
        told: dict[str, Any] = {}
        for way in ways:
            one = found[way.name]
            fits = isinstance(one, Plan)
            told[way.name] = plan_as_json(one, name, way.load) if fits else refusal(one, name)
        print(json.dumps({"recipe": RLHF_24GB, "plans": told}, indent=1))
    else:
        print(_table(name, ways, found, limits, seq, answer))
    return 2 if any(isinstance(one, DoesNotFitError) for one in found.values()) else 0


def _table(
    name: str,
    ways: list[Variant],
    found: dict[str, Plan | DoesNotFitError],
    limits: Limits,
    seq: int,
    answer: int,
) -> str:
    fitting = {key: one for key, one in found.items() if isinstance(one, Plan)}
    lines = [
        f"{name}, {RLHF_24GB}: {ANSWERS} answers of {answer} tokens to a prompt of {seq - answer}",
        "",
        f"{'on the device, at its peak (GiB)':<34}" + "".join(f"{key:>17}" for key in fitting),
    ]

    def row(title: str, values: list[float]) -> None:
        lines.append(f"{title:<34}" + "".join(f"{value:>17.2f}" for value in values))

    for kind in KINDS:
        sizes = [one.bytes[kind] / GIB for one in fitting.values()]
        if any(sizes):
            row(f"  {kind}", sizes)
    row(f"  total, of {limits.device / GIB:.2f}", [one.total / GIB for one in fitting.values()])
    row("host memory", [one.host / GIB for one in fitting.values()])
    row("seconds a step, at least", [max(one.seconds.values()) for one in fitting.values()])
    lines.append("")
    for way in ways:
        one = found[way.name]
        if isinstance(one, DoesNotFitError):
            lines.append(f"{way.name}: {one}")
        else:
            chunks = f" --chunks {one.choice.chunks}" if one.choice.method == "chunk" else ""
            lines.append(f"{way.name}: chunkft grpo --recipe {RLHF_24GB} {way.flags}{chunks}")
    return "\n".join(lines)
