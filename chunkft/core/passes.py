"""Passes: an optimizer step taken part by part, each with its state on the device for a moment.

    state and master in -> the rule -> weight, state and low bits out -> the next part

A part is a chunk in exact mode, else a block of the active chunk where the store asks for blocks:
then device bytes are the chunk's 16-bit gradient, and gradient + master + state of one block.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from chunkft.core.partition import Block, Chunk, Shapes, Slice, blocks
from chunkft.core.rule import Revive, Rule
from chunkft.core.working_set import Leaf


class Rest(NamedTuple):
    """Where the state of some slices rests: its key in the store."""

    key: str
    block: Block


class Clip(NamedTuple):
    """Clipping to `limit`, where there is one, of gradients that have the `norm` together."""

    limit: float | None
    norm: Tensor

    def apply(self, parameters: Sequence[Tensor]) -> None:
        if self.limit is not None:
            clip_grads_with_norm_(parameters, self.limit, self.norm)


def rests(
    chunk: Chunk, k: int, shapes: Shapes, size: int | None, cuts: dict[str, Any]
) -> list[Rest]:
    """Of `chunk`, the k-th: one, or one a block of `size` elements, cut as `cuts` says."""
    if size is None:
        return [Rest(str(k), {piece: piece for piece in chunk})]
    parts = blocks(chunk, shapes, size, **cuts)
    return [Rest(f"{k}.{i}", part) for i, part in enumerate(parts)]


def step_in_passes(
    rule: Rule,
    groups: Sequence[dict[str, Any]],
    passes: Sequence[Rest],
    leaves_of: Callable[[Block], dict[Slice, Leaf]],
    waiting: Callable[[], list[Tensor]],
    scale: Tensor | None,
    clip: Clip,
    revive_of: Callable[[Block], Revive] | None = None,
) -> None:
    """Take one step of `rule` in `passes`.

    Args:
        groups: with the hyperparameters.
        leaves_of: of a block, with their gradients.
        waiting: gradients that are still to be taken.
        scale: of the loss, by which gradients are divided; None is 1.
        revive_of: what a new visit leaves of a block's state; None leaves it as it is.
    """
    behind: torch.Event | None = None
    for (key, block), following in zip(passes, [*passes[1:], None], strict=True):
        rule.wake(key, leaves_of(block), revive_of(block) if revive_of else None)
        if following is not None:
            rule.store.prefetch(following.key, rule.device)
        stepped, parameters = rule.load(scale)
        clip.apply(parameters)
        rule.step(groups, in_parts=True)
        rule.measure(parameters, waiting())
        rule.write(stepped)
        rule.retire(key, written=stepped)
        if rule.device.type == "cuda":
            # under fp32 weights nothing else waits for the device: parts would pile up there
            if behind is not None:
                behind.synchronize()
            behind = torch.cuda.current_stream(rule.device).record_event()
        del stepped, parameters  # or masters live on beside those of the next pass
