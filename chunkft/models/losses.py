"""The language-model head and its loss in tiles, with the gradient of the active head slice only.

For hidden states h [N, D], head W [V, D], labels y [N] and p = softmax(h W^T):

    log_prob_n = log p_n[y_n]      d_n = onehot(y_n) - p_n
    dh_n = g_n d_n W               dW[s:e] = sum_n g_n d_n[s:e]^T h_n      (g_n from upstream)

at temperature t both of h W^T / t and g / t.

Logits exist for one tile of tokens at a time, and d_n W is formed in the forward pass, tile by
tile, so backward needs no second product with the head (TRL's fused head recomputes the logits,
and makes a dense fp32 gradient of W: 500 MiB at 7B). Kept for backward: N (D + e - s) elements.
Only positions with a label go through the head.
"""

import functools
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.utils import ModelOutput

from chunkft.core.sliced_ops import SlicedForward, cast_for_autocast, rule_of

TILE_BYTES = 32 * 2**20  # of a tile's logits in fp32; two such buffers exist at once
LEAST_ROWS, MOST_ROWS = 64, 512  # of a tile: below, the product with the head is no longer fast


def tile_rows(vocabulary: int) -> int:
    """Tokens whose logits exist at once."""
    fitting = max(1, TILE_BYTES // (4 * vocabulary))
    return min(max(1 << fitting.bit_length() - 1, LEAST_ROWS), MOST_ROWS)


class HeadLogProbs(Function):
    """Log-probability of each label, with entropy and top-1 hit beside it.

    Args:
        hidden: [N, D].  weight: [V, D], detached.  labels: [N], in [0, V).
        start: first active row.  leaves: [r_j, D], adjacent rows of the weight from `start` on.
        temperature: the logits are divided by it.  more: whether the last two are wanted.
    Returns: log_probs [N] fp32 (differentiable), entropy [N] fp32, is_top1 [N] bool, and the mean
        of the logits and log sum p^2, [N] fp32 each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        start: int,
        temperature: float,
        more: bool,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        log_probs = torch.empty(len(labels), dtype=wide, device=hidden.device)
        entropy, top1 = torch.empty_like(log_probs), torch.empty_like(labels, dtype=torch.bool)
        mean, square = torch.zeros_like(log_probs), torch.zeros_like(log_probs)
        ctx.rows, ctx.temperature = [leaf.shape[0] for leaf in leaves], temperature
        rows = sum(ctx.rows)
        needs_hidden, needs_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[6:])
        pull = torch.empty_like(hidden) if needs_hidden else None
        slice_d = hidden.new_empty(len(labels), rows) if needs_weight else None
        tile = tile_rows(len(weight))
        for first in range(0, len(labels), tile):
            at = slice(first, first + tile)
            logits = F.linear(hidden[at], weight).to(wide)
            if temperature != 1.0:
                logits /= temperature
            lse = logits.logsumexp(-1)
            chosen = logits.gather(-1, labels[at, None])[:, 0]
            log_probs[at] = chosen - lse
            top1[at] = logits.argmax(-1) == labels[at]
            probs = (logits - lse[:, None]).exp_()
            # a product of vectors: no third buffer of a tile's size
            entropy[at] = lse - (probs[:, None] @ logits[..., None])[:, 0, 0]
            if more:
                mean[at] = logits.mean(-1)
                square[at] = (probs[:, None] @ probs[..., None])[:, 0, 0].log()
            del logits
            if pull is None and slice_d is None:
                continue
            d = probs.neg_()
            d.scatter_add_(-1, labels[at, None], torch.ones_like(lse[:, None]))
            d = d.to(hidden.dtype)
            if pull is not None:
                pull[at] = d @ weight
            if slice_d is not None:
                slice_d[at] = d[:, start : start + rows]
        ctx.save_for_backward(pull, slice_d, hidden if needs_weight else None)
        ctx.mark_non_differentiable(entropy, top1, mean, square)
        return log_probs, entropy, top1, mean, square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        pull, slice_d, hidden = ctx.saved_tensors
        if ctx.temperature != 1.0:
            g = g / ctx.temperature
        dh = None if pull is None else pull * g[:, None].to(pull.dtype)
        if slice_d is None:
            return dh, *[None] * 5, *(None for _ in ctx.rows)
        dw = (slice_d * g[:, None].to(slice_d.dtype)).T @ hidden
        return dh, *[None] * 5, *dw.split(ctx.rows)


@dataclass
class HeadOutput(ModelOutput):
    """What TRL's trainers read from a model called with `fused_lm_head=True`, by TRL's names.

    Not TRL's own class: a plan needs the head too, and torch and transformers are enough for one.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def head_log_probs(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    temperature: float = 1.0,
    more: bool = False,
) -> tuple[Tensor, ...]:
    """`HeadLogProbs` through a plain nn.Linear head, whichever part of it is active.

    Args:
        hidden: [N, D].  head: plain, without bias.  labels: [N].

    Returns: log-probabilities, entropy, top-1 hit; with `more` mean logits and log sum p^2.
    """
    own = head.__dict__.get("forward")
    weight: Tensor = head.weight  # pyright: ignore[reportAssignmentType]
    start, leaves = 0, (weight,) if weight.requires_grad else ()
    if isinstance(own, SlicedForward) and own.leaves:
        own.seen_grad |= torch.is_grad_enabled()
        if own.rule != "stock":  # then autograd sums a tied weight's two uses, and the hook moves
            start, leaves = own.start, own.leaves
    hidden, cast = cast_for_autocast(hidden, weight.detach())
    # or the sums over the vocabulary would be made in 16 bits
    with torch.autocast(hidden.device.type, enabled=False):
        found: Any = HeadLogProbs.apply(hidden, cast, labels, start, temperature, more, *leaves)
    return found if more else found[:3]


def is_plain_head(model: Any) -> bool:
    """Whether the logits are h W^T and nothing else: no bias, no scale, no soft cap, no router."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is None or getattr(head, "bias", None) is not None:
        return False
    if rule_of(head) != "linear" and not isinstance(head.__dict__.get("forward"), SlicedForward):
        return False
    altered = ("final_logit_softcapping", "logit_scale", "output_multiplier")
    altered += ("lm_head_multiplier", "logits_scaling")
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in altered):
        return False
    return not getattr(config, "output_router_logits", False)


@contextmanager
def _gathered(head: Any) -> Generator[None]:
    """Within, the weight of a head that is a group of FSDP by itself is whole.

    Its forward, which FSDP waits for, is not called here; backward needs no weight.
    """
    alone = hasattr(head, "unshard")
    if alone:
        head.unshard()
    try:
        yield
    finally:
        if alone:
            head.reshard()


def install_head(model: Any, temperature: float = 1.0, more: bool = False) -> Callable[[], None]:
    """Give `model` our tiles where TRL's trainers ask for `fused_lm_head`; returns the undo.

    The trainer must have been built: the forward that TRL put on this instance serves every other
    call, and heads that are not plain.

    Args:
        temperature: of the trainer's log-probabilities.
        more: whether it reads mean logits or log sum p^2.
    """
    stock = model.forward

    # of the function, which has `self`: `generate` reads the signature
    @functools.wraps(getattr(stock, "__func__", stock))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        shifted = kwargs.get("shift_labels") is not None
        ours = kwargs.get("fused_lm_head") and not kwargs.get("output_router_logits")
        if labels is None or shifted or not (ours and is_plain_head(self)):
            return stock(*args, **kwargs)
        count = kwargs.pop("num_items_in_batch", None)
        for name in ("fused_lm_head", "labels", "shift_labels"):
            kwargs.pop(name, None)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        targets = labels[:, 1:].to(hidden.device)
        mask = targets != -100
        head = self.get_output_embeddings()
        with _gathered(head):
            scored = head_log_probs(hidden[mask], head, targets[mask], temperature, more)
        spread = [x.new_zeros(mask.shape).masked_scatter(mask, x) for x in scored]
        log_probs, entropy, top1 = spread[:3]
        mean, square = spread[3:] if more else (None, None)
        total = mask.sum().clamp(min=1) if count is None else count
        return HeadOutput(
            loss=-log_probs.sum() / total,
            log_probs=log_probs,
            entropy=entropy,
            is_top1=top1,
            mean_logits=mean,
            log_sum_sq_probs=square,
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)

    def undo() -> None:
        model.forward = stock

    return undo
