"""Packing: several records in one row, proven not to see each other before the first step.

A packed row [A, B] trains as if A and B were apart only if the attention mask is block diagonal.
transformers derives that mask from position_ids that restart at 0, and quietly does not when an
attention_mask is present, when a cache is on, or when the architecture has other paths from token
to token (recurrent state, ALiBi). Nothing fails then: the loss is merely wrong.

So we measure. With A' another text of A's length, isolation means, for the logits z of B,

    z_B([A, B]) = z_B([A', B])      to the bit: same shapes, same kernels, other neighbours
    z_B([A, B]) ~ z_B([B])          to rounding: positions restart

The first line is relaxed for mixtures of experts alone: which expert gets how many tokens shapes
the matmuls, so rounding moves with A. There d z_B / d embedding(A) must be exactly zero instead.
Cost: five forward passes over at most 2 * LENGTH tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chunkft.errors import ContaminationError, InputError

Batch = dict[str, Any]
Collator = Callable[[list[dict[str, Any]]], Batch]

LENGTH = 12  # tokens of A and of B
# |z_B packed - z_B alone| over max |z_B alone|: what the shapes of kernels change in a deep model
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


class Isolation(NamedTuple):
    """What was measured, in logits."""

    swap: float
    """Largest change of B's logits when its neighbour changes; 0.0 but for mixtures of experts."""
    alone: float
    """Largest difference between B packed and B alone, over B's largest logit."""
    tolerance: float
    """The bound on `alone` for the model's dtype."""


class Probe(NamedTuple):
    """The packed rows [A, B] and [A', B], and the row [B]."""

    here: Batch
    there: Batch
    alone: Batch


def padding_free_batch(examples: list[dict[str, Any]]) -> Batch:
    """What TRL's padding-free collator makes of packed rows, labels left out.

    Args:
        examples: `input_ids` (tokens) and `seq_lengths` (their division into records) a row.

    Returns:
        `input_ids`, `position_ids`, `seq_idx` of shape (1, tokens); `cu_seq_lens_q/k` of shape
        (records + 1,); `max_length_q/k`.
    """
    lengths = torch.tensor([n for example in examples for n in example["seq_lengths"]])
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)])
    longest = int(lengths.max())
    return {
        "input_ids": torch.tensor([[t for example in examples for t in example["input_ids"]]]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), lengths).int()[None],
    }


def check_isolation(
    model: nn.Module,
    *,
    collator: Collator = padding_free_batch,
    forward: Mapping[str, Any] | None = None,
    length: int = LENGTH,
    seed: int = 0,
) -> Isolation:
    """Prove that packed records do not see each other in `model`, called as training calls it.

    Modes (train/eval, module by module), random state and gradients are as before.

    Args:
        model: a causal language model whose output has `logits` (rows, tokens, vocabulary).
        collator: the training run's own; it gets rows with `input_ids`, `labels`, `seq_lengths`.
        forward: keyword arguments that the trainer adds to the batch; TRL: `use_cache=False`,
            the default.
        length: tokens of each of the two records.

    Raises:
        ContaminationError: they do see each other; names the cause, found by trying.
    """
    forward = {"use_cache": False} if forward is None else dict(forward)
    with _undisturbed(model):
        batches = _batches(model, collator, length, seed)
        probe = Probe(*(_on(model, batch, forward) for batch in batches))
        _refuse_blindness(model, probe, length)
        found = _measure(model, probe, length)
        if found is None:
            raise ContaminationError(_diagnosis(model, probe, length))
    if found.alone > found.tolerance:
        raise ContaminationError(
            f"packing: a record's logits differ by {found.alone:.1e} of their size (bound "
            f"{found.tolerance:.0e}) between packed and alone, whatever its neighbour: "
            f"{type(model).__name__} does not restart its positions; train with packing off"
        )
    return found


def _batches(model: nn.Module, collator: Collator, length: int, seed: int) -> Iterator[Batch]:
    """[A, B], [A', B] and [B] through the collator; A' differs from A in every place."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randint(vocabulary, (2, length), generator=draw)
    other = (a + torch.randint(1, vocabulary, (length,), generator=draw)) % vocabulary
    for records in ((a, b), (other, b), (b,)):
        ids = torch.cat(records).tolist()
        yield collator([{"input_ids": ids, "labels": ids, "seq_lengths": [length] * len(records)}])


def _on(model: nn.Module, batch: Batch, forward: Mapping[str, Any]) -> Batch:
    """The batch as keyword arguments of `model`, on its device; labels stay out: no loss here."""
    device = next(model.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    moved.pop("labels", None)
    return {**moved, **forward}


def _measure(model: nn.Module, probe: Probe, length: int) -> Isolation | None:
    """The measured isolation, or None where B sees its neighbour."""
    with torch.no_grad():
        here, there = (_logits_of_b(model, probe[i], length) for i in (0, 1))
        alone = model(**probe.alone).logits[0, -_tokens(probe.alone) :][:length]
    scale = alone.abs().max().float().clamp_min(torch.finfo(torch.float32).tiny)
    swap = (here - there).abs().max().item()
    apart = ((here - alone).abs().max() / scale).item()
    found = Isolation(swap, apart, TOLERANCE.get(alone.dtype, TOLERANCE[torch.float32]))
    if swap == 0.0:
        return found
    if apart > found.tolerance or _gradient_reaches_a(model, probe.here, length):
        return None
    return found


def _refuse_blindness(model: nn.Module, probe: Probe, length: int) -> None:
    """Equal logits prove isolation only where a token's logits depend on what it may see."""
    name = type(model).__name__
    with torch.no_grad():
        here, there = (model(**probe[i]).logits[0, -_tokens(probe[i]) :][:length] for i in (0, 1))
    if not here.isfinite().all():
        raise InputError(f"{name}: logits are NaN or infinite before any training; load another")
    if torch.equal(here, there):
        raise ContaminationError(
            f"packing: isolation cannot be shown, the logits of {name} are the same for every "
            f"text (a head of zeros?); train with packing off"
        )


def _tokens(batch: Batch) -> int:
    return batch["input_ids"].shape[1]


def _logits_of_b(model: nn.Module, batch: Batch, length: int) -> Tensor:
    """(length, vocabulary), counted from the end: an adapter may put tokens in front."""
    return model(**batch).logits[0, -_tokens(batch) :][length : 2 * length]


def _gradient_reaches_a(model: nn.Module, batch: Batch, length: int) -> bool:
    """Whether d z_B / d embedding(A) has a non-zero entry: exact where rounding hides a leak."""
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(cut)  # type: ignore[operator]
    try:
        with torch.enable_grad():
            logits = _logits_of_b(model, batch, length).float()
            # fixed signs, so that the softmax's and the norm's invariances cannot sum to zero
            signs = torch.arange(logits.numel(), device=logits.device).sin().view_as(logits)
            (gradient,) = torch.autograd.grad((logits * signs).sum(), leaves[:1])
    finally:
        handle.remove()
    return bool(gradient[0, :length].any())


def _diagnosis(model: nn.Module, probe: Probe, length: int) -> str:
    """One line: which argument, attention or architecture lets B see A, found by undoing each."""
    prefix = "packing: records packed in one row see each other: "
    repairs: dict[str, Callable[[Batch], Batch]] = {
        "an attention_mask is present, so position_ids are ignored; leave it out (TRL: "
        "padding_free=True)": lambda b: {k: v for k, v in b.items() if k != "attention_mask"},
        "use_cache is on, so position_ids are ignored; pass use_cache=False": (
            lambda b: b | {"use_cache": False}
        ),
        "there are no position_ids (cu_seq_lens alone isolates nothing on this attention); pass "
        "position_ids that restart at 0": lambda b: b | {"position_ids": _restarting(b, length)},
    }
    needed = [why for why, repair in repairs.items() if _differs(repair, probe.here)]
    if needed and _repaired(model, probe, length, [repairs[why] for why in needed]):
        return prefix + "; ".join(needed)
    return prefix + _fault_of_the_model(model, probe, length)


def _restarting(batch: Batch, length: int) -> Tensor:
    count = torch.arange(_tokens(batch), device=batch["input_ids"].device)
    return (count % length)[None]


def _differs(repair: Callable[[Batch], Batch], batch: Batch) -> bool:
    """Whether the repair would touch this batch; position_ids that are there are left as given."""
    changed = repair(batch)
    return changed.keys() != batch.keys() or changed.get("use_cache") != batch.get("use_cache")


def _repaired(
    model: nn.Module, probe: Probe, length: int, repairs: list[Callable[[Batch], Batch]]
) -> bool:
    batches = list(probe)
    for repair in repairs:
        batches = [repair(batch) for batch in batches]
    try:
        return _measure(model, Probe(*batches), length) is not None
    except (TypeError, ValueError):  # a forward that does not take the argument
        return False


def _fault_of_the_model(model: nn.Module, probe: Probe, length: int) -> str:
    """The arguments are right, so it is the adapter, the architecture or the attention."""
    name, config = type(model).__name__, getattr(model, "config", None)
    off = "train with packing off"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return f"the adapter's virtual tokens are shared by all records of a row; {off}"
    if getattr(model, "_is_stateful", False):
        return f"{name} is recurrent, its state runs on from record to record; {off}"
    if getattr(config, "alibi", False) or getattr(config, "model_type", "") in {"bloom", "mpt"}:
        return f"{name} biases attention by distance (ALiBi) and ignores position_ids; {off}"
    used = getattr(config, "_attn_implementation", None)
    for other in ("sdpa", "eager"):
        if other != used and _isolated_on(model, other, probe, length):
            return (
                f"attention {used!r} ignores position_ids; load with attn_implementation={other!r}"
            )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name}.forward takes no position_ids; {off}"
    return f"{name} ignores position_ids on attention {used!r}; {off}"


def _isolated_on(model: nn.Module, attention: str, probe: Probe, length: int) -> bool:
    config = getattr(model, "config", None)
    used = getattr(config, "_attn_implementation", None)
    switch = getattr(model, "set_attn_implementation", None)
    if used is None or switch is None:
        return False
    try:
        switch(attention)
        return _measure(model, probe, length) is not None
    except (ValueError, ImportError, TypeError):  # this model cannot run on it
        return False
    finally:
        switch(used)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside (dropout would hide the answer); modes and random state restored."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
