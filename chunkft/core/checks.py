"""What ChunkedOptimizer refuses when it is built, before anything is attached to the model."""

from numbers import Integral
from typing import Any

import torch
from torch import nn

from chunkft.core.precision import MASTERS
from chunkft.errors import InputError

MOMENTS = ("persist", "reset", "decay")


def check_settings(
    model: Any, optimizer_class: Any, max_grad_norm: float | None, *, moments: str, master: str
) -> None:
    """Raise InputError for a setting out of its range or of the wrong kind."""
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
    if moments not in MOMENTS:
        raise InputError(f"moments={moments!r} is not one of {', '.join(MOMENTS)}")
    if master not in MASTERS:
        raise InputError(f"master={master!r} is not one of {', '.join(MASTERS)}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InputError(f"max_grad_norm={max_grad_norm} must be above 0; None does not clip")


def check_counts(**counts: Any) -> None:
    """Raise InputError for a count that is no whole number; ranges are judged elsewhere."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise InputError(f"{name}={count!r} must be a whole number")
