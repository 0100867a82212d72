"""The active chunk, attached to the model: leaves, hooks and sliced forwards; coverage.

**The leaf.** `leaf = W.detach()[s:e].requires_grad_()` shares storage with its weight: it has the
slice's shape, any torch optimizer drives it, and an in-place update lands in W.

**Two ways for its gradient to arrive**, both adding into `leaf.grad`:

1. The hook, right for every access pattern. A touched W keeps `requires_grad`; a post-accumulate
   hook moves rows [s, e) of whatever stock autograd delivered to the leaf and frees the rest.
   Cost: one tensor's dense gradient, for a moment.
2. The sliced rule of `sliced_ops` on plain layers: no dense gradient at all.

A weight that rests away from its device (`residence`) has a leaf of its own there, which is copied
back after each write.

All other trainable weights are frozen meanwhile, so autograd keeps nothing for them and stops below
the lowest active layer by itself. Nothing is hung on foreign tensors but torch's own hook, whose
handle is kept, and no class is patched: `detach()` leaves a stock model.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkft.core.coverage import Book
from chunkft.core.partition import Block, Chunk, Slice
from chunkft.core.precision import overwritten_all
from chunkft.core.ranks import Ranks, held, is_sharded, reshard, show_dtypes
from chunkft.core.residence import residence_of
from chunkft.core.sliced_ops import SlicedForward, repoint, rule_of
from chunkft.errors import (
    InputError,
    LostGradientError,
    ReplacedParameterError,
    UnsupportedError,
)

# transformers' hook that makes an embedding's output require grad
REQUIRE_GRADS = "enable_input_require_grads.<locals>.make_inputs_require_grads"

MARK = "_chunkft_attached"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, tied ones once, without torch.compile's name prefix."""
    return {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@dataclass
class Leaf:
    """One trained slice: the tensor that the optimizer sees, and where it lies."""

    piece: Slice
    tensor: Tensor
    first: int
    """Its first row in what this rank holds of the weight."""
    whole: bool
    """Whether it is all that this rank holds of the weight."""
    home: tuple[Any, ...] = ()
    """Address, dtype and device of its storage when last looked at."""
    rest: Tensor | None = None
    """Its rows where a streamed weight rests; `tensor` is a copy of them then."""
    version: int = 0
    """Of the streamed weight when last looked at."""

    def view(self, weight: Tensor) -> Tensor:
        """The slice's storage in `weight` as it is now."""
        return self.of(held(weight))

    def of(self, tensor: Tensor) -> Tensor:
        """The slice's rows of a tensor that has all rows of the weight that this rank holds."""
        return tensor if self.whole else tensor[self.first : self.first + self.piece.rows]


class WorkingSet:
    """Attaches one chunk after another to `model`.

    Args:
        model: any nn.Module; its parameters with requires_grad=True are the trainable ones.

    Raises:
        InputError: another working set is attached to the model.
    """

    def __init__(self, model: nn.Module):
        refuse_attached(model)
        self.model = model
        show_dtypes(model)
        reshard(model)
        self._sharded = any(map(is_sharded, model.parameters()))
        self.parameters = trainable(model)
        self.leaves: dict[Slice, Leaf] = {}
        self._handles: list[RemovableHandle] = []
        self._forwards: list[SlicedForward] = []
        self._owners: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
        self._places: list[tuple[str, nn.Module, str]] = []
        self._shapes = {name: p.shape for name, p in self.parameters.items()}
        by_id = {id(p): name for name, p in self.parameters.items()}
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                name = by_id.get(id(parameter))
                if name is not None:
                    self._places.append((name, module, attribute))
                    # a gathered weight is another tensor than the one that is trained
                    sliced = attribute == "weight" and not self._sharded
                    if sliced and (rule := rule_of(module)):
                        self._owners[name].append((module, rule))
        first = next(iter(self.parameters), None)
        device = torch.device("cpu") if first is None else self.device_of(first)
        self.ranks = Ranks(self.parameters, device)

    def own(self, chunk: Iterable[Slice]) -> Chunk:
        """What this rank holds of `chunk`."""
        return tuple(piece for whole in chunk if (piece := self._own(whole)).rows > 0)

    def own_of(self, book: Book) -> Book:
        """Of records of slices those of what this rank holds of them."""
        pieces = ((self._own(piece), record) for piece, record in book.items())
        return {piece: record for piece, record in pieces if piece.rows > 0}

    def rows_of(self, piece: Slice) -> Tensor | None:
        """The slice's rows of its weight; None where this rank does not hold all of them."""
        if self._own(piece) != piece:
            return None
        weight = self.parameters[piece.name]
        first = piece.start - self.ranks.rows(weight.shape[0] if weight.dim() else 1).start
        return _rows(held(weight), first, first + piece.rows)

    def _own(self, piece: Slice) -> Slice:
        shape = self._shapes[piece.name]
        rows = self.ranks.rows(shape[0] if shape else 1)
        return Slice(piece.name, max(piece.start, rows.start), min(piece.stop, rows.stop))

    def view(self, chunk: Iterable[Slice]) -> dict[Slice, Leaf]:
        """Leaves of `chunk`, with nothing attached to the model."""
        return {piece: self._leaf(piece) for piece in chunk}

    def part(self, block: Block, consume: bool = True) -> dict[Slice, Leaf]:
        """Leaves of some rows of the attached chunk's leaves.

        With `consume` they take their rows of the gradients along, and a gradient of which all
        rows have gone is forgotten.
        """
        found: dict[Slice, Leaf] = {}
        for piece, around in block.items():
            leaf = self.leaves[around]
            start, stop = piece.start - leaf.piece.start, piece.stop - leaf.piece.start
            rest = None if leaf.rest is None else _rows(leaf.rest, start, stop)
            tensor = _rows(leaf.tensor.detach(), start, stop).requires_grad_()
            if consume and leaf.tensor.grad is not None:
                tensor.grad = _rows(leaf.tensor.grad, start, stop)
                if piece.stop == leaf.piece.stop:
                    leaf.tensor.grad = None
            whole = leaf.whole and piece == leaf.piece
            found[piece] = Leaf(piece, tensor, leaf.first + start, whole, _home(tensor), rest)
        return found

    def _leaf(self, piece: Slice) -> Leaf:
        weight = self.parameters[piece.name]
        rows = self.ranks.rows(weight.shape[0] if weight.dim() else 1)
        first, whole = piece.start - rows.start, piece.rows == rows.stop - rows.start
        leaf = Leaf(piece, torch.empty(0), first, whole)
        residence = residence_of(self.model)
        home = residence.home(weight) if residence else None
        if home is not None:
            leaf.rest, leaf.version = leaf.view(home), weight._version
            leaf.tensor = leaf.rest.to(self.device_of(piece.name), copy=True).requires_grad_()
        else:
            leaf.tensor = leaf.view(weight).requires_grad_()
        leaf.home = _home(leaf.tensor)
        return leaf

    def device_of(self, name: str) -> torch.device:
        """Where a parameter works."""
        weight, residence = self.parameters[name], residence_of(self.model)
        away = residence is not None and residence.home(weight) is not None
        return residence.device if residence and away else weight.device

    def attach(self, chunk: Chunk) -> None:
        """Make exactly the slices of `chunk` trainable."""
        self.detach(restore=False)
        # where this rank has no row of a tensor, the others need it in the collective all the same
        touched: dict[str, list[Slice]] = {piece.name: [] for piece in chunk}
        for piece in self.own(chunk):
            touched[piece.name].append(piece)
        for name, parameter in self.parameters.items():
            # An unused gradient of an inactive weight would never be consumed.
            parameter.grad = None
            parameter.requires_grad_(name in touched)
        for name, pieces in touched.items():
            self._attach_tensor(name, sorted(pieces))
        self.ranks.guard(self.model)
        self.model.__dict__[MARK] = _Thaw(list(self.parameters.values()))
        self.keep_truncation()

    def _attach_tensor(self, name: str, pieces: list[Slice]) -> None:
        weight = self.parameters[name]
        leaves = [self._leaf(piece) for piece in pieces]
        self.leaves.update((leaf.piece, leaf) for leaf in leaves)
        self._handles.append(weight.register_post_accumulate_grad_hook(_Mover(leaves, self.ranks)))
        if not self._owners[name]:
            return
        adjacent = all(a.stop == b.start for a, b in itertools.pairwise(pieces))
        stock = leaves[0].whole or not adjacent  # autograd's whole gradient; the hook moves it
        for module, rule in self._owners[name]:
            if rule_of(module) != rule:  # wrapped since construction, by accelerate say
                continue
            used = "stock" if stock else rule
            forward = SlicedForward(module, used, pieces[0].start, [x.tensor for x in leaves])
            module.__dict__["forward"] = forward
            self._forwards.append(forward)

    def detach(self, restore: bool = True) -> None:
        """Take everything off the model; with `restore`, trainable weights are so again."""
        for handle in self._handles:
            handle.remove()
        for forward in self._forwards:
            forward.leaves = ()  # somebody who wrapped it meanwhile gets the stock forward
            if forward.module.__dict__.get("forward") is forward:
                del forward.module.__dict__["forward"]
        self._handles, self._forwards, self.leaves = [], [], {}
        self.ranks.release()
        self.model.__dict__.pop(MARK, None)
        if restore:
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)

    def refresh(self) -> list[Leaf]:
        """Follow `model.to(...)`: point leaves at their weights' present storage.

        Streamed weights are sent home, and read again where someone has written to them.

        Returns: the leaves that moved.

        Raises:
            ReplacedParameterError: a Parameter object is no longer the one it was.
        """
        self.ranks.check_count()
        if self._sharded:
            reshard(self.model)
        self._check_parameters()
        moved: list[Leaf] = []
        if (residence := residence_of(self.model)) is not None:
            residence.settle()
        self._reread([leaf for leaf in self.leaves.values() if leaf.rest is not None])
        for leaf in self.leaves.values():
            if leaf.rest is not None:
                continue
            now = leaf.view(self.parameters[leaf.piece.name])
            if leaf.home != (home := _home(now)):
                leaf.home = home
                repoint(leaf.tensor, now)
                moved.append(leaf)
        return moved

    def _reread(self, leaves: Sequence[Leaf]) -> None:
        """Take over what someone else wrote to resting weights."""
        versions = [self.parameters[leaf.piece.name]._version for leaf in leaves]
        rests, tensors = [leaf.rest for leaf in leaves], [leaf.tensor.detach() for leaf in leaves]
        ours = [leaf.version == now for leaf, now in zip(leaves, versions, strict=True)]
        changed = overwritten_all(cast("list[Tensor]", rests), tensors, ours)
        for leaf, now, foreign in zip(leaves, versions, changed, strict=True):
            if foreign and leaf.rest is not None:
                leaf.tensor.detach().copy_(leaf.rest)
            leaf.version = now

    def _check_parameters(self) -> None:
        cure = "build ChunkedOptimizer after the model is changed"
        present = {id(parameter) for parameter in self.model.parameters()}
        for name, module, attribute in self._places:  # all places of a tied one
            weight = self.parameters[name]
            if module._parameters.get(attribute) is not weight or id(weight) not in present:
                raise ReplacedParameterError(
                    f"{name} is another Parameter object than when the optimizer was built; {cure}"
                )
            if weight.shape != self._shapes[name]:
                raise ReplacedParameterError(
                    f"{name} has shape {tuple(weight.shape)}, {tuple(self._shapes[name])} when the "
                    f"optimizer was built; {cure}"
                )

    def keep_truncation(self) -> None:
        """Undo what keeps backward from stopping, and refuse what loses gradients.

        `enable_input_require_grads()` makes the embedding's output require grad, so backward runs
        to the bottom whatever is frozen; Trainer calls it after the optimizer is built.
        """
        for module in self.model.modules():
            if getattr(module, "_require_grads_hooks", None):
                disable: Any = module.disable_input_require_grads
                disable()
            # enabled twice, the hooks of the first time are in no list of transformers any more
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__qualname__", "").endswith(REQUIRE_GRADS):
                    del module._forward_hooks[key]
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise UnsupportedError(
                    "use_reentrant=True loses the gradients of active slices; use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )

    def collect(self) -> None:
        """Move gradients that someone put on a weight by hand to its leaves."""
        for name in {piece.name for piece in self.leaves}:
            weight = self.parameters[name]
            if weight.grad is not None:
                leaves = [x for piece, x in self.leaves.items() if piece.name == name]
                _Mover(leaves, self.ranks)(weight)

    def gradients(self) -> Iterator[tuple[Leaf, Tensor]]:
        """Leaves that have a gradient, with it."""
        for leaf in self.leaves.values():
            if leaf.tensor.grad is not None:
                yield leaf, leaf.tensor.grad

    def waiting(self) -> list[Tensor]:
        """Gradients of the attached chunk, those that wait for their block's turn in a step."""
        return [gradient for _, gradient in self.gradients()]

    def drop_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.tensor.grad = None
        for forward in self._forwards:
            forward.seen_grad = forward.seen_no_grad = False

    def check_lost(self) -> None:
        """Raise if a slice's layer ran in training, under no_grad only, and got no gradient.

        Raises:
            LostGradientError: that is what reentrant checkpointing does below a frozen input.
        """
        for forward in self._forwards:
            lost = all(tensor.grad is None for tensor in forward.leaves)
            if lost and forward.seen_no_grad and not forward.seen_grad:
                name = next(p.name for p, x in self.leaves.items() if x.tensor is forward.leaves[0])
                raise LostGradientError(
                    f"{name} ran in training under no_grad only, so its active slice has no "
                    f"gradient; checkpoint with use_reentrant=False, or freeze it"
                )


class _Thaw:
    """Rides on an attached model, so that a copy or pickle of it is trainable as a whole again."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters

    def __reduce__(self) -> tuple[Any, ...]:
        return _thaw, (self.parameters,)


def _thaw(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop] if tensor.dim() else tensor


def _home(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device


class Hook:
    """A post-accumulate hook of ours: the mark of a model that is attached."""


class _Mover(Hook):
    """The post-accumulate hook: rows of W.grad go to the leaves, W.grad goes away."""

    def __init__(self, leaves: Sequence[Leaf], ranks: Ranks):
        self.leaves, self.ranks = leaves, ranks

    def __call__(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is None:  # an input of a compiled graph that the sliced rule has served
            return
        gradient = self.ranks.arrived(gradient)
        for leaf in self.leaves:
            rows = gradient
            if not leaf.whole:
                rows = gradient.to_dense() if gradient.is_sparse else gradient
                # cloned, so that the dense gradient can go
                rows = leaf.of(rows).clone()
            if rows.device != leaf.tensor.device or rows.dtype != leaf.tensor.dtype:
                repoint(leaf.tensor, leaf.view(weight))  # model.to(...) since the last step
            if leaf.tensor.grad is None:
                leaf.tensor.grad = rows
            else:
                leaf.tensor.grad = (
                    leaf.tensor.grad + rows if rows.is_sparse else (leaf.tensor.grad.add_(rows))
                )


def refuse_attached(model: nn.Module) -> None:
    """Raise InputError if another optimizer has `model`: all but its chunk would look frozen."""
    for name, parameter in model.named_parameters():
        hooks: dict[int, Any] = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if any(isinstance(hook, Hook) for hook in hooks.values()):
            raise InputError(
                f"{name} belongs to a ChunkedOptimizer already; call detach() on that one first"
            )
