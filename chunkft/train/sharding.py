"""FSDP2 around a model: torch's `fully_shard` on what streams and plans take for a layer.

    load in the checkpoint's dtype    a mapping of its files, no memory of this process
    shard layer by layer              the rows of this rank are copied, N / ranks
    cast                              what is here, tensor by tensor

A group is a layer; the input embedding and the head where they are nobody else's, of which the head
must be plain, for `install_head` gathers it; and the rest, which stays gathered through forward and
backward. The adapter of PEFT is inside: wrapped first, sharded then.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedModel

from chunkft.core.ranks import held, is_sharded, reshard, world_size
from chunkft.errors import CheckpointError, UnsupportedError, one_line
from chunkft.memory.units import is_table, layers_of
from chunkft.models.losses import is_plain_head
from chunkft.train import weights

FOLDER = "weights"
MARK = "_chunkft_to_be_sharded"


def shard(model: nn.Module, device: torch.device, mesh: Any = None) -> None:
    """Share the rows of every weight of `model` among all ranks.

    Args:
        device: where the weights go.
        mesh: torch's, of all ranks; None makes one.

    Raises:
        UnsupportedError: quantized weights, or there is one process only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if world_size() == 1:
        raise UnsupportedError("--shard fsdp needs several processes: torchrun --nproc-per-node N")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedError("quantized weights are not sharded; leave --quantize or --shard out")
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    mesh = mesh or init_device_mesh(device.type, (world_size(),))
    for part in [*layers_of(inner), *_ends(inner)]:
        fully_shard(part, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    # by this `generate` knows that a rank whose answers are done must go on beside the others
    inner._is_fsdp_managed_module = True
    assert isinstance(inner, FSDPModule)


def keep_from_device(model: nn.Module) -> None:
    """Mark a model that will be sharded: a device may have no room for all of it until then."""
    model.__dict__[MARK] = True


def is_kept_from_device(model: nn.Module) -> bool:
    return any(MARK in module.__dict__ for module in model.modules())


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring the weights of a sharded model to `dtype`, a layer at a time; with an adapter they have
    been loaded so."""
    wrong = any(p.is_floating_point() and p.dtype != dtype for p in model.parameters())
    if wrong and not isinstance(model, PeftModel):
        model.to(dtype)


def sharded(model: nn.Module) -> bool:
    """Whether ranks share the weights of `model`; what an evaluation has gathered goes."""
    reshard(model)
    return any(map(is_sharded, model.parameters()))


def _ends(model: Any) -> list[nn.Module]:
    """Input embedding and head, unless a weight is somebody else's too."""
    found: list[nn.Module] = []
    if not isinstance(model, PreTrainedModel):
        return found
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if table is not None and is_table(table):
        found.append(table)
    if is_plain_head(model):
        found.append(head)
    users = [p for module in model.modules() for p in module._parameters.values()]
    return [end for end in found if sum(p is end._parameters["weight"] for p in users) == 1]


def named(model: nn.Module) -> dict[str, Tensor]:
    """Weights and persistent buffers by name, tied ones once; beside an adapter what is trained."""
    adapter = isinstance(model, PeftModel)
    found: dict[str, Tensor] = {
        name: p.detach() for name, p in model.named_parameters() if p.requires_grad or not adapter
    }
    lasting = model.state_dict().keys()
    return found | {name: b for name, b in model.named_buffers() if name in lasting}


def nbytes(model: nn.Module) -> int:
    """Bytes that `save` will write on this rank."""
    tensors = map(held, named(model).values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def save(model: nn.Module, folder: Path) -> None:
    """Write the weights into `folder`, each rank its own: torch's distributed checkpoint."""
    dcp.save(named(model), checkpoint_id=folder / FOLDER)


def load(model: nn.Module, folder: Path) -> None:
    """Read a checkpoint's weights into the model's, which may be sharded or not, as it may.

    Raises:
        CheckpointError: it is of another model.
        UnsupportedError: an adapter that was not saved sharded.
    """
    if is_sharded_save(folder):
        source, reader = folder / FOLDER, dcp.FileSystemReader(folder / FOLDER)
    elif isinstance(model, PeftModel):
        raise UnsupportedError(
            f"{folder}: an adapter goes on sharded where it began sharded; use --shard ddp"
        )
    else:
        source, reader = folder, dcp.HuggingFaceStorageReader(str(folder))
    there = reader.read_metadata().state_dict_metadata
    wanted = named(model)
    # a tied weight may be there by another of its names
    names = {id(p): name for name, p in model.named_parameters()}
    aliases = {
        names[id(p)]: n for n, p in model.named_parameters(remove_duplicate=False) if n in there
    }
    if missing := [n for n in wanted if n not in there and n not in aliases]:
        raise CheckpointError(f"{source} has no {missing[0]}: it is of another model")
    with torch.no_grad():
        try:
            dcp.load({aliases.get(n, n): w for n, w in wanted.items()}, storage_reader=reader)
        except dcp.api.CheckpointException as error:
            told = one_line(next(iter(error.failures.values()))[0])
            raise CheckpointError(f"{source} does not fit this model: {told}") from error


def is_sharded_save(folder: Path) -> bool:
    """Whether ranks have saved weights in `folder`."""
    return (folder / FOLDER).is_dir()


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """`named`, whole, on the CPU; every rank must call this."""
    found: dict[str, Tensor] = {}
    for name, weight in named(model).items():
        whole: Any = weight
        found[name] = (whole.full_tensor() if is_sharded(weight) else whole).cpu()
    return found


def assemble(model: Any, folder: Path, out: Path) -> None:
    """Write what ranks have saved in `folder` as a plain model's safetensors into `out`.

    A few tensors are in memory at a time.

    Args:
        model: of the same kind; it may be on "meta".
    """
    reader = dcp.FileSystemReader(folder / FOLDER)
    outline = {
        name: torch.empty(about.size, dtype=about.properties.dtype, device="meta")
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata)
    }

    def read(name: str) -> Tensor:
        tensor = torch.empty_like(outline[name], device="cpu")
        with warnings.catch_warnings():  # that it is alone, which no_dist says
            warnings.simplefilter("ignore")
            one = dcp.FileSystemReader(folder / FOLDER)
            dcp.load({name: tensor}, storage_reader=one, no_dist=True)
        return tensor

    weights.write_original(model, outline, out, read)
