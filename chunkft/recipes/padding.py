"""What padding would cost on the data at hand, for `chunkft plan --dataset-name`."""

import argparse
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkft.data.lengths import Padding, padding
from chunkft.data.sources import load_records
from chunkft.errors import FOREIGN, InputError, as_input_error
from chunkft.models.gguf import EMBEDDED
from chunkft.models.load import resolve_model
from chunkft.models.shapes import config_of
from chunkft.recipes.records import tokens_of

SAMPLED = 2000  # records whose lengths are looked at


def measure(options: argparse.Namespace, bound: int) -> Padding:
    """Of a sample of the data, by the model's tokenizer where there is one.

    Args:
        options: of `chunkft plan`.
        bound: tokens that a record may have.

    Raises:
        InputError: no such data.
    """
    config = config_of(options.model).get_text_config()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model(options.model))
    except (*FOREIGN, InputError):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(EMBEDDED))
        told = f"lengths are by the tokenizer of {EMBEDDED}: {options.model} is only a shape here"
        print(told, file=sys.stderr)
    with as_input_error(f"reading {options.dataset_name}"):
        records: Any = load_records(options.dataset_name, size=SAMPLED)
        lengths = [len(tokens_of(record, tokenizer)["input_ids"]) for record in records]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    weights = model.num_parameters() - (0 if tied else embedding.numel())
    attention = config.num_hidden_layers * config.hidden_size / weights
    return padding([min(n, bound) for n in lengths], options.batch, attention)


def as_text(rows: Padding, batch: int) -> str:
    return (
        f"data: {rows.records:,} records of {rows.mean:.0f} tokens on average, {rows.longest} at "
        f"most\n  padded in batches of {batch}, {rows.share:.0%} would be padding, at "
        f"{rows.flops:.2f} x the FLOPs of rows without (the default of chunkft sft)"
    )
