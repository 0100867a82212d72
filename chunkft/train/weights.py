"""A transformers model's weights, written tensor by tensor.

`save_pretrained` copies nothing of a plain model on the CPU, but holds a whole shard of what is on
a device, clones weights that share a storage, and builds all tensors whose layout its checkpoints
name otherwise (the experts of a mixture) at once. Here they pass one by one.

Names: a checkpoint to go on from has the model's own, which `from_pretrained` reads too. Trainer
loads by those only: with the original names it would leave the experts of a Mixtral at the
weights of the base model, with no more than a log line. The finished model has the original ones.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from chunkft.errors import FOREIGN
from chunkft.train import shards

SHARD = 5 * 10**9  # bytes
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
LAYER = re.compile(r".*?\.\d+\.")
Named = dict[str, Tensor]
Read = Callable[[str], Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def streamable(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether `write` does for `model` what `save_pretrained` would: no adapter, not quantized."""
    return (
        isinstance(model, PreTrainedModel)
        and not getattr(model, "_hf_peft_config_loaded", False)
        and getattr(model, "hf_quantizer", None) is None
        and not any(p.is_meta for p in model.parameters())  # offloaded by accelerate
    )


def of(model: PreTrainedModel) -> Named:
    """The weights by the model's own names, tied ones once."""
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    # on "meta" tied weights are told by their parameter, and nothing is cloned
    outline = {name: tensor.to("meta") for name, tensor in state.items()}
    return {name: state[name] for name in remove_tied_weights_from_state_dict(outline, model)}


def nbytes(model: nn.Module) -> int:
    """Bytes that `write` will write; 0 where it is not our part."""
    return sum(map(shards.nbytes, of(model).values())) if streamable(model) else 0


def write(model: PreTrainedModel, folder: Path, *, original: bool) -> None:
    """Write the weights, and the index that says which file has which, into `folder`.

    Args:
        original: by the names of the model's published checkpoints, not by its own.

    Raises:
        OSError: the disk is full, say.
    """
    weights = of(model)
    if original:
        write_original(model, weights, folder, weights.__getitem__)
    else:
        _write(weights, folder)


def write_original(
    model: PreTrainedModel, outline: Mapping[str, Tensor], folder: Path, read: Read
) -> None:
    """Write weights by the names of the model's published checkpoints into `folder`.

    Args:
        model: of which nothing but its kind matters; it may be on "meta".
        outline, read: of its weights by its own names, as in `shards.write`.
    """
    named = _Original(model, outline, read)
    _write(named.outline, folder, named.read)


def _write(outline: Mapping[str, Tensor], folder: Path, read: Read | None = None) -> None:
    files = _plan(outline)
    for file, names in files.items():
        shards.write(folder / file, {n: outline[n] for n in names}, read)
    inside = set(files)
    if len(files) > 1:
        inside.add(SAFE_WEIGHTS_INDEX_NAME)
        index = {
            "metadata": {
                "total_parameters": sum(tensor.numel() for tensor in outline.values()),
                "total_size": sum(shards.nbytes(tensor) for tensor in outline.values()),
            },
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    for path in folder.glob("model*.safetensors*"):  # of an earlier save, in other shards
        if WEIGHT_FILE.fullmatch(path.name) and path.name not in inside:
            path.unlink()


def _plan(outline: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """File name -> names in it, in the model's order."""
    found: list[list[str]] = [[]]
    size = 0
    for name, tensor in outline.items():
        size += shards.nbytes(tensor)
        if size > SHARD and found[-1]:
            found.append([])
            size = shards.nbytes(tensor)
        found[-1].append(name)
    if len(found) == 1:
        return {SAFE_WEIGHTS_NAME: found[0]}
    count = len(found)
    return {f"model-{i:05}-of-{count:05}.safetensors": names for i, names in enumerate(found, 1)}


class _Original:
    """Weights by their original names; only those made of the same few are there at once."""

    def __init__(self, model: PreTrainedModel, outline: Mapping[str, Tensor], read: Read):
        self.model, self.own = model, read
        own = {name: tensor.to("meta") for name, tensor in outline.items()}
        self.outline = revert_weight_conversion(model, dict(own))
        self._made_of: dict[str, tuple[str, ...]] = {}
        self._last: tuple[tuple[str, ...], Named] = (), {}
        shapes = _shapes(self.outline)
        # most are made of one, some of several in their layer
        for key in (str, _layer, lambda _: ""):
            groups: dict[str, tuple[str, ...]] = {}
            for name in own:
                groups[key(name)] = (*groups.get(key(name), ()), name)
            if self._try(groups.values(), own) == shapes:
                break

    def read(self, name: str) -> Tensor:
        group = self._made_of[name]
        if group != self._last[0]:
            self._last = (), {}  # before the next ones are made
            made = revert_weight_conversion(self.model, {n: self.own(n) for n in group})
            self._last = group, made
        return self._last[1][name]

    def _try(self, groups: Iterable[tuple[str, ...]], own: Named) -> Shapes | None:
        """Shapes of what these groups make, each by itself; None where one of them cannot."""
        self._made_of, shapes = {}, Shapes()
        for group in groups:
            try:
                made = revert_weight_conversion(self.model, {name: own[name] for name in group})
            except FOREIGN:
                return None
            shapes |= _shapes(made)
            self._made_of |= dict.fromkeys(made, group)
        return shapes


def _layer(name: str) -> str:
    found = LAYER.match(name)
    return found[0] if found else ""


def _shapes(outline: Mapping[str, Tensor]) -> Shapes:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in outline.items()}
