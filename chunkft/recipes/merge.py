"""`chunkft merge`: an adapter and its base become one plain model.

The base is loaded in 16 bits whatever it was trained on: merging into 4-bit weights would round the
adapter away with them. Merged weights are rounded once, to the base's dtype.
"""

import argparse
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import AutoModelForSequenceClassification

from chunkft.errors import InputError, as_input_error, one_line
from chunkft.models.load import load_model
from chunkft.train import checkpoints


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit code 0.

    Raises:
        InputError: no adapter there, one that cannot merge, or a base that is not there.
    """
    adapter, out = Path(options.adapter).expanduser(), Path(options.out).expanduser()
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter} holds no adapter_config.json; give the folder of an adapter")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{adapter}: {one_line(error)}") from error
    if isinstance(config, PromptLearningConfig):
        raise InputError(
            f"{adapter} holds virtual tokens ({config.peft_type}): they stand in front of the text "
            f"and are no change of any weight; load base and adapter with PeftModel instead"
        )
    name = options.base or config.base_model_name_or_path
    if not name:
        raise InputError(f"{adapter} does not name its base; give --base MODEL")
    checkpoints.prepare_output(out, None, resuming=False)
    scores = config.task_type == "SEQ_CLS"  # a reward model, whose head is in the adapter
    kind: dict[str, Any] = {"auto": AutoModelForSequenceClassification, "num_labels": 1}
    try:
        model, tokenizer = load_model(name, dtype=options.dtype, **(kind if scores else {}))
    except InputError as error:
        raise InputError(f"base of {adapter}: {error}; or give --base MODEL") from error
    with as_input_error(f"merging {adapter} into {name}"):
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
        merged.config.use_cache = True
        merged.save_pretrained(out)
        tokenizer.save_pretrained(out)
    print(f"{name} with {adapter} ({config.peft_type}), {model.dtype}, in {out}")
    return 0
