"""safetensors files written tensor by tensor: their size costs no memory.

    length of the header | header (JSON: name -> dtype, shape, place) | bytes of each tensor

What lies in memory or in a mapped file is handed to the kernel where it lies; the rest (a device's
tensors, gaps between rows) passes through a buffer of `BUFFER` bytes. safetensors' own `save_file`
holds all tensors of a file that are not on the CPU at once.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

BUFFER = 64 << 20  # bytes
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(
    path: Path, outline: Mapping[str, Tensor], read: Callable[[str], Tensor] | None = None
) -> None:
    """Write tensors to `path`, which comes to be when all is on disk.

    Args:
        outline: the tensors, or others of their dtypes and shapes (on "meta").
        read: gives each of them when its turn comes.

    Raises:
        OSError: the disk is full, say; nothing is left behind.
    """
    read = read or outline.__getitem__
    # the widest first: each then begins at a multiple of its own size
    names = sorted(outline, key=lambda name: -outline[name].element_size())
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            _write_all(file.fileno(), _header(names, outline))
            for name in names:
                for piece in _pieces(read(name).detach()):
                    _write_all(file.fileno(), _bytes(piece))
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(names: list[str], outline: Mapping[str, Tensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = outline[name]
        start, end = end, end + nbytes(tensor)
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in order, in contiguous pieces on the CPU."""
    if nbytes(tensor) <= BUFFER or (tensor.is_contiguous() and tensor.device.type == "cpu"):
        yield tensor.contiguous().cpu()
    elif tensor.is_contiguous():
        for piece in tensor.view(-1).split(BUFFER // tensor.element_size()):
            yield piece.cpu()
    elif len(tensor) == 1:
        yield from _pieces(tensor[0])
    else:
        rows = max(1, BUFFER // nbytes(tensor[0]))
        for piece in tensor.split(rows):
            yield from _pieces(piece)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a single element may have any stride
    return flat.view(torch.uint8).numpy().data


def _write_all(descriptor: int, data: memoryview | bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left[:BUFFER]) :]
