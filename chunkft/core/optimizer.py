"""ChunkedOptimizer: any torch optimizer, driven on one chunk of the model at a time.

    t -> chunk k(t) -> backward fills its leaves -> clip -> the rule on the leaves -> the next chunk

The rule (`optimizer_class`) is used unmodified. It sees the leaves, or the fp32 masters of 16-bit
ones, as its parameters; at a switch its state moves to the store and the next chunk's comes back.
Every slice keeps its own state and so its own step count c_k (ChunkFT, arXiv 2605.21177).

Device bytes: weights + (gradient + master + state) of one chunk, N/K elements.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from math import sqrt
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from chunkft.core import coverage, precision, resume
from chunkft.core import groups as groups_
from chunkft.core.checks import check_counts, check_settings
from chunkft.core.exact import Gradients, cuts_of, refuse_schedule, refuse_whole
from chunkft.core.partition import Block, Partition, Slice, cut
from chunkft.core.passes import Clip, rests, step_in_passes
from chunkft.core.ranks import refuse_wrapped
from chunkft.core.rule import Rule, Values
from chunkft.core.schedule import Schedule
from chunkft.core.store import State, Store
from chunkft.core.working_set import WorkingSet
from chunkft.errors import InputError, NonFiniteGradientError, UnsupportedError


class ChunkedOptimizer(torch.optim.Optimizer):
    """Train all parameters of `model`, one chunk at a time, with any torch optimizer class.

    Args:
        model: any nn.Module. What has requires_grad=True now is trained.
        optimizer_class: torch.optim.AdamW, SGD, bitsandbytes' AdamW8bit, ...
        groups: torch-style dicts of parameters with their own settings; None is one group.
        chunks: K. Working bytes go with 1/K.
        interval: T, optimizer steps of a visit.
        layout: "stream" (contiguous bytes) or "spread" (a share of rows of every tensor).
        order: "cyclic", "shuffled" (anew each cycle) or "reversed".
        moments: "persist" keeps the rule's state between visits, "reset" starts it anew, "decay"
            scales the first moment by beta1 to the power of the steps gone by.
        exact: every chunk in every step (see exact.py): the dense optimizer, to the bit where the
            rule is elementwise. Schedule settings beside it raise.
        store: where resting state lives: "host" (pinned beside a CUDA model), "device", a
            directory, or a `Store`, which may keep the active chunk's state too between steps.
        master: "auto" or "fp32" keep an exact fp32 master of 16-bit weights, "none" rounds
            after every step. The rule always computes in fp32.
        max_grad_norm: clip the active chunk to max_grad_norm * sqrt(its elements / all elements),
            so that the setting means the same at every K; in exact mode the whole gradient to
            max_grad_norm. None does not clip. Clipping of `model.parameters()`, which Trainer does
            by default (its max_grad_norm=1.0), finds no gradient there: set it here, and 0 there.
        seed: of the shuffled order.
        **optimizer_kwargs: of `optimizer_class`, such as lr.

    Raises:
        InputError: a setting out of its range, a parameter in no group or in two.
        DriftError: of several ranks some have other weights.
        UnsupportedError: the model is wrapped for data parallelism, or sharded within rows.
    """

    # GradScaler hands found_inf and grad_scale to step() instead of skipping it
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        optimizer_class: type[torch.optim.Optimizer],
        *,
        groups: Sequence[dict[str, Any]] | None = None,
        chunks: int,
        interval: int = 20,
        layout: str = "stream",
        order: str = "cyclic",
        moments: str = "persist",
        exact: bool = False,
        store: str | Path | Store = "host",
        master: str = "auto",
        max_grad_norm: float | None = None,
        seed: int = 0,
        **optimizer_kwargs: Any,
    ):
        check_settings(model, optimizer_class, max_grad_norm, moments=moments, master=master)
        check_counts(chunks=chunks, interval=interval)
        self.store = store if isinstance(store, Store) else Store(store)
        if exact:
            refuse_schedule(
                interval=interval, order=order, moments=moments, seed=seed, block=self.store.block
            )
        refuse_wrapped(model)
        self._working_set = WorkingSet(model)
        self._weights, self._ranks = self._working_set.parameters, self._working_set.ranks
        self._cuts = cuts_of(optimizer_class, optimizer_kwargs)
        if exact and self._ranks.sharded:
            refuse_whole(optimizer_class)
        self._cut = partial(
            *(cut, groups_.outline(self._weights), chunks, layout), **self._cuts if exact else {}
        )
        self._take(self._cut(shards=self._ranks.shards), self._ranks.shards)
        self.schedule = Schedule(chunks, 1 if exact else interval, order, seed)
        self.layout, self.moments, self.max_grad_norm = layout, moments, max_grad_norm
        self._steps, self._attached = 0, False
        self._fresh = False  # a visit has begun whose state is yet to be revived, in blocks
        self._active: int | None = None  # chunk attached to the model
        self._gradients = Gradients(self._weights, self.store, self._ranks) if exact else None
        self._book = {piece: coverage.Record() for chunk in self.own for piece in chunk}
        self._warned: set[str] = set()
        self._norm: Tensor | None = None
        group_of, settings = groups_.assign(self._weights, groups)

        try:
            k = self.schedule.chunk(0)
            if not exact:
                self._working_set.attach(self.partition[k])
            self._rule = Rule(
                optimizer_class,
                settings,
                group_of,
                self._working_set.view(self.own[k]) if exact else self._working_set.leaves,
                self._ranks.device,
                store=self.store,
                master=master,
                **optimizer_kwargs,
            )
            inner = self._rule.inner
            if moments == "decay":
                resume.first_moment_rate(inner.defaults)
            super().__init__([dict(group) for group in inner.param_groups], dict(inner.defaults))
        except BaseException:
            self._working_set.detach()  # or a second try would find one chunk trainable
            raise
        if exact:
            self._attach(None, new_visit=False)
        else:
            self._attached, self._active = True, self.active
            self._place()

    # -- what users read ------------------------------------------------------------------------

    @property
    def active(self) -> int | None:
        """Index in `.partition` of the chunk that the next backward trains; None in exact mode."""
        return None if self.exact else self.schedule.chunk(self._steps)

    @property
    def exact(self) -> bool:
        """Whether every chunk takes part in every step."""
        return self._gradients is not None

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._steps

    @property
    def grad_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None before the first step."""
        return None if self._norm is None else float(self._norm)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by kind: the largest working set so far (gradient, master, state), and resting."""
        return {**self._rule.bytes, "resting": self.store.nbytes}

    @property
    def reduced_bytes(self) -> int:
        """Of gradients that were averaged over ranks so far, by FSDP too."""
        return self._ranks.reduced

    @property
    def rule(self) -> torch.optim.Optimizer:
        """The torch optimizer that steps on the active leaves or their masters."""
        return self._rule.inner

    def holdings(self) -> dict[str, list[Tensor]]:
        """Tensors by kind as they are now: gradient, master, state, resting."""
        held = self._rule.holdings()
        if self._gradients is not None:
            held["gradient"] += self._gradients.on_device()
        if self.store.block:
            held["gradient"] += self._working_set.waiting()
        return {**held, "resting": self.store.tensors()}

    def audit(self) -> coverage.Audit:
        """Check that every element got the steps it was due.

        Raises:
            CoverageError: a chunk whose visit is over was not stepped, or got no gradient at all.
        """
        return coverage.audit(
            self.partition, self.own, self.schedule, self._steps, self._book, self.exact
        )

    # -- a step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the active chunk, advance the schedule, attach the next chunk.

        In exact mode update all chunks, one after another.

        Consumes and frees the gradients: Trainer calls `model.zero_grad()` only.

        Raises:
            NonFiniteGradientError: before anything is written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.train()
        scale = cast("Tensor | None", getattr(self, "grad_scale", None))
        found_inf = cast("Tensor | None", getattr(self, "found_inf", None))
        if found_inf is not None and self._ranks.any(bool(found_inf)):
            self.zero_grad()
        elif self._gradients is not None:
            self._step_all(self._gradients, scale)
        else:
            self._step_active(scale)
        return loss

    def _step_active(self, scale: Tensor | None) -> None:
        self._working_set.collect()
        self._working_set.check_lost()
        leaves = [leaf.tensor for leaf in self._working_set.leaves.values()]
        scale = self._ranks.average(leaves, scale)
        used = {leaf.piece for leaf, _ in self._working_set.gradients()}
        k, sizes, limit = self._active, self.partition.sizes(), self.max_grad_norm
        assert k is not None
        limit = None if limit is None else limit * sqrt(sizes[k] / sum(sizes))
        if self.store.block:
            self._norm = self._ranks.norm(precision.total_norm(self._working_set.waiting(), scale))
            self._refuse_non_finite()
            step_in_passes(
                *(self._rule, self.param_groups, self._rests[k], self._working_set.part),
                *(self._working_set.waiting, scale, Clip(limit, self._norm)),
                (lambda block: partial(self._revive, block)) if self._fresh else None,
            )
            self._fresh = False
            self._rule.wake(None, self._working_set.leaves)
        else:
            stepped, parameters = self._rule.load(scale)
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
            self._norm = self._ranks.norm(norm)
            self._refuse_non_finite()
            Clip(limit, self._norm).apply(parameters)
            self._rule.step(self.param_groups)
            self._rule.measure(parameters)
            self._rule.write(stepped)
        self._working_set.drop_gradients()
        coverage.note(self._book, self._working_set.leaves, used, self._steps)
        self._advance()

    def _step_all(self, gradients: Gradients, scale: Tensor | None) -> None:
        gradients.collect()
        scale = gradients.average(scale)
        self._norm = self._ranks.norm(gradients.norm(scale))
        self._refuse_non_finite()
        names = gradients.names()
        step_in_passes(
            *(self._rule, self.param_groups, list(chain(*self._rests))),
            lambda block: gradients.given_to(self._working_set.view(block)),
            *(self._working_set.waiting, scale, Clip(self.max_grad_norm, self._norm)),
        )
        used = {piece for piece in self._book if piece.name in names}
        coverage.note(self._book, self._book, used, self._steps)
        if not self._steps:
            self._warned |= coverage.warn_unused(self._book, self._book, self._warned)
        self._ranks.compare(self._weights.values(), self._steps)
        self._steps += 1

    def train(self) -> None:
        """Make ready for a forward pass; Trainer and accelerate call it before each.

        Follows `model.to(...)`, and undoes what keeps backward from stopping early.

        Raises:
            ReplacedParameterError: the model's parameters are not those it had.
            UnsupportedError: after `detach()`, or with several processes.
        """
        if not self._attached:
            raise UnsupportedError("the optimizer is detached; build a new one to go on training")
        for leaf in self._working_set.refresh():
            self._rule.follow(leaf)
        if not self.exact:
            self._working_set.keep_truncation()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients collected so far; after `step()` there are none."""
        self._working_set.drop_gradients()
        if self._gradients is not None:
            self._gradients.drop()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor may: the chunks are cut once."""
        if getattr(self, "_attached", False):
            raise InputError("chunks are cut once: pass groups= when building ChunkedOptimizer")
        super().add_param_group(param_group)

    def _refuse_non_finite(self) -> None:
        assert self._norm is not None
        if bool(torch.isfinite(self._norm)):
            return
        for leaf in self._rule.leaves.values():
            self._rule.parameter(leaf).grad = None
        self.zero_grad()
        chunk = "" if self.exact else f", chunk {self.active}"
        raise NonFiniteGradientError(
            f"gradient norm {float(self._norm)} at step {self._steps}{chunk}: nothing was "
            f"written; lower the learning rate, clip, or look at this batch"
        )

    def _advance(self) -> None:
        if self.schedule.last_step_of_visit(self._steps):
            leaves, known = self._working_set.leaves, self._warned
            self._warned |= coverage.warn_unused(self._book, leaves, known)
            self._ranks.compare((leaf.tensor for leaf in leaves.values()), self._steps)
        self._steps += 1
        following = self.active
        if following != self._active:
            self._retire(resting=True)
            self._attach(following, new_visit=True)
        if self.schedule.last_step_of_visit(self._steps):
            coming = self.schedule.chunk(self._steps + 1)
            if coming != self._active:
                self.store.prefetch(str(coming), self._rule.device)

    # -- switching ------------------------------------------------------------------------------

    def _take(self, partition: Partition, shards: int) -> None:
        self.partition, self._shards = partition, shards
        self.own = [self._working_set.own(chunk) for chunk in partition]
        self._rests = [
            rests(chunk, k, partition.shapes, self.store.block, self._cuts)
            for k, chunk in enumerate(self.own)
        ]

    def _attach(self, k: int | None, new_visit: bool) -> None:
        self._attached, self._active = True, k
        if k is None:
            assert self._gradients is not None
            self._gradients.attach()
            self._ranks.guard(self._working_set.model)
            self._place()
            return
        self._working_set.attach(self.partition[k])
        if self.store.block:
            self._fresh = new_visit
            self._rule.wake(None, self._working_set.leaves)
        else:
            [(key, block)] = self._rests[k]
            revive = partial(self._revive, block) if new_visit else None
            self._rule.wake(key, self._working_set.leaves, revive)
        self._place()

    def _retire(self, resting: bool) -> None:
        """Move the active chunk's state to the store, as its visit so far leaves it."""
        assert self._active is not None
        if self._fresh:  # no step has revived it
            for key, block in self._rests[self._active]:
                leaves = self._working_set.part(block, consume=False)
                self._rule.wake(key, leaves, partial(self._revive, block))
                self._rule.retire(key, resting)
            self._rule.wake(None, self._working_set.leaves)
            self._fresh = False
        elif not self.store.block:
            self._rule.retire(str(self._active), resting)

    def _revive(self, block: Block, piece: Slice, values: Values) -> Values:
        """What a new visit leaves of the state of a slice of `block`."""
        if self.moments == "decay":
            gap = self._steps - 1 - self._book[block[piece]].last
            resume.decay_first_moment(values, self.param_groups[self._rule.groups[piece.name]], gap)
        return {} if self.moments == "reset" else values

    def _place(self) -> None:
        """Fill the group dicts, which stay the same objects, with what carries gradients."""
        carriers = self._gradients and self._rule.split(self._gradients.stand_ins.items())
        members = carriers or self._rule.by_group()
        for group, tensors in zip(self.param_groups, members, strict=True):
            group["params"] = tensors

    # -- leaving the model, and coming back -----------------------------------------------------

    def detach(self) -> None:
        """Take everything off the model, for good: it is stock again, trained weights in place."""
        if not self._attached:
            return
        self.train()
        if self._gradients is not None:
            self._gradients.detach()
        elif self._active is not None:
            self._retire(resting=False)
        self._working_set.detach()
        self._attached, self._active = False, None

    @contextmanager
    def detached(self) -> Generator[nn.Module]:
        """The stock model, for a while; gradients collected so far are kept."""
        attached, active, gradients = self._attached, self._active, dict[Slice, Tensor]()
        for leaf, gradient in self._working_set.gradients():
            gradients[leaf.piece] = gradient
        self.detach()
        try:
            yield self._working_set.model
        finally:
            if attached:
                self._attach(active, new_visit=False)
                for piece, gradient in gradients.items():
                    self._working_set.leaves[piece].tensor.grad = gradient

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """State by parameter name and rows, in plain containers; tensors are not copied.

        Before the first step it holds no tensor.
        """
        parts = self._parts(lambda key: self.store.get(key, torch.device("cpu")))
        return self._header() | {"state": resume.joined(parts)}

    def in_parts(self) -> tuple[dict[str, Any], Iterator[resume.SavedState]]:
        """`state_dict()` without its "state", and that in parts (see `resume.joined`).

        A part is a resting chunk, or a slice of the active one, whose low bits are made for it.
        What rests on disk stays there. Read each part before the next step.
        """
        return self._header(), self._parts(self.store.look)

    def _parts(self, read: Callable[[str], State | None]) -> Iterator[resume.SavedState]:
        if self._fresh:
            self._retire(resting=False)
        for k in range(len(self.partition)):
            if k != self._active or self.store.block:
                for key, block in self._rests[k]:
                    yield resume.part(block, self._book, read(key) or {})
                continue
            for piece, kept in zip(self._rule.leaves, self._rule.states(), strict=True):
                yield resume.part({piece: piece}, self._book, kept)

    def _header(self) -> dict[str, Any]:
        return resume.header(
            *(self.partition, self.schedule, self.param_groups, self._rule.names()),
            steps=self._steps,
            layout=self.layout,
            shards=self._shards,
            rule=type(self._rule.inner).__name__,
            moments=self.moments,
            exact=self.exact,
            **self.store.settings,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken: to the bit with the same chunks and schedule.

        With another K or layout, or from exact mode to chunks or back, the state is cut anew and a
        new cycle begins; load the model's weights first then. With another interval, order or
        seed a new cycle begins.

        Raises:
            StateError: it belongs to another model, or a value cannot be cut (named).
        """
        rule, shapes = type(self._rule.inner).__name__, self.partition.shapes
        saved = resume.check(state_dict, rule, shapes, self._rule.names())
        theirs = saved.schedule.chunks, saved.layout, saved.exact
        same_cut = theirs == (self.schedule.chunks, self.layout, self.exact)
        self.train()
        rows_of = self._working_set.rows_of
        even = saved.shards % self._ranks.shards == 0  # on fewer ranks too
        shards = saved.shards if same_cut or even else self._ranks.shards
        found = saved.partition, resume.records(saved)
        if not same_cut:
            found = resume.recut(saved, self._cut(shards=shards), rows_of)
        self.zero_grad()
        self.store.clear()
        self._rule.forget()
        self._take(found[0], shards)
        self._book = self._working_set.own_of(found[1])
        same = same_cut and replace(self.schedule, start=saved.schedule.start) == saved.schedule
        start = saved.schedule.start if same else saved.steps
        self._steps = saved.steps
        self.schedule = replace(self.schedule, start=start)
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            groups_.copy_settings(loaded, group)
        # of the active chunk what was saved may not have rested yet: it must not be rounded
        k, device_of = self.active, self._working_set.device_of
        awake = {rest.key for rest in (() if k is None else self._rests[k])}
        for key, state in resume.states(saved, chain(*self._rests), rows_of):
            if state:
                self.store.put(key, resume.to_device(state, device_of), key not in awake)
        # a visit begins here unless the saved run was in the middle of one
        visit_begins = (self._steps - start) % self.schedule.interval == 0
        self._attach(self.active, new_visit=visit_begins and start != saved.schedule.start)
