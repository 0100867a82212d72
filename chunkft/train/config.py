"""The settings of a run that are ours, and the rules that fill those nobody gave.

Layout `spread`. K = 8, doubled while the fp32 gradient, master and two moments of a chunk exceed
1 GiB, to 64 at most. T = 1 in `spread`; 20, or what lets two cycles fit, in `stream` and with state
on disk. Moments decay while a chunk rests where the rule is AdamW. Learning rate: TRL's times
sqrt(K), twice that in `spread`. LOG.md says from which measurements.
"""

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from chunkft.errors import InputError

FEWEST_CHUNKS, MOST_CHUNKS = 8, 64
BYTES_PER_ELEMENT, WORKING_BYTES = 16, 2**30
LONG_VISIT = 20
DENSE_LEARNING_RATE = 2e-5  # TRL's default for dense AdamW in SFT

CHECKPOINTING = {"gradient_checkpointing", "activation_checkpointing"}  # one flag, two names

_ALL_AT_ONCE = "needs the model's gradients all at once"
REFUSED = {
    "galore": _ALL_AT_ONCE,
    "lomo": _ALL_AT_ONCE,
    "apollo": _ALL_AT_ONCE,
    "schedule_free": "evaluates other weights than it trains",
}
# names of --optim whose first moment is where `decay` looks for it
ADAPTERS = ("lora", "dora", "rslora", "pissa", "adalora", "oft", "boft", "vera", "ia3", "miss")
ADAPTERS += ("prefix", "prompt", "ptuning")  # by models/adapters.py, which takes PEFT to import

ADAMW = ("adamw_torch", "adamw_apex", "adamw_bnb", "adamw_8bit", "paged_adamw")


def setting(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ChunkArguments:
    """Flags of `chunkft sft` beside TRL's own."""

    recipe: str | None = setting(
        None,
        "Of grpo and rloo: settings under one name, each of which gives way to its own flag. "
        "rlhf-24gb: a 20B model on a card of 24 GB, with an adapter on 4-bit weights, or with "
        "--method chunk on streamed ones; a KL coefficient above 0.",
        choices=["rlhf-24gb"],
    )
    method: str = setting(
        "chunk",
        "chunk: train all parameters, one chunk at a time. exact: all chunks in every step, one "
        "after another: dense training's result at one chunk's memory. full: dense, all at once. "
        "Others: an adapter of PEFT on frozen weights.",
        choices=["chunk", "exact", "full", *ADAPTERS],
    )
    trainable: str | None = setting(
        None,
        "Budget of an adapter, such as 0.2%% or 500000: the rank, block size or number of virtual "
        "tokens that comes closest is taken. Or give it as --lora_r.",
    )
    adapter_kwargs: str | None = setting(
        None,
        "JSON: settings of PEFT's configuration class by its own names, such as "
        '\'{"init_lora_weights": "olora"}\'.',
    )
    quantize: str | None = setting(
        None,
        "Frozen weights under an adapter in 4 or 8 bits, by bitsandbytes.",
        choices=["nf4", "int8"],
    )
    chunks: int | None = setting(
        None,
        f"K, chunks the weights are cut into (default {FEWEST_CHUNKS}, doubled to at most "
        f"{MOST_CHUNKS} until a chunk works in 1 GiB; fewer in short runs).",
    )
    interval: int | None = setting(
        None,
        f"T, optimizer steps of a visit to a chunk (default 1; in stream or with a store on disk "
        f"{LONG_VISIT}, or what lets two cycles fit).",
    )
    layout: str = setting(
        "spread",
        "spread: a chunk is a share of rows of every tensor. stream: contiguous, cheaper steps.",
        choices=["spread", "stream"],
    )
    order: str = setting("cyclic", "Order of visits.", choices=["cyclic", "shuffled", "reversed"])
    moments: str | None = setting(
        None,
        "Optimizer state between visits: persist, reset, or decay (first moment by beta1 a step; "
        "default with AdamW, else persist).",
        choices=["persist", "reset", "decay"],
    )
    store: str = setting("host", "Where resting state lives: host, device, or a directory on disk.")
    state_bits: int = setting(
        32,
        "8: moments rest block-wise in 8 bits, rounded stochastically, and work in fp32: of a bf16 "
        "model under AdamW 4 bytes an element instead of 10.",
        choices=[32, 8],
    )
    state_block: int | None = setting(
        None,
        "Elements: the active chunk's state rests too and visits the device in the step only, so "
        "many at a time (4194304 take 0.1 GiB). Slower; in 32 bits the same weights to the bit.",
    )
    stream_weights: bool = setting(
        False,
        "Weights rest on the host, or in files where --store is a directory, and visit the device "
        "layer by layer: two layers and the head are there at once.",
    )
    resident_layers: int = setting(
        0, "With --stream_weights: so many layers, the last ones, stay on the device all the same."
    )
    memory: str | None = setting(
        None,
        "Memory for tensors on the device, such as 12GiB: whatever of chunks and checkpointing is "
        "not given is chosen to fit, and an over-run is told. On a CPU it bounds the process.",
    )
    reference: str = setting(
        "auto",
        "Of dpo, grpo and rloo. auto: the adapter switched off, or for all weights numbers made "
        "before training (dpo) or a copy. copy: a frozen copy, streamed if the weights are.",
        choices=["auto", "copy"],
    )
    reward_timeout: float = setting(
        60.0, "Seconds that one call of a reward function of grpo and rloo may take."
    )
    shard: str = setting(
        "auto",
        "Of several processes (torchrun --nproc-per-node N -m chunkft ...). fsdp: each has a share "
        "of every weight. ddp: each has all weights. auto: fsdp where they do not fit one device.",
        choices=["auto", "fsdp", "ddp"],
    )
    score_samples: int = setting(
        50, "Held-out items to solve before and after, when the data is a reasoning-gym task."
    )
    train_samples: int = setting(2000, "Items to generate from a reasoning-gym task.")
    cache_dir: str = setting("~/.cache/chunkft", "Where converted models are kept.")


@dataclass(frozen=True)
class Rotation:
    """K and T of a run."""

    chunks: int
    interval: int


def longest_visit(layout: str, store: str) -> int:
    """The T to aim at: short visits learn better, long ones spare a disk.

    Backward through a chunk of `stream` moves one stretch of layers, which gains from staying.
    """
    return 1 if layout == "spread" and store in ("host", "device") else LONG_VISIT


def choose_moments(optim: str) -> str:
    """`decay` where the rule's first moment is one that we know how to scale."""
    return "decay" if optim.startswith(ADAMW) else "persist"


def choose_chunks(parameters: int) -> int:
    """K by working bytes alone."""
    fitting = FEWEST_CHUNKS
    while fitting < MOST_CHUNKS and parameters / fitting * BYTES_PER_ELEMENT > WORKING_BYTES:
        fitting *= 2
    return fitting


def choose_rotation(
    chunks: int | None, interval: int | None, steps: int, parameters: int, longest: int
) -> Rotation:
    """K and T such that two cycles fit into `steps` optimizer steps.

    Args:
        chunks: as given, or None.  interval: as given, or None, which takes `longest` at most.

    Raises:
        InputError: a value below 1, or given values under which weights would never move.
    """
    for name, value in (("chunks", chunks), ("interval", interval)):
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    k = chunks or max(1, min(choose_chunks(parameters), steps // (2 * (interval or 1))))
    t = interval or max(1, min(longest, steps // (2 * k)))
    if k * t > steps:
        raise InputError(
            f"--chunks {k} --interval {t} needs {k * t} steps for one cycle and the run has "
            f"{steps}: {1 - steps / (k * t):.0%} of the parameters would never move; use at most "
            f"{max(steps // t, 1)} chunks, or train longer"
        )
    if k > 1 and 2 * k * t > steps and chunks and interval:
        raise InputError(
            f"--chunks {k} --interval {t} fits {steps / (k * t):.1f} cycles into {steps} steps, 2 "
            f"are needed for even training; use --interval {max(steps // (2 * k), 1)} or less"
        )
    return Rotation(k, t)


def choose_learning_rate(chunks: int, layout: str, dense: float = DENSE_LEARNING_RATE) -> float:
    """The dense rate times sqrt(K), in `spread` twice that.

    Each weight gets 1/K of the updates. Never more than K times the dense rate, with which the
    updates of a weight add up to what they are in dense training.
    """
    factor = sqrt(chunks) if layout == "stream" else min(chunks, 2 * sqrt(chunks))
    return dense * factor


def refuse_optimizer(optim: str, deepspeed: object) -> None:
    """Raise InputError for optimizers and engines that cannot be driven chunk by chunk."""
    for word, why in REFUSED.items():
        if word in optim:
            raise InputError(
                f"--optim {optim}: {word} {why}, so it cannot be driven chunk by chunk; use "
                f"adamw_torch, sgd, adafactor or adamw_8bit"
            )
    if deepspeed:
        raise InputError("--deepspeed takes the optimizer's place; leave it out with chunkft")
