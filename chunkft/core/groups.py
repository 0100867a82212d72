"""Parameter groups: which group a parameter is in, and hyperparameters copied between groups."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from chunkft.core import precision
from chunkft.core.partition import Tensor as Outline
from chunkft.errors import InputError

Member = TypeVar("Member")


def assign(
    weights: dict[str, nn.Parameter], groups: Sequence[dict[str, Any]] | None
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Group index by parameter name, and each group's own settings."""
    if groups is None:
        return dict.fromkeys(weights, 0), [{}]
    names = {id(p): name for name, p in weights.items()}
    found: dict[str, int] = {}
    settings: list[dict[str, Any]] = []
    for i, group in enumerate(groups):
        settings.append({key: value for key, value in group.items() if key != "params"})
        members = group["params"]
        for member in [members] if isinstance(members, Tensor) else members:
            name = names.get(id(member))
            if name is None:
                if member.requires_grad:
                    raise InputError(
                        f"groups[{i}] has a parameter of shape {tuple(member.shape)} "
                        f"that is not in the model"
                    )
                continue
            if found.setdefault(name, i) != i:
                raise InputError(f"{name} is in groups {found[name]} and {i}; keep it in one")
    if missing := [name for name in weights if name not in found]:
        raise InputError(
            f"{len(missing)} trainable parameters are in no group ({', '.join(missing[:3])}): add "
            f"them, or set requires_grad=False"
        )
    # state and norms follow the order of the model
    return {name: found[name] for name in weights}, settings


def split(
    groups: dict[str, int], count: int, members: Iterable[tuple[str, Member]]
) -> list[list[Member]]:
    """(parameter name, member) pairs as `count` lists, one a group; empty groups stay."""
    found: list[list[Member]] = [[] for _ in range(count)]
    for name, member in members:
        found[groups[name]].append(member)
    return found


def outline(weights: Mapping[str, nn.Parameter]) -> list[Outline]:
    """What the cut needs to know of parameters."""
    return [Outline(name, tuple(p.shape), p.numel() * cost(p.dtype)) for name, p in weights.items()]


def cost(dtype: torch.dtype) -> int:
    """Training bytes an element: gradient, master, two moments in fp32 at least."""
    return 2 + 12 if precision.is_16bit(dtype) else 3 * dtype.itemsize


def settings_of(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of the hyperparameters of each group."""
    return [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in groups
    ]


def changed(before: Iterable[dict[str, Any]], now: Iterable[dict[str, Any]]) -> str | None:
    """The first hyperparameter that is not what it was."""
    for old, new in zip(before, settings_of(now), strict=True):
        for key in new:
            if key not in old or old[key] != new[key]:
                return key
    return None


def copy_settings(source: dict[str, Any], target: dict[str, Any]) -> None:
    """Hyperparameters of one group into another; tensors, as torchao's lr, keep their identity."""
    for key, value in source.items():
        if key == "params":
            continue
        if isinstance(target.get(key), Tensor):
            if target[key] is not value:
                target[key].fill_(float(value))
        else:
            target[key] = value
