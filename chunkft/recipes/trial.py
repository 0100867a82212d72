"""A trial: the model of a config on tensors without memory, and the steps of a run on it.

Beside the training step these rehearse what comes before it: a policy that writes its answers (the
prompt's pass, and the last token's beside a full cache of keys and values), and the reference that
reads them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.residence import residence_of
from chunkft.core.store import Store, nbytes
from chunkft.errors import UnsupportedError, as_input_error
from chunkft.memory.dry_run import DryRun, as_fake, counting_flops, dry_run, fake, real
from chunkft.memory.eight_bit import EightBitMoments
from chunkft.memory.plan import Choice
from chunkft.memory.streaming import WeightStream, stream_weights
from chunkft.models.losses import install_head, is_plain_head


class Answers(NamedTuple):
    """What the policy writes before it learns from it."""

    rows: int
    """At once."""
    tokens: int
    """Of an answer, at most; they are part of `Workload.seq`."""


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
    masked: bool = False
    """Rows are padded or packed, so that attention needs a mask of batch x seq x seq."""
    unpadded: bool = False
    """Rows go end to end, each attending to itself (models/attention.py)."""
    adapter: Any = None
    """PEFT's configuration, where an adapter trains and the weights do not."""
    quantize: Any = None
    """transformers' BitsAndBytesConfig of the frozen weights."""
    autocast: torch.dtype | None = None
    """Of forward passes, where a run has it."""
    answers: Answers | None = None
    reference: str = ""
    """off: the adapter switched off. copy: a frozen copy, streamed where the weights are."""


class HostStore(Store):
    """Where a dry run puts what rests beside a card: fake tensors are all on the CPU."""

    def room(self, key: str, like: torch.Tensor) -> torch.Tensor:
        self._rooms[key] = torch.empty_like(like)
        return self._rooms[key]


@contextmanager
def simulated_ranks(count: int, device: str = "cpu") -> Iterator[Any]:
    """Within it this process is the first of `count` in a group, of which the others are not there:
    each seems to send what this one does. Yields the mesh of all; None if there is one only.

    Args:
        device: the kind where tensors are.
    """
    if count == 1:
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh(device, (count,))
    finally:
        dist.destroy_process_group()


def checkpoint_layers(model: Any) -> None:
    """Recompute layers in backward; transformers before 5.23 has the older name only."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def adapted(model: Any, config: Any) -> Any:
    """A fake model with an adapter around it, fake too; made of real tensors, which PEFT casts."""
    config = copy.deepcopy(config)
    if getattr(config, "init_lora_weights", True) not in (True, False):
        config.init_lora_weights = True  # the others decompose weights, which are not there
    from chunkft.models.adapters import attach  # PEFT is not needed for any other plan

    with real():
        wrapped = attach(model, config)
    return as_fake(wrapped)


def quantized(model: Any, config: Any) -> Any:
    """A fake model with the layers that transformers would give it, their weights fake too.

    Args:
        config: transformers' BitsAndBytesConfig, in 4 or 8 bits.
    """
    from bitsandbytes.functional import quantize_4bit  # nor is this
    from bitsandbytes.nn import Linear4bit
    from transformers.quantizers import AutoHfQuantizer

    dtype = model.dtype
    quantizer = AutoHfQuantizer.from_config(config)
    with real():  # on the meta device
        quantizer.preprocess_model(model, dtype=dtype, device_map=None)
    for layer in [m for m in model.modules() if hasattr(m, "source_cls")]:
        shape, asked = (layer.out_features, layer.in_features), vars(layer.weight)
        if isinstance(layer, Linear4bit):
            names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            kinds = {name: asked[name] for name in names}
            packed, state = quantize_4bit(torch.empty(shape, dtype=dtype), **kinds)
            more = {"quant_state": state}
        else:
            packed, scales = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0])
            layer.state.CB, layer.state.SCB, more = packed, scales, {}
        # bitsandbytes' own class of parameters takes no fake tensors
        layer.weight = nn.Parameter(packed, requires_grad=False)
        for key, value in (asked | more).items():
            setattr(layer.weight, key, value)
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False)
    quantizer.postprocess_model(model)
    return model


def trial_of(config: PretrainedConfig, load: Workload, on_host: bool) -> Callable[[Choice], DryRun]:
    """A dry run of the model of `config` under a choice of settings."""

    # of a row that the policy wrote the answer has labels, and the prompt none
    scored = load.batch * load.answers.tokens if load.answers else 0
    labels = {(load.batch, load.seq - 1): scored} if load.answers else {}

    def trial(choice: Choice) -> DryRun:
        what = f"a dry run of {type(config).__name__}"
        with simulated_ranks(choice.ranks) as mesh, fake(labels), as_input_error(what):
            model, base = _model(config, load, choice, mesh)
            readers: list[Any] = []
            if load.reference == "copy":
                reference, _ = _model(config, replace(load, adapter=None), choice, mesh)
                readers = [reference.eval().requires_grad_(False)]
            if choice.checkpointing:
                checkpoint_layers(base)
            optimizer = _optimizer(model, load, choice, on_host)
            for one in (base, *readers):
                install_head(one)
            steps = _Steps(model, base, readers, load)
            last = len(optimizer.partition) - 1
            # embedding and head are in the outer ones; streamed weights have leaves of their own,
            # most of them where both this chunk and the next are inside layers; shards are averaged
            # by whole tensors, of which a chunk inside cuts two
            inside = {last // 2} if choice.stream_weights or choice.shard else set[int]()
            chunks = [0] if choice.layout == "spread" else sorted({0, last} | inside)
            width = config.get_text_config().vocab_size
            found = dry_run(
                model, optimizer, steps.backward, chunks, width, choice.offload, readers
            )
            return steps.with_all_tokens(found)

    return trial


def _model(config: PretrainedConfig, load: Workload, choice: Choice, mesh: Any) -> tuple[Any, Any]:
    """The model in training mode, with what is around it, and the one within.

    Args:
        mesh: torch's, of the ranks that share its weights where the choice is so.
    """
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)  # it is load.quantize
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=load.dtype, attn_implementation=load.attention
    ).train()
    if load.quantize is not None:
        model = quantized(model, load.quantize)
    base = model
    if load.adapter is not None:
        model = adapted(model, load.adapter)
    if choice.stream_weights:
        stream_weights(model, resident=choice.resident_layers)
    if choice.shard:
        from chunkft.train import sharding  # PEFT is needed for it

        sharding.shard(model, torch.device("cpu"), mesh)
    return model, base


def _optimizer(model: Any, load: Workload, choice: Choice, on_host: bool) -> ChunkedOptimizer:
    settings: dict[str, Any] = {"chunks": choice.chunks, "exact": choice.method == "exact"}
    if choice.method != "exact":
        settings |= {"interval": choice.interval, "layout": choice.layout}
    codec = EightBitMoments() if choice.state_bits == 8 else None
    kept = Store if on_host else HostStore
    settings |= {"store": kept(codec=codec, block=choice.block), "max_grad_norm": 1.0}
    return ChunkedOptimizer(model, load.rule, **settings, **(load.kwargs or {"lr": 1e-5}))


class _Steps:
    """The passes of one optimizer step.

    Args:
        base: the model within `model`.
        readers: the reference, where it is a copy.
    """

    def __init__(self, model: Any, base: Any, readers: Sequence[Any], load: Workload):
        self.model, self.base, self.readers, self.load = model, base, readers, load
        self.ids = torch.zeros(load.batch, load.seq, dtype=torch.long)
        self.more: dict[str, Any] = {"fused_lm_head": True} if is_plain_head(base) else {}
        self.more["attention_mask"] = self._mask(load.batch, load.seq)
        if load.unpadded:
            self.ids = self.ids.view(1, -1)
            ends = list(range(0, self.ids.numel() + 1, load.seq))
            positions = torch.arange(load.seq).repeat(load.batch)[None]
            self.more |= {"attention_mask": None, "position_ids": positions, "cu_seq_lens_q": ends}

    def _mask(self, rows: int, tokens: int) -> Tensor:
        """Of padding: a fake one, which may have some, or one that transformers sees has none."""
        if self.load.masked:
            return torch.ones(rows, tokens, dtype=torch.long)
        with real():
            return torch.ones(rows, tokens, dtype=torch.bool)

    def backward(self) -> None:
        load = self.load
        if load.answers is not None:
            with _all_kept(self.model):
                self._write()
            self._read()
        for _ in range(load.accumulation):
            loss = self._forward(self.model).loss
            if load.answers is None:
                self._read()
            (loss / load.accumulation).backward()
            del loss  # int8 layers keep inputs as long as its graph is there

    def _forward(self, model: Any) -> Any:
        dtype = self.load.autocast
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return model(input_ids=self.ids, labels=self.ids, **self.more, use_cache=False)

    @torch.no_grad()
    def _read(self) -> None:
        """The reference's log-probabilities."""
        for reference in self.readers:
            self._forward(reference)
        if self.load.reference == "off":
            with self.model.disable_adapter():
                self._forward(self.model)

    @torch.no_grad()
    def _write(self) -> None:
        """What `generate` does that takes most; TRL leaves autocast out of it."""
        rows, tokens = self._answers()
        prompt = self.load.seq - tokens
        out = self.model(**self._inputs(rows, prompt, prompt), use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        _draw(out.logits)
        del out
        _fill(cache, tokens - 2)
        self._write_token(cache)

    def _write_token(self, cache: Any) -> None:
        rows, _ = self._answers()
        inputs = self._inputs(rows, 1, cache.get_seq_length() + 1)
        _draw(self.model(**inputs, past_key_values=cache, use_cache=True).logits)

    def _inputs(self, rows: int, tokens: int, seen: int) -> dict[str, Tensor]:
        """Of `generate`: each row has positions of its own, for prompts are padded in front."""
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        positions = torch.zeros(rows, tokens, dtype=torch.long)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": self._mask(rows, seen),
        }

    def _answers(self) -> Answers:
        assert self.load.answers is not None
        return self.load.answers

    @torch.no_grad()
    def with_all_tokens(self, found: DryRun) -> DryRun:
        """`found`, with the work of the answers' other tokens added: they need no more memory."""
        if self.load.answers is None:
            return found
        rows, tokens = self.load.answers
        stream = residence_of(self.model)
        assert stream is None or isinstance(stream, WeightStream)
        with _all_kept(self.model):
            out = self.model(**self._inputs(rows, 1, 1), use_cache=True)
            _fill(out.past_key_values, self.load.seq - tokens // 2)  # an average one
            before = stream.arena.copied if stream else 0
            with counting_flops() as counter:
                self._write_token(out.past_key_values)
        left = max(tokens - 2, 0)  # one came with the prompt, and one is in `found`
        flops = [each + left * counter.get_total_flops() for each in found.flops]
        copied = found.copied + left * (stream.arena.copied - before if stream else 0)
        return replace(found, flops=flops, copied=copied, read=(tokens - 1) * self._read_by_each())

    def _read_by_each(self) -> int:
        """Bytes of weights that a token takes; of an embedding it takes a row."""
        head, embedding = self.base.get_output_embeddings(), self.base.get_input_embeddings()
        apart = {id(embedding.weight)} - {id(getattr(head, "weight", None))}
        return nbytes(p for p in self.model.parameters() if id(p) not in apart)


@contextmanager
def _all_kept(model: nn.Module) -> Iterator[None]:
    """Without checkpointing, as TRL generates: checkpointed layers drop keys and values."""
    layers: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    yield
    for layer in layers:
        layer.gradient_checkpointing = True


def _fill(cache: Any, tokens: int) -> None:
    """Lengthen keys and values by `tokens`, as if so many had been written.

    Raises:
        UnsupportedError: the model keeps something else.
    """
    for layer in cache.layers:
        if not isinstance(getattr(layer, "keys", None), Tensor):
            raise UnsupportedError(
                f"a cache of {type(layer).__name__} is not known to the plan; leave --memory out"
            )
        for name in ("keys", "values"):
            old = getattr(layer, name)
            shape = (*old.shape[:-2], old.shape[-2] + max(tokens, 0), old.shape[-1])
            setattr(layer, name, old.new_empty(shape))


def _draw(logits: Tensor) -> None:
    """The next token, as transformers samples it."""
    scores = logits[:, -1].to(torch.float32, copy=True) / 0.9
    torch.multinomial(scores.softmax(-1), 1)
