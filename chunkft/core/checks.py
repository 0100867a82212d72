"""What ChunkedOptimizer refuses when it is built, before anything is attached to the model."""

from typing import Any

import torch
from torch import nn

from chunkft.core.precision import MASTERS
from chunkft.errors import InputError

MOMENTS = ("persist", "reset", "decay")


def check_settings(
    model: Any,
    optimizer_class: Any,
    counts: tuple[Any, Any],
    choices: tuple[str, str],
    max_grad_norm: float | None,
) -> None:
    """Raise InputError for a setting out of its range or of the wrong kind.

    Args:
        counts: chunks and interval.
        choices: moments and master.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is {type(model).__name__}, needs an nn.Module: weights are found by name, so "
            f"pass the model itself, not its parameters"
        )
    rule = optimizer_class
    if not (isinstance(rule, type) and issubclass(rule, torch.optim.Optimizer)):
        raise InputError(
            f"optimizer_class={rule!r} needs a class of torch.optim, such as torch.optim.AdamW"
        )
    if issubclass(rule, torch.optim.LBFGS):
        raise InputError("LBFGS needs the gradient of every parameter at once: no chunks")
    for name, count in zip(("chunks", "interval"), counts, strict=True):
        if not isinstance(count, int) or isinstance(count, bool):
            raise InputError(f"{name}={count!r} must be a whole number")
    for name, value, known in zip(("moments", "master"), choices, (MOMENTS, MASTERS), strict=True):
        if value not in known:
            raise InputError(f"{name}={value!r} is not one of {', '.join(known)}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InputError(f"max_grad_norm={max_grad_norm} must be above 0; None does not clip")
