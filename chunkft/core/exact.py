"""Exact mode: every chunk passes through the working set in every step.

    backward   the gradient of each weight, once whole, is added up off the device
    step       norm over all of them; then chunk by chunk: gradient, state and master in, the rule,
               weight, state and low bits out

For an elementwise rule that is the rule's own dense result to the bit, with accumulation and
clipping by the global norm; any other rule is cut at tensor borders.

Device bytes: gradient, master and state of one chunk, and while backward runs the dense gradients
of two tensors, one of them on its way off. Off the device: one gradient an element, in the weights'
dtype, beside the resting state.
"""

from typing import Any

import torch
from torch import Tensor, nn

from chunkft.core import precision
from chunkft.core.partition import Slice
from chunkft.core.ranks import Ranks, held
from chunkft.core.sliced_ops import repoint
from chunkft.core.store import Store
from chunkft.core.working_set import Hook, Leaf
from chunkft.errors import InputError, UnsupportedError

# An element's update depends on nothing but this element's weight, gradient and state. A subclass
# may do anything.
ELEMENTWISE = tuple(
    getattr(torch.optim, name)
    for name in (
        *("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD"),
        *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
    )
)


VECTORS = 64  # elements; a multiple of what one turn of torch's fused loops takes


def cuts_of(rule: type[torch.optim.Optimizer], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where tensors may be cut so that a slice goes the same way as within its tensor, to the bit.

    A fused rule on a CPU rounds otherwise in the last elements of a tensor, past whole vectors.
    """
    return {"whole": rule not in ELEMENTWISE, "grain": VECTORS if kwargs.get("fused") else 1}


class Gradients:
    """Gradients of all weights, added up off the device from one step to the next.

    Args:
        weights: trainable parameters by name.
        store: gradients lie where states rest.
        ranks: that train the weights together.

    `stand_ins` have the weights' shapes and carry the gradients, on whatever device those are:
    what GradScaler and accelerate find in the optimizer's groups.
    """

    def __init__(self, weights: dict[str, nn.Parameter], store: Store, ranks: Ranks):
        self.weights, self.store, self.ranks = weights, store, ranks
        self.stand_ins = {name: _hollow(held(weight)) for name, weight in weights.items()}
        self._rooms: dict[str, Tensor | None] = {}
        self._devices: dict[str, torch.device] = {}  # where backward makes them
        self._handles: list[Any] = []
        self._stream: torch.cuda.Stream | None = None
        self._sent: torch.Event | None = None

    def attach(self) -> None:
        """Take each gradient from its weight as soon as backward has it whole."""
        self.detach()
        for name, weight in self.weights.items():
            hook = _Collector(self, name)
            self._handles.append(weight.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def collect(self) -> None:
        """Take gradients that someone put on a weight by hand."""
        for name, weight in self.weights.items():
            self.take(name, weight)

    def take(self, name: str, weight: Tensor) -> None:
        """Add `weight.grad` to what is there and free it."""
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        gradient = self.ranks.arrived(gradient)
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        stand_in = self.stand_ins[name]
        if name not in self._rooms:
            self._rooms[name] = self.store.room(f"gradient-{len(self._rooms)}", gradient)
        self._devices[name] = gradient.device
        room, so_far = self._rooms[name], stand_in.grad
        if room is None:
            total = gradient if so_far is None else so_far.add_(gradient)
        else:
            total = room
            self._send(gradient, room, add=so_far is not None)
        if so_far is None:
            # a Tensor takes a gradient of its own device and dtype only
            repoint(stand_in, _hollow(total))
            stand_in.grad = total

    def average(self, scale: Tensor | None) -> Tensor | None:
        """As `Ranks.average`."""
        self._settle()
        names = list(self.stand_ins)

        def fill(i: int) -> None:
            weight = self.weights[names[i]]
            weight.grad = torch.zeros_like(weight)
            self.take(names[i], weight)
            self._settle()

        return self.ranks.average(list(self.stand_ins.values()), scale, fill)

    def norm(self, scale: Tensor | None) -> Tensor:
        """Norm of all gradients in fp32, divided by `scale`, in the model's order."""
        self._settle()
        gradients = (
            # summed up where a dense step would: the bus is faster than the host's cores, and
            # another kernel would round otherwise
            x.grad.to(self._devices[name], non_blocking=True)
            for name, x in self.stand_ins.items()
            if x.grad is not None
        )
        return precision.total_norm(gradients, scale)

    def names(self) -> set[str]:
        """Of weights that have a gradient."""
        return {name for name, stand_in in self.stand_ins.items() if stand_in.grad is not None}

    def on_device(self) -> list[Tensor]:
        """Those that lie beside their weights, for want of another place."""
        carried = ((name, x.grad) for name, x in self.stand_ins.items() if x.grad is not None)
        return [gradient for name, gradient in carried if self._rooms[name] is None]

    def given_to(self, leaves: dict[Slice, Leaf]) -> dict[Slice, Leaf]:
        """`leaves` with their gradients, on their devices; a view where it lies there already.

        A gradient is forgotten when its last row has been given.
        """
        for piece, leaf in leaves.items():
            stand_in = self.stand_ins[piece.name]
            gradient = stand_in.grad
            if gradient is None:
                continue
            leaf.tensor.grad = leaf.of(gradient).to(leaf.tensor.device, non_blocking=True)
            if leaf.whole or leaf.first + piece.rows == stand_in.shape[0]:
                stand_in.grad = None
        return leaves

    def drop(self) -> None:
        """Forget all gradients."""
        for stand_in in self.stand_ins.values():
            stand_in.grad = None

    def _send(self, gradient: Tensor, room: Tensor, add: bool) -> None:
        if not gradient.is_cuda:
            room.add_(gradient) if add else room.copy_(gradient)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        if add:  # on the device: the sum rounds as autograd's own would
            current.wait_stream(self._stream)
            gradient.add_(room.to(gradient.device, non_blocking=True))
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            room.copy_(gradient, non_blocking=True)
            sent = self._stream.record_event()
        gradient.record_stream(self._stream)
        # backward is faster than the bus: without waiting, gradients would pile up on the device
        self._settle()
        self._sent = sent

    def _settle(self) -> None:
        if self._sent is not None:
            self._sent.synchronize()


class _Collector(Hook):
    def __init__(self, gradients: Gradients, name: str):
        self.gradients, self.name = gradients, name

    def __call__(self, weight: Tensor) -> None:
        self.gradients.take(self.name, weight)


def refuse_whole(rule: type[torch.optim.Optimizer]) -> None:
    """Raise UnsupportedError if `rule` needs whole tensors, which no rank has of sharded ones."""
    if rule not in ELEMENTWISE:
        raise UnsupportedError(
            f"{rule.__name__} is not elementwise: exact=True gives it whole tensors, which no rank "
            f"has where weights are sharded; use AdamW, or leave exact out"
        )


SCHEDULE = {"interval": 20, "order": "cyclic", "moments": "persist", "seed": 0, "block": None}


def refuse_schedule(**settings: Any) -> None:
    """Raise InputError for a setting of `SCHEDULE` that someone has set to another value."""
    for name, value in settings.items():
        if value != SCHEDULE[name]:
            raise InputError(
                f"{name}={value!r} has no meaning with exact=True, where every chunk takes part in "
                f"every step; leave it out"
            )


def _hollow(like: Tensor) -> Tensor:
    """A tensor of the shape, dtype and device of `like` with the memory of one element."""
    return torch.empty((), dtype=like.dtype, device=like.device).expand(like.shape)
