"""Where the state of resting chunks lives: device, host or disk.

State moves at a switch of chunks; with `block` in every step. A chunk's tensors, or a block's, are
laid into one flat slab of bytes: pinned host memory beside a CUDA model, a memory-mapped file on
disk. On "device", and on "host" beside a CPU model, they simply stay where they are.

On CUDA a side stream copies, with events both ways: write-back overlaps the next forward, and
`prefetch` brings the next chunk during the last step of this one. 7B, K=64: 1.3 GB each way a
switch (calc), once in T steps.

A state is a flat dict of names to values; tensors among them move, other values stay here.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from chunkft.errors import InputError

State = dict[Any, Any]
GIB = 2**30
ALIGN = 64  # bytes; keeps every tensor in a slab aligned for vector loads


class Codec(Protocol):
    """Turns a state into what rests, and back (8-bit moments, say).

    What `decode` returns must come back from `encode` and `decode` as it is: states are saved and
    loaded decoded. A state that was never encoded passes `decode` as it is.
    """

    def encode(self, state: State) -> State: ...
    def decode(self, state: State) -> State: ...


class Store:
    """Keeps one state a key, on `kind` = "device", "host" or a directory.

    Args:
        kind: "device", "host", or the path of a directory for memory-mapped slabs.
        codec: applied on the way in and out, on the device; None keeps states as they are. With
            `block` or in exact mode that is at every step, else at the end of a visit.
        block: elements; None lets the state of the active chunk stay on the device. A number lets
            it rest between steps too and visit in parts of that many: less memory, more traffic.
            Beside a codec a run resumes to the bit with the same number only.

    Raises:
        InputError: the directory cannot be created or written, or block < 1.
    """

    def __init__(
        self, kind: str | Path = "host", codec: Codec | None = None, block: int | None = None
    ):
        if block is not None and block < 1:
            raise InputError(f"block={block} must be at least 1 element")
        self.block = block
        self.kind = "disk" if str(kind) not in ("device", "host") else str(kind)
        self.codec = codec
        self._slabs: dict[str, Slab] = {}
        self._kept: dict[str, State] = {}
        self._rooms: dict[str, Tensor] = {}
        self._locked: list[Slab] = []  # of the rooms, page-locked as long as they live
        self._stream: torch.cuda.Stream | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if self.kind == "disk":
            try:
                Path(kind).mkdir(parents=True, exist_ok=True)
                # a folder of its own, gone with the store: two runs never share a slab
                self._folder = tempfile.TemporaryDirectory(prefix="chunkft-", dir=kind)
            except OSError as e:
                raise InputError(
                    f"store={str(kind)!r}: {e.strerror}; name a writable directory"
                ) from e

    @property
    def settings(self) -> dict[str, Any]:
        """What the same bits need when a run goes on."""
        return {"codec": self.codec and type(self.codec).__name__, "block": self.block}

    def put(self, key: str, state: State, resting: bool = True) -> None:
        """Keep `state`; the caller must not write to its tensors afterwards.

        Args:
            resting: False where the state was taken from a visit that goes on (to save it, or to
                detach), and where such a state is loaded: the codec, which may round, is not asked.
                With blocks the state rests at each step, so it is rounded at each step.
        """
        if self.codec and resting:
            state = self.codec.encode(state)
        slab = self._slab_for(key, state)
        self._kept[key] = state if slab is None else slab.write(state)

    def get(self, key: str, device: torch.device) -> State | None:
        """The state of `key` with its slab's tensors on `device`, or None if there is none."""
        if key not in self._kept:
            return None
        state, slab = self._kept[key], self._slabs.get(key)
        if slab is not None:
            state = slab.read(state, device)
        return self.codec.decode(state) if self.codec else dict(state)

    def look(self, key: str) -> State | None:
        """The state of `key` where it rests, read before the next `put`; only a codec copies it."""
        state, slab = self._kept.get(key), self._slabs.get(key)
        if slab is not None and slab.stream is not None:
            slab.stream.synchronize()  # the write may be under way
        return self.codec.decode(state) if self.codec and state is not None else state

    def prefetch(self, key: str, device: torch.device) -> None:
        """Start bringing `key` to `device`, so that `get` finds it there."""
        slab = self._slabs.get(key)
        if slab is not None and slab.stream is not None and device.type == "cuda":
            slab.fetch(device)

    def coming(self) -> list[Tensor]:
        """What `prefetch` has on the device, or on its way there."""
        return [slab.coming for slab in self._slabs.values() if slab.coming is not None]

    def pop(self, key: str, device: torch.device) -> State | None:
        """`get`, and forget it where it does not lie in a slab that will be written again."""
        state = self.get(key, device)
        if key not in self._slabs:
            self._kept.pop(key, None)
        return state

    def room(self, key: str, like: Tensor) -> Tensor | None:
        """Memory laid out as `like` where states rest; None where they stay where they are."""
        if self.kind == "device" or (self.kind == "host" and not like.is_cuda):
            return None
        slab = Slab(_aligned(like), self._path(key), None)
        self._locked.append(slab)
        self._rooms[key] = _shaped(slab.bytes[: like.numel() * like.element_size()], like)
        return self._rooms[key]

    def tensors(self) -> list[Tensor]:
        """The tensors of the states kept, and rooms given out."""
        kept = [t for state in self._kept.values() for v in state.values() for t in plain(v)]
        return [*kept, *self._rooms.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of the states kept and of the rooms given out."""
        return nbytes(self.tensors())

    def clear(self) -> None:
        for slab in self._slabs.values():
            slab.close()
        self._slabs.clear()
        self._kept.clear()

    def _slab_for(self, key: str, state: State) -> "Slab | None":
        tensors = [t for value in state.values() for t in plain(value)]
        cuda = any(t.is_cuda for t in tensors)
        if self.kind == "device" or (self.kind == "host" and not cuda):
            self._slabs.pop(key, None)
            return None
        size = sum(_aligned(t) for t in tensors)
        size += sum(_aligned(value) for value in state.values() if _counts_on_device(value))
        slab = self._slabs.get(key)
        # too large is one that a state lay in before it was encoded; a slab of the time before
        # model.to("cuda") has no stream
        room = size + ALIGN * len(tensors)
        fits = slab is not None and size <= slab.size <= room + size // 4 + ALIGN
        if slab is None or not fits or (cuda and slab.stream is None):
            if slab is not None:
                slab.close()
            if cuda and self._stream is None:
                self._stream = torch.cuda.Stream()
            # with room for a few exceptions to low bits more, as the next visit may have: a new
            # slab in every step, a gigabyte whose pages are locked anew, took half a second
            slab = self._slabs[key] = Slab(room, self._path(key), self._stream)
        return slab

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else Path(self._folder.name) / f"{key}.slab"


class Slab:
    """One chunk's bytes: pinned memory (path None) or a memory-mapped file."""

    def __init__(self, size: int, path: Path | None, stream: "torch.cuda.Stream | None"):
        size = max(size, ALIGN)
        self.size, self.path, self.stream = size, path, stream
        if path is None:
            # torch's own pinned memory rounds up to powers of two: 1.3 GB would take 2 GiB. The
            # mapping is shared, since after a fork writes to a private one go to other pages.
            self.bytes = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
            if page_lock(self.bytes):
                weakref.finalize(self, _let_go, self.bytes, stream)
            else:
                self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:
            path.unlink(missing_ok=True)
            _reserve(path, size)
            self.bytes = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        self.coming: Tensor | None = None
        """The slab on the device, or on its way there, that nobody has read yet."""

    def write(self, state: State) -> State:
        """Copy the tensors of `state` in; returns it with views of the slab in their place."""
        offset, copies = 0, list[tuple[Tensor, Tensor]]()

        def place(tensor: Tensor) -> Tensor:
            nonlocal offset
            count = tensor.numel() * tensor.element_size()
            view = _shaped(self.bytes[offset : offset + count], tensor)
            offset += _aligned(tensor)
            copies.append((view, tensor))
            return view

        self.coming = None
        placed = {
            name: place(value) if _counts_on_device(value) else mapped(value, place)
            for name, value in state.items()
        }
        self._copy(copies)
        return placed

    def fetch(self, device: torch.device) -> Tensor:
        """Start the copy of the whole slab to a CUDA `device`, on the side stream."""
        assert self.stream is not None
        if self.coming is None:
            with torch.cuda.stream(self.stream):
                self.coming = self.bytes.to(device, non_blocking=True)
        return self.coming

    def read(self, state: State, device: torch.device) -> State:
        """`state` with its views of the slab replaced by tensors on `device`."""
        if device.type != "cuda" or self.stream is None:
            if self.stream is not None:
                self.stream.synchronize()  # the write may be under way
            return self._each(state, lambda t: t.to(device, copy=True))
        arrived, self.coming = self.fetch(device), None
        torch.cuda.current_stream().wait_stream(self.stream)
        arrived.record_stream(torch.cuda.current_stream())
        base = self.bytes.data_ptr()

        def take(view: Tensor) -> Tensor:
            start = view.data_ptr() - base
            return _shaped(arrived[start : start + view.numel() * view.element_size()], view)

        return self._each(state, take)

    def _each(self, state: State, change: Callable[[Tensor], Tensor]) -> State:
        """`state` with `change` applied to its views of the slab; other scalars stay."""
        start = self.bytes.data_ptr()
        slab = range(start, start + self.size)

        def ours(value: Any) -> bool:
            scalar = isinstance(value, Tensor) and value.dim() == 0
            return scalar and value.data_ptr() in slab

        return {
            name: change(value) if ours(value) else mapped(value, change)
            for name, value in state.items()
        }

    def close(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _copy(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        for view, tensor in copies:
            if not tensor.is_cuda:
                view.copy_(tensor)
        there = [(view, tensor) for view, tensor in copies if tensor.is_cuda]
        if not there:
            return
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            views, tensors = zip(*there, strict=True)
            # only pinned memory takes a copy that does not block; the file's pages block
            torch._foreach_copy_(views, tensors, non_blocking=self.path is None)
        for tensor in tensors:
            tensor.record_stream(self.stream)  # not reused before the copy has read it


def page_lock(raw: Tensor) -> bool:
    """Lock whole pages of ours for copies that do not block; False if CUDA refuses."""
    if int(_runtime().cudaHostRegister(raw.data_ptr(), raw.numel(), 0)) == 0:
        return True
    with suppress(RuntimeError):  # the refusal would come up in whatever kernel is launched next
        torch.zeros(1, device="cuda")
    return False


def page_unlock(raw: Tensor) -> None:
    """Undo `page_lock`; no copy may be under way."""
    _runtime().cudaHostUnregister(raw.data_ptr())


def _let_go(raw: Tensor, stream: "torch.cuda.Stream | None") -> None:
    # unlike torch's own pinned memory nobody else waits for the copies
    torch.cuda.synchronize() if stream is None else stream.synchronize()
    page_unlock(raw)


def _runtime() -> Any:
    return torch.cuda.cudart()


def _counts_on_device(value: Any) -> bool:
    """A scalar of a fused rule, its step count: 512 bytes of the device where it stays.

    75 MB at 7B and K=512, where each chunk has a slice of every tensor.
    """
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_cuda


def _reserve(path: Path, size: int) -> None:
    """Take the file's blocks now: a mapped page that finds the disk full kills the process.

    Raises:
        InputError: they are not to be had.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as e:
        path.unlink(missing_ok=True)
        raise InputError(
            f"store={str(path.parents[1])!r}: {size / GIB:.2f} GiB for one chunk: {e.strerror}; "
            f"name a directory with room for the state of all chunks"
        ) from e


def _shaped(raw: Tensor, like: Tensor) -> Tensor:
    """The bytes `raw` as a tensor laid out as `like`: a fused rule walks all of them by address."""
    if like.is_contiguous():
        return raw.view(like.dtype).view(like.shape)
    strides = torch.empty_like(like, device="meta").stride()  # `like` may have gaps
    return raw.view(like.dtype).as_strided(like.shape, strides)


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGN) * ALIGN


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` applied to its plain tensors, those inside subclasses too.

    Scalars, step counts above all, stay where the rule put them (a slab takes those of a device).
    """
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if not is_traceable_wrapper_subclass(value):
        return change(value)
    names, context = value.__tensor_flatten__()
    inner = {name: mapped(getattr(value, name), change) for name in names}
    return type(value).__tensor_unflatten__(inner, context, value.shape, value.stride())


def plain(value: Any) -> list[Tensor]:
    """The plain tensors of `value`, those inside subclasses too; scalars are not counted."""
    found: list[Tensor] = []
    mapped(value, lambda t: (found.append(t), t)[1])
    return found


def nbytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among `values`."""
    tensors = [t for value in values for t in plain(value)]
    return sum(t.numel() * t.element_size() for t in tensors)
