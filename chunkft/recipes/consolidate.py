"""What ranks have saved, each its rows, becomes one model that `from_pretrained` reads."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from chunkft.errors import InputError, as_input_error
from chunkft.train import checkpoints, sharding

BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")  # configuration and tokenizer
OF_A_RUN = {"trainer_state.json", "metrics.json", checkpoints.BEFORE, checkpoints.MANIFEST}


def run(options: Any) -> int:
    """Write the plain model; returns 0.

    Raises:
        InputError: DIR holds no such weights, or torn ones; OUT is not empty.
    """
    folder, out = Path(options.folder).expanduser(), Path(options.out).expanduser()
    if not sharding.is_sharded_save(folder):
        raise InputError(
            f"{folder} holds no weights of several ranks ({sharding.FOLDER}/); name the "
            f"--output_dir of a run with --shard fsdp, or a checkpoint of it"
        )
    if (folder / checkpoints.MANIFEST).exists() and (why := checkpoints.fault(folder)):
        raise InputError(f"{folder} {why}")
    checkpoints.prepare_output(out, None, resuming=False)
    with as_input_error("consolidating"):
        config = AutoConfig.from_pretrained(folder)
        [name] = config.architectures or [""]
        kind = getattr(transformers, name)
        with torch.device("meta"):
            model = kind(config)
        sharding.assemble(model, folder, out)
        for pattern in BESIDE:
            for path in folder.glob(pattern):
                if path.name not in OF_A_RUN:
                    shutil.copy(path, out)
    print(f"saved to {out}: a plain {type(model).__name__}")
    return 0
