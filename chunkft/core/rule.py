"""The rule: an unmodified torch optimizer on the leaves of one chunk after another.

    wake    the chunk's state comes from the store; fp32 masters are made when first needed
    load    gradients reach the rule's parameters, in fp32
    step    the rule moves leaves and masters
    write   masters round into the weights
    retire  state and the masters' low bits go to the store

Its parameters are the leaves themselves, or the fp32 masters of 16-bit ones. Device bytes: gradient
+ master + state of one chunk.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from chunkft.core import groups as groups_
from chunkft.core import precision
from chunkft.core.groups import Member
from chunkft.core.partition import Slice
from chunkft.core.store import State, Store, nbytes, plain
from chunkft.core.working_set import Leaf
from chunkft.errors import UnsupportedError

Values = dict[str, Any]
Revive = Callable[[Slice, Values], Values]


class Rule:
    """Drives `optimizer_class` on whichever leaves are awake.

    Args:
        settings: of each group, without "params".
        group_of: index of a parameter's group, by its name.
        leaves: the first chunk's.
        device: where they work, of which a rank may have none.
        master: "auto", "fp32" or "none".
        **kwargs: of `optimizer_class`.
    """

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        settings: Sequence[dict[str, Any]],
        group_of: dict[str, int],
        leaves: Mapping[Slice, Leaf],
        device: torch.device,
        *,
        store: Store,
        master: str,
        **kwargs: Any,
    ):
        self.store, self.master = store, master
        self.leaves, self._device = leaves, device
        self.groups, self.group_count = group_of, len(settings)
        self.bytes: dict[str, int] = {}
        """By kind, of the largest working set so far."""
        self._masters: dict[Slice, Tensor] = {}
        self._asleep: dict[Slice, dict[str, Tensor]] = {}  # masters as they rest, until needed
        self._versions: dict[str, int] = {}  # of the weights after our own last write
        starts = zip(settings, self.by_group(), strict=True)
        self.inner = optimizer_class([{**s, "params": tensors} for s, tensors in starts], **kwargs)
        self._kwargs = kwargs
        self._early = bool(self.inner.state)  # made when built: Adagrad's, before torch 2.13
        self.inner.state.clear()

    # -- a visit --------------------------------------------------------------------------------

    def wake(
        self, key: str | None, leaves: Mapping[Slice, Leaf], revive: Revive | None = None
    ) -> None:
        """Take over `leaves`, with their state from the store, as `revive` lets it pass.

        Args:
            key: of the state; None lets it rest.
        """
        self.leaves = leaves
        state = None if key is None else self.store.pop(key, self.device)
        kept: dict[Slice, Values] = {}
        for (piece, name), value in (state or {}).items():
            kept.setdefault(piece, {})[name] = value
        for piece, values in kept.items():
            leaf = leaves[piece]
            halves = {name: values.pop(name) for name in precision.KEYS if name in values}
            if halves and precision.is_16bit(leaf.tensor.dtype):
                self._asleep[piece] = halves
            if revive is not None:
                values = revive(piece, values)
            if values:
                self.inner.state[leaf.tensor] = self._counting(leaf, values)
        self.note_versions()
        self.place()

    def load(self, scale: Tensor | None) -> tuple[list[Leaf], list[Tensor]]:
        """Hand each leaf's gradient to the rule's parameter, in fp32 where the leaf is 16-bit.

        Args:
            scale: of the loss, by which gradients are divided; None is 1.

        Returns: the leaves that have a gradient, and their parameters.
        """
        stepped = [leaf for leaf in self.leaves.values() if leaf.tensor.grad is not None]
        rounded = [leaf for leaf in stepped if precision.is_16bit(leaf.tensor.dtype)]
        created = self._ready_masters(rounded)
        for leaf in stepped:
            if precision.is_16bit(leaf.tensor.dtype):
                gradient, leaf.tensor.grad = leaf.tensor.grad, None
                assert gradient is not None
                self._masters[leaf.piece].grad = gradient.float()
            if scale is not None:
                gradient = self.parameter(leaf).grad
                assert gradient is not None
                gradient.mul_(scale.double().reciprocal().to(gradient))
        if created:
            self.place()
        if self._early:
            self._begin(stepped)
        return stepped, [self.parameter(leaf) for leaf in stepped]

    def step(self, outer_groups: Sequence[dict[str, Any]], in_parts: bool = False) -> None:
        """One step with the hyperparameters of `outer_groups`.

        Args:
            in_parts: it is one of several that make an optimizer step.

        Raises:
            UnsupportedError: a rule that counts its steps in the group would count each of them.
        """
        before = groups_.settings_of(outer_groups) if in_parts else []
        pairs = list(zip(self.inner.param_groups, outer_groups, strict=True))
        for inner, outer in pairs:
            groups_.copy_settings(outer, inner)
        self.inner.step()
        for inner, outer in pairs:  # where Prodigy, say, keeps its step size
            groups_.copy_settings(inner, outer)
        if in_parts and (changed := groups_.changed(before, outer_groups)):
            raise UnsupportedError(
                f"{type(self.inner).__name__} keeps {changed!r} for all parameters together, so "
                f"its step cannot be taken part by part; use it without exact, and without block= "
                f"of the store"
            )

    def write(self, stepped: Iterable[Leaf]) -> None:
        """Round masters into the weights and free their gradients."""
        stepped = list(stepped)
        rounded = [leaf for leaf in stepped if leaf.piece in self._masters]
        masters = [self._masters[leaf.piece] for leaf in rounded]
        if masters:
            torch._foreach_copy_([leaf.tensor for leaf in rounded], masters)
        for master in masters:
            master.grad = None
        away = [(leaf.rest, leaf.tensor) for leaf in stepped if leaf.rest is not None]
        if away:  # a streamed weight must have it where it rests
            rests, tensors = zip(*away, strict=True)
            torch._foreach_copy_(rests, tensors, non_blocking=True)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
        self.note_versions()

    def retire(self, key: str, resting: bool = True, written: Collection[Leaf] = ()) -> None:
        """Move the state of the awake leaves to the store.

        Args:
            resting: as in `Store.put`.
            written: leaves that nobody can have written to since `write`.
        """
        state = self.state(written)
        self.forget()
        if state:
            self.store.put(key, state, resting)

    def forget(self) -> None:
        for held in (self.inner.state, self._masters, self._asleep):
            held.clear()
        for group in self.inner.param_groups:  # or the masters would live on in there
            group["params"] = []

    # -- what it holds --------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next((leaf.tensor.device for leaf in self.leaves.values()), self._device)

    def state(self, written: Collection[Leaf] = ()) -> State:
        """State and masters of the awake leaves, as they rest; `written` as in `retire`."""
        kept = self._kept_of(list(self.leaves.values()), written)
        return {
            (p, key): v
            for p, found in zip(self.leaves, kept, strict=True)
            for key, v in found.items()
        }

    def states(self) -> Iterator[State]:
        """`state()`, leaf by leaf."""
        for piece, leaf in self.leaves.items():
            [values] = self._kept_of([leaf])
            yield {(piece, name): value for name, value in values.items()}

    def holdings(self) -> dict[str, list[Tensor]]:
        """Tensors by kind: gradient, master, state."""
        parameters = [self.parameter(leaf) for leaf in self.leaves.values()]
        carriers = [*parameters, *(leaf.tensor for leaf in self.leaves.values())]
        state = [x for values in self.inner.state.values() for x in values.values()]
        asleep = [x for halves in self._asleep.values() for x in halves.values()]
        return {
            "gradient": [p.grad for p in carriers if p.grad is not None],
            "master": [*self._masters.values(), *asleep, *self._copies()],
            "state": [*(t for value in state for t in plain(value)), *self.store.coming()],
        }

    def _copies(self) -> list[Tensor]:
        """Leaves of streamed weights, which share no storage with them."""
        return [leaf.tensor for leaf in self.leaves.values() if leaf.rest is not None]

    def measure(self, parameters: Sequence[Tensor], waiting: Sequence[Tensor] = ()) -> None:
        """Remember the largest working set, when a step has it whole.

        Args:
            waiting: gradients that `parameters` have views of, or that come later.
        """
        seen = {id(tensor.untyped_storage()) for tensor in waiting}
        own = [p.grad for p in parameters if p.grad is not None]
        own = [gradient for gradient in own if id(gradient.untyped_storage()) not in seen]
        now = {
            "gradient": nbytes([*own, *waiting]),
            "master": nbytes([*self._masters.values(), *self._copies()]),
            "state": nbytes(x for p in parameters for x in self.inner.state.get(p, {}).values()),
        }
        if sum(now.values()) > sum(self.bytes.values()):
            self.bytes = now

    def by_group(self) -> list[list[Tensor]]:
        """The leaves of each group."""
        return self.split((piece.name, leaf.tensor) for piece, leaf in self.leaves.items())

    def names(self) -> list[list[str]]:
        """The parameters of each group."""
        return self.split((name, name) for name in self.groups)

    def split(self, members: Iterable[tuple[str, Member]]) -> list[list[Member]]:
        """(parameter name, member) pairs as lists, one a group."""
        return groups_.split(self.groups, self.group_count, members)

    def place(self) -> None:
        """Fill the inner group dicts, which stay the same objects, with the parameters."""
        by_id = {id(leaf.tensor): leaf for leaf in self.leaves.values()}
        for inner, tensors in zip(self.inner.param_groups, self.by_group(), strict=True):
            inner["params"] = [self.parameter(by_id[id(tensor)]) for tensor in tensors]

    def follow(self, leaf: Leaf) -> None:
        """Bring the master and the rule's state to where the leaf has moved."""
        device = leaf.tensor.device
        old = self.parameter(leaf)
        state = self.inner.state.get(old)
        if not precision.is_16bit(leaf.tensor.dtype) and leaf.piece in self._masters:
            del self._masters[leaf.piece]  # the weight is its own master now
            if state is not None:
                self.inner.state[leaf.tensor] = self.inner.state.pop(old)
            self.place()
        if leaf.piece in self._masters:
            master = self._masters[leaf.piece]
            master.data = master.data.to(device)
        for key, value in (state or {}).items():
            if isinstance(value, Tensor) and value.dim() > 0:
                cast("dict[str, Any]", state)[key] = value.to(device)
        if state:
            state.update(self._counting(leaf, state))

    def _counting(self, leaf: Leaf, values: Values) -> Values:
        """`values` with its step counts where the rule counts, as torch's own load_state_dict does.

        A fused or capturable kernel reads them on the device; a checkpoint has them on the host.
        """
        group = self.inner.param_groups[self.groups[leaf.piece.name]]
        if not (group.get("fused") or group.get("capturable")):
            return values
        device = leaf.tensor.device
        return {
            name: value.to(device) if isinstance(value, Tensor) and value.dim() == 0 else value
            for name, value in values.items()
        }

    def _begin(self, leaves: Iterable[Leaf]) -> None:
        """State for those that have none, as the rule makes it when it is built."""
        for leaf in leaves:
            parameter = self.parameter(leaf)
            if parameter not in self.inner.state:
                group = self.inner.param_groups[self.groups[leaf.piece.name]]
                alone = type(self.inner)([{**group, "params": [parameter]}], **self._kwargs)
                self.inner.state[parameter] = alone.state[parameter]

    def note_versions(self) -> None:
        for piece, leaf in self.leaves.items():
            self._versions[piece.name] = leaf.tensor._version

    def _ready_masters(self, leaves: Sequence[Leaf]) -> bool:
        """Make the leaves' masters hold their values in fp32; True if any is new."""
        new = [leaf for leaf in leaves if leaf.piece not in self._masters]
        self._reread([leaf for leaf in leaves if leaf.piece in self._masters], versions=True)
        # woken only now: the weights may be loaded after our state
        asleep = [leaf for leaf in leaves if leaf.piece in self._asleep]
        halves = [self._asleep.pop(leaf.piece) for leaf in asleep]
        woken = precision.wake_all(halves, [leaf.tensor for leaf in asleep])
        self._masters |= {leaf.piece: m for leaf, m in zip(asleep, woken, strict=True)}
        for leaf in new:
            if leaf.piece not in self._masters:
                self._masters[leaf.piece] = leaf.tensor.detach().float()
            if leaf.tensor in self.inner.state:
                state = self.inner.state.pop(leaf.tensor)
                self.inner.state[self._masters[leaf.piece]] = state
        return bool(new)

    def _reread(self, leaves: Sequence[Leaf], versions: bool) -> None:
        """Where someone wrote to weights (loaded them in place) since we did, they are the masters.

        Args:
            versions: look closely only where a weight's version tells of a write.
        """
        masters = [self._masters[leaf.piece] for leaf in leaves]
        tensors = [leaf.tensor for leaf in leaves]
        ours = [versions and self._versions.get(x.piece.name) == x.tensor._version for x in leaves]
        changed = [True] * len(leaves)
        if self.master != "none":
            changed = precision.overwritten_all(tensors, masters, ours)
        for tensor, master, foreign in zip(tensors, masters, changed, strict=True):
            if foreign:
                master.copy_(tensor)

    def _kept_of(self, leaves: Sequence[Leaf], written: Collection[Leaf] = ()) -> list[Values]:
        found = [
            {**self.inner.state.get(self.parameter(leaf), {}), **self._asleep.get(leaf.piece, {})}
            for leaf in leaves
        ]
        held = [i for i, leaf in enumerate(leaves) if leaf.piece in self._masters]
        if not held or self.master == "none":
            return found
        safe = {leaf.piece for leaf in written}
        self._reread([leaves[i] for i in held if leaves[i].piece not in safe], versions=False)
        masters = [self._masters[leaves[i].piece] for i in held]
        kept = precision.rest_all(masters, [leaves[i].tensor for i in held])
        for i, halves in zip(held, kept, strict=True):
            found[i] |= halves
        return found

    def parameter(self, leaf: Leaf) -> Tensor:
        return self._masters.get(leaf.piece, leaf.tensor)
