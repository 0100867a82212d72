"""A model's shape by name, without its weights.

Some shapes are known here, so that a plan needs neither weights nor a hub; any other name is one
that `load_model` takes, of which only the config is read.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from chunkft.errors import InputError, one_line
from chunkft.models.gguf import EMBEDDED
from chunkft.models.load import DEFAULT_CACHE, UNLOADABLE, resolve_model

LLAMA = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
LLAMA_3 = LLAMA | {"vocab_size": 128256, "tie_word_embeddings": False}

# hidden size, size inside the MLP, layers, heads
KNOWN: dict[str, tuple[type[PretrainedConfig], tuple[int, int, int, int], dict[str, Any]]] = {
    EMBEDDED: (
        LlamaConfig,
        (576, 1536, 30, 9),
        LLAMA | {"vocab_size": 49152, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "llama-2-7b": (
        LlamaConfig,
        (4096, 11008, 32, 32),
        LLAMA | {"vocab_size": 32000, "num_key_value_heads": 32, "tie_word_embeddings": False},
    ),
    "llama-3-8b": (LlamaConfig, (4096, 14336, 32, 32), LLAMA_3),
    "llama-3-70b": (LlamaConfig, (8192, 28672, 80, 64), LLAMA_3),
    "gpt-neox-20b": (
        GPTNeoXConfig,
        (6144, 24576, 44, 64),
        {"vocab_size": 50432, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    ),
}


def config_of(name: str, cache_dir: Path = DEFAULT_CACHE) -> PretrainedConfig:
    """The config of a known shape, a folder, a .gguf file or a hub id.

    Raises:
        InputError: there is none under this name.
    """
    if name in KNOWN and not Path(name).exists():
        cls: Any
        cls, (hidden, inner, layers, heads), more = KNOWN[name]
        sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
        return cls(**sizes, num_attention_heads=heads, **more)
    try:
        return AutoConfig.from_pretrained(resolve_model(name, cache_dir=cache_dir))
    except UNLOADABLE as error:
        raise InputError(
            f"no config of {name!r}: {one_line(error)}; give a folder, a hub id or one of "
            f"{', '.join(KNOWN)}"
        ) from error
