"""One case of benchmarks/gpu.py: a model of random weights, a method, some steps, what they took.

Nothing here asks which device it is on, but for what only CUDA can tell (null elsewhere). torch and
transformers are enough; peft and bitsandbytes serve the rows named after them.

    seconds    from one step's loss to the next one's: what a step has not waited for, the state on
               its way to the host, goes on under the next, as in training
    mfu        (6 N + 12 layers * width * tokens of a row) FLOPs a token (PaLM, arXiv 2204.02311,
               appendix B; N without the input embedding) over seconds over the card's dense bf16
               FLOP/s: what dense training without recomputation would need, whatever the method did
    hfu        the FLOPs that the step took, recomputation too, counted in the plan's dry run
    allocated, reserved, process   `chunkft.memory.budget.card_peaks`, since the model was built
    pinned     page-locked host memory: resting state, weights at home, and torch's own
"""

import importlib.util
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.amp.autocast_mode import autocast
from torch.autograd.graph import save_on_cpu
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.methods import Batch, clipped_step, lora, loss_of, random_batches
from chunkft import ChunkedOptimizer
from chunkft.core.ranks import held
from chunkft.core.schedule import Schedule
from chunkft.core.store import GIB, Store
from chunkft.memory.budget import DEVICES, card_peaks
from chunkft.memory.plan import Choice, Limits
from chunkft.memory.streaming import WeightStream, stream_weights
from chunkft.models.losses import install_head
from chunkft.models.shapes import config_of
from chunkft.recipes.planning import plan
from chunkft.recipes.trial import Workload, checkpoint_layers, simulated_ranks

RATE = 1e-5
RULE: dict[str, Any] = {"lr": RATE, "fused": True, "weight_decay": 0.0}
PROCESS = 4 * GIB  # of host memory: interpreter, libraries, CUDA's own
CONTEXT = DEVICES["h100-80gb"].reserved
LONGEST = 40  # seconds of measuring, after which no further step begins


class Skipped(Exception):
    """This machine lacks something that the case needs."""


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    model: str
    """A name that `chunkft plan` takes."""
    batch: int
    """Rows of `seq` tokens."""
    method: str
    """chunk | exact | lora | adamw (fp32 weights under autocast to bf16) | adamw-8bit."""
    chunks: int = 64
    interval: int = 1
    """T, optimizer steps of a visit; a step is then the mean over `steps`, whole visits."""
    layout: str = "spread"
    block: int | None = None
    """Elements of state on the device at once; None keeps the active chunk's there."""
    checkpointing: bool = True
    offload: bool = False
    """Inputs of checkpointed layers wait on the host."""
    streamed: bool = False
    """Weights rest on the host."""
    ranks: int = 1
    shard: bool = False
    """The device is one rank's of several that share the weights (FSDP2), of which the others are
    not there: what they send is a copy of what this one has, in its own memory and not on a link.
    """
    seq: int = 1024
    few: int = 4
    """Chunks that are visited, over and over: host memory holds the state of these, and every visit
    moves state both ways as in a later cycle."""
    steps: int = 8
    """Measured at most."""

    @property
    def name(self) -> str:
        """Its settings in words."""
        words = ["streamed"] if self.streamed else []
        words += [f"one of {self.ranks} ranks, FSDP2,"] if self.shard else []
        words.append(self.method)
        if self.method in ("chunk", "exact"):
            words.append(f"K={self.chunks}")
        if self.method == "chunk":
            words.append(self.layout)
        if self.interval > 1:
            words.append(f"T={self.interval}")
        if self.block is not None:
            words.append(f"block {self.block / 2**20:g}M")
        words += ["checkpointing"] if self.checkpointing else []
        words += ["offload"] if self.offload else []
        return " ".join(words)


@dataclass(frozen=True)
class Few(Schedule):
    """Visits `few` chunks over and over, from the first to the last: in `stream` they differ."""

    few: int = 4

    def chunk(self, step: int) -> int:
        visit = (step - self.start) // self.interval
        return visit % self.few * (self.chunks - 1) // max(1, self.few - 1)


@dataclass
class Built:
    """A method, ready to step."""

    model: Any
    update: Callable[[], None]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Forward and backward run within it."""
    optimizer: ChunkedOptimizer | None = None
    stream: WeightStream | None = None
    loss: Callable[[Any, Batch], torch.Tensor] = loss_of

    def step(self, batch: Batch) -> float:
        with self.around():
            loss = self.loss(self.model, batch)
            loss.backward()
        self.update()
        return loss.item()  # waits for the update too

    def at_rest(self) -> int:
        """Bytes of state, gradients and weights where they rest."""
        state = 0 if self.optimizer is None else self.optimizer.nbytes["resting"]
        return state + (0 if self.stream is None else self.stream.nbytes.get("host", 0))


def run(case: Case, device: str) -> dict[str, Any]:
    """Build the case on `device` ("cuda" or "cpu"), step, and tell what it took.

    Raises:
        Skipped: something is missing here, memory for example.
    """
    config = config_of(case.model)
    size = parameters(config)
    refuse(case, size, device)
    torch.manual_seed(0)
    begin = time.perf_counter()
    with simulated_ranks(case.ranks, device) as mesh:
        built = build(case, config, device, mesh)
        return measure(case, config, device, built, size, time.perf_counter() - begin)


def measure(
    case: Case, config: PretrainedConfig, device: str, built: Built, size: int, build_seconds: float
) -> dict[str, Any]:
    """What steps of a built case take."""
    if device == "cuda":
        torch.cuda.empty_cache()  # of what streamed weights left behind
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"parameters": size, "build_seconds": build_seconds}
    seconds, losses = timed(case, built, batches(case, config, device))
    found |= {"first_loss": losses[0], "last_loss": losses[-1]}
    middle = statistics.median if case.interval == 1 else statistics.fmean
    found |= {"seconds": middle(seconds), "worst": max(seconds), "timed": len(seconds)}
    found["tokens_per_second"] = case.batch * case.seq / found["seconds"]
    found |= {f"{kind}_gib": bytes_ / GIB for kind, bytes_ in card_peaks().items()}
    found["pinned_gib"] = None
    found["device"] = "cpu"
    if device == "cuda":
        own = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
        found["pinned_gib"] = (built.at_rest() + own) / GIB
        found["device"] = torch.cuda.get_device_name()
    unit = 1 if sys.platform == "darwin" else 1024
    found["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    rate = peak_flops(found["device"])
    dense = model_flops(config, size, case)
    found["mfu"] = dense / found["seconds"] / rate if rate else None
    return found | {"torch": torch.__version__}


def timed(case: Case, built: Built, given: Iterator[Batch]) -> tuple[list[float], list[float]]:
    """Seconds of each measured step, and the losses of all steps."""
    warm_up = case.few * case.interval + 1 if case.method == "chunk" else 1
    losses = [built.step(next(given)) for _ in range(warm_up)]
    seconds: list[float] = []
    begin = before = time.perf_counter()
    while len(seconds) < case.steps and before - begin < LONGEST:
        losses.append(built.step(next(given)))
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return seconds, losses


def batches(case: Case, config: PretrainedConfig, device: str) -> Iterator[Batch]:
    given = random_batches(case.seq, config.get_text_config().vocab_size)
    while True:
        rows = [next(given)["input_ids"] for _ in range(case.batch)]
        ids = torch.cat(rows).to(device)
        yield {"input_ids": ids, "labels": ids}


def build(case: Case, config: PretrainedConfig, device: str, mesh: Any = None) -> Built:
    model = random_model(case, config, device, mesh).train()
    if case.checkpointing:
        checkpoint_layers(model)
    if case.method == "lora":
        method = lora(model, RATE)
        return Built(method.model, method.update, offload(case, device))
    weights = list(model.parameters())
    if case.method == "adamw":
        dense = torch.optim.AdamW(weights, **RULE)
        return Built(model, clipped_step(weights, dense), lambda: autocast(device, torch.bfloat16))
    if case.method == "adamw-8bit":
        import bitsandbytes

        eight = bitsandbytes.optim.AdamW8bit(weights, lr=RATE, weight_decay=0.0)
        return Built(model, clipped_step(weights, eight), offload(case, device))
    stream = stream_weights(model, device=device) if case.streamed else None
    settings: dict[str, Any] = {"exact": True}
    if case.method == "chunk":
        settings = {"interval": case.interval, "layout": case.layout}
    optimizer = ChunkedOptimizer(
        model,
        torch.optim.AdamW,
        chunks=case.chunks,
        store=Store("host", block=case.block),
        max_grad_norm=1.0,
        **settings,
        **RULE,
    )
    if case.method == "chunk":
        optimizer.schedule = Few(
            case.chunks, interval=case.interval, few=min(case.few, case.chunks)
        )
    around = offload(case, device)
    if case.shard:  # a part of the model alone would not gather what lies around it
        install_head(model)
        return Built(model, optimizer.step, around, optimizer, None, loss_of_whole)
    return Built(model, optimizer.step, around, optimizer, stream)


def loss_of_whole(model: Any, batch: Batch) -> torch.Tensor:
    """`loss_of` by the model's own forward pass."""
    return model(**batch, fused_lm_head=True, use_cache=False).loss


def random_model(case: Case, config: PretrainedConfig, device: str, mesh: Any) -> Any:
    kind = torch.float32 if case.method == "adamw" else torch.bfloat16
    settings: dict[str, Any] = {"dtype": kind, "attn_implementation": "sdpa"}
    if not case.shard:
        with torch.device(device):  # a GPU fills 7B with random numbers in less than a second
            return AutoModelForCausalLM.from_config(config, **settings)
    from accelerate import init_empty_weights

    from chunkft.train import sharding

    with init_empty_weights():  # no device may have room for all of them
        model = AutoModelForCausalLM.from_config(config, **settings)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sharding.shard(model, torch.device(device), mesh)
    model.to_empty(device=torch.device(device))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    for weight in model.parameters():
        own = held(weight)
        own.fill_(1.0) if own.dim() == 1 else own.normal_(0.0, 0.02)
    return model


def offload(case: Case, device: str) -> Callable[[], AbstractContextManager[Any]]:
    """torch's own: under checkpointing all it finds are the layers' inputs and the head's."""
    assert case.checkpointing or not case.offload  # it would take the weights along
    return (lambda: save_on_cpu(pin_memory=device == "cuda")) if case.offload else nullcontext


# -- what is known before -----------------------------------------------------------------------


def refuse(case: Case, size: int, device: str) -> None:
    """Raise Skipped where the case cannot run, before anything large is built."""
    for method, package in (("lora", "peft"), ("adamw-8bit", "bitsandbytes")):
        if case.method == method and importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is not installed")
    needed, there = host_bytes(case, size), available()
    if there is not None and needed > there:
        raise Skipped(f"needs {needed / GIB:.1f} GiB of host memory, {there / GIB:.1f} there")
    if device != "cuda":
        return
    weights = 0 if case.streamed else 2 * size // case.ranks
    # gradient, and one byte each of two moments; or four of everything
    weights *= {"adamw-8bit": 3, "adamw": 8}.get(case.method, 1)
    total = torch.cuda.get_device_properties(0).total_memory
    if weights + CONTEXT > total:
        raise Skipped(
            f"needs more than {(weights + CONTEXT) / GIB:.1f} GiB on the device, "
            f"{total / GIB:.1f} there"
        )


def parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return sum(p.numel() for p in model.parameters())


def host_bytes(case: Case, size: int) -> int:
    """Of AdamW's resting state (10 an element), exact mode's gradients, weights at home."""
    state = {"chunk": 10 * size * min(case.few, case.chunks) // case.chunks, "exact": 12 * size}
    state = {method: bytes_ // case.ranks for method, bytes_ in state.items()}
    return PROCESS + state.get(case.method, 0) + (2 * size if case.streamed else 0)


def available() -> int | None:
    """Bytes of host memory to be had, by Linux and by the container; None where nobody says."""
    found: list[int] = []
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        found.append(int(most) - int(used.read_text()))
    return min(found, default=None)


def model_flops(config: PretrainedConfig, size: int, case: Case) -> float:
    """Of one step by the formula above."""
    text = config.get_text_config()
    embedding = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    attention = 12 * text.num_hidden_layers * text.hidden_size * case.seq
    return (6.0 * (size - embedding) + attention) * case.batch * case.seq


def peak_flops(card: str) -> float | None:
    """Dense bf16 FLOP/s of a card by the name that CUDA gives it; None if it is not known."""
    for name, device in DEVICES.items():
        model = name.rpartition("-")[0].replace("-", " ")
        if device.bus and model in card.lower():
            return device.flops
    return None


def predict(case: Case) -> dict[str, Any]:
    """What the plan says of the case, on fake tensors: no GPU needed.

    Raises:
        Skipped: the plan does not know such a run.
    """
    if case.method not in ("chunk", "exact"):
        raise Skipped(f"the plan does not know {case.method}")
    known = {field.name for field in fields(Choice)}
    told = {name: getattr(case, name) for name in known if hasattr(case, name)}
    told["stream_weights"] = case.streamed
    load, card = Workload(case.seq, case.batch, kwargs=RULE), DEVICES["h100-80gb"]
    found = plan(config_of(case.model), load, Limits(2**60), card, Choice(**told), ())
    return {"step_flop": found.seconds["flop"] * card.flops, "planned_gib": found.total / GIB}
