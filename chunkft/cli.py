"""`chunkft <command>`: the command line, and the only reader of the environment.

The recipes take every flag and YAML key that TRL's commands of the same name take, through TRL's
own parser, and ours beside them. Errors that are the user's end in one line and exit code 2; with
CHUNKFT_TRACEBACK=1 in the environment they show where they were raised.
"""

import argparse
import importlib
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

from chunkft import __version__
from chunkft.errors import FOREIGN, ChunkFTError, InputError, one_line

HELP = """\
chunkft: full-parameter fine-tuning in the memory of an adapter

  chunkft sft    fine-tune all parameters of a language model on your records, or an adapter
  chunkft dpo    train it to prefer one answer to another
  chunkft grpo   reinforcement learning on its own answers; chunkft rloo the same by REINFORCE
  chunkft reward train a model to score answers
  chunkft plan   what that takes, and the settings that fit a memory; needs no weights, no GPU
  chunkft merge  an adapter and its base become one plain model
  chunkft consolidate  what several processes have saved becomes one plain model
  chunkft demo   see it work: SmolLM2-135M learns a task in a few minutes on a CPU

  chunkft <command> --help   what it takes
  chunkft --version
"""

RECIPE_HELP = """\
usage: chunkft {command} --dataset_name DATA [--model_name_or_path MODEL] [--output_dir DIR] [...]

{purpose}
Takes every flag and YAML key (--config FILE) of `trl {command}`; these matter most:

  --dataset_name DATA        .jsonl .json .csv .parquet, a folder, a hub id, or
                             reasoning-gym:<task>[?setting=value&...]
                             records: {records}
  --model_name_or_path MODEL local path, hub id, .gguf file, or smollm2-135m (default)
  --output_dir DIR           an empty directory for checkpoints, model and report
  --learning_rate LR         default: TRL's * sqrt(chunks), twice that in spread; of an adapter
                             its own
{flags}
  --max_steps N | --num_train_epochs N
  --per_device_train_batch_size N   --gradient_accumulation_steps N
  --dtype bfloat16|float16|float32
  --optim NAME --weight_decay X --max_grad_norm X --lr_scheduler_type NAME --warmup_steps N
  --eval_strategy steps --eval_steps N      --report_to tensorboard
  --save_steps N --save_total_limit N
  --resume_from_checkpoint last|DIR         go on after a stop or a crash, to the bit

Ours:
{ours}
  --help-all                 every flag, TRL's included

CHUNKFT_TRACEBACK=1 chunkft {command} ... shows where an error was raised.
Ctrl-C saves a checkpoint, prints the line that resumes, and exits.
TRL's usage ping is switched off (HF_HUB_DISABLE_TELEMETRY=1).
"""


class Recipe(NamedTuple):
    """A command on one of TRL's trainers."""

    config: str
    """TRL's class of its settings."""
    purpose: str
    records: str
    flags: str
    """Lines of help on settings that only it has."""


_ROLLOUTS = """\
  --reward_funcs NAME ...    package.module.function, or TRL's; a reasoning-gym task has its own
  --reward_model_name_or_path MODEL
  --num_generations N        --max_completion_length TOKENS   --temperature X
  --beta X                   of the KL from the reference (0: none)"""

RECIPES = {
    "sft": Recipe(
        "SFTConfig",
        "Fine-tune all parameters of a language model, one chunk of them at a time; or, with\n"
        "--method lora and the like, an adapter.",
        "messages | prompt + completion | text",
        "  --max_length TOKENS        --packing (isolation of packed records is checked)",
    ),
    "dpo": Recipe(
        "DPOConfig",
        "Train a language model to prefer one answer to another (direct preference optimization),\n"
        "all of its parameters chunk by chunk, or an adapter.",
        "prompt + chosen + rejected",
        "  --beta X                   --loss_type sigmoid|ipo|...   --max_length TOKENS\n"
        "  --precompute_ref_log_probs the reference's numbers before training (default for chunks)",
    ),
    "grpo": Recipe(
        "GRPOConfig",
        "Reinforcement learning: the model's own answers, compared within groups by a reward; all\n"
        "parameters chunk by chunk, or an adapter.",
        "prompt, and whatever the reward reads",
        _ROLLOUTS,
    ),
    "rloo": Recipe(
        "RLOOConfig",
        "Reinforcement learning: the model's own answers, each against the mean reward of the\n"
        "others; all parameters chunk by chunk, or an adapter.",
        "prompt, and whatever the reward reads",
        _ROLLOUTS,
    ),
    "reward": Recipe(
        "RewardConfig",
        "Train a model to score answers, from preferences between them.",
        "prompt + chosen + rejected",
        "  --max_length TOKENS        --center_rewards_coefficient X",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(f"chunkft {__version__}")
        return 0
    rank = int(os.environ.get("RANK", "0"))  # of torchrun and accelerate launch
    commands = {name: partial(_recipe, name) for name in RECIPES}
    commands |= {"plan": _plan, "merge": _merge, "consolidate": _consolidate, "demo": _demo}
    try:
        if command not in commands:
            raise InputError(f"unknown command {command!r}; use one of {', '.join(commands)}")
        # before transformers is imported; TRL reports each trainer that is built otherwise
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _quiet()
        if not rank:
            return commands[command](words[1:])
        warnings.simplefilter("ignore")  # all ranks of a run tell the same
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return commands[command](words[1:])
    except KeyboardInterrupt:
        print("chunkft: stopped; what was saved before is whole", file=sys.stderr)
        return 130
    except ChunkFTError as e:
        if os.environ.get("CHUNKFT_TRACEBACK"):
            raise
        where = f" on rank {rank}" if "RANK" in os.environ else ""
        print(f"chunkft: error{where}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


def _quiet() -> None:
    """Silence messages that no user of this command can do anything about."""
    # an optional kernel for 4-bit weights on CPUs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # TRL's own default, and PEFT, still have the old name
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)


def _recipe(command: str, words: list[str]) -> int:
    recipe = RECIPES[command]
    if {"-h", "--help"} & set(words):
        shown = {"command": command, "ours": _own_flags(), **recipe._asdict()}
        print(RECIPE_HELP.format(**shown), end="")
        return 0
    if "--help-all" in words:
        _recipe_parser(command).print_help()
        return 0
    job = parse_job(command, words)
    return importlib.import_module(f"chunkft.recipes.{command}").run(job)


def _plan(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="chunkft plan",
        description="What fine-tuning MODEL takes, by kind, and settings that fit. Steps are run "
        "on tensors without memory, so neither weights nor a GPU are needed. Exit code 2: it does "
        "not fit.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or llama-2-7b, ...")
    parser.add_argument("--memory", help="for tensors on the device: 24GiB, 80GB")
    parser.add_argument(
        "--gpus", help="a card by name, or several: rtx-4090, 2xH800; `none` is this computer"
    )
    parser.add_argument(
        "--shard",
        choices=["auto", "fsdp", "ddp"],
        default="auto",
        help="of several cards: each has a share of every weight, or all; auto: all if they fit",
    )
    parser.add_argument("--seq", type=int, help="tokens of a row [1024, or the data's longest]")
    parser.add_argument(
        "--dataset-name",
        "--dataset_name",
        metavar="DATA",
        help="records as of `chunkft sft`: says what padding them costs",
    )
    parser.add_argument("--batch", type=int, default=1, help="rows [1]")
    parser.add_argument("--accumulation", type=int, default=1, help="batches of a step [1]")
    parser.add_argument("--host-memory", help="bound on host memory")
    parser.add_argument("--disk", help="bound on disk space")
    parser.add_argument("--method", choices=["chunk", "exact", "full"], default="chunk")
    parser.add_argument("--chunks", type=int, help="K; left open, the least that fits, from 8")
    parser.add_argument("--interval", type=int, default=1, help="T, steps of a visit [1]")
    parser.add_argument(
        "--layout", choices=["spread", "stream"], help="of chunks [spread; stream beside fsdp]"
    )
    parser.add_argument("--store", default="host", help="host, device, or a directory [host]")
    parser.add_argument(
        "--stream-weights",
        action="store_true",
        help="weights visit the device layer by layer; chosen too where nothing fits without",
    )
    parser.add_argument(
        "--state-bits", type=int, choices=[32, 8], default=32, help="of resting moments [32]"
    )
    parser.add_argument(
        "--state-block",
        type=int,
        help="elements: state visits the device in the step only, so many at a time",
    )
    parser.add_argument(
        "--resident-layers", type=int, default=0, help="that stay beside streamed weights [0]"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--recipe",
        choices=["rlhf-24gb"],
        help="of chunkft grpo and rloo: the plans of its variants side by side, for --seq tokens "
        "of prompt and answer [256]",
    )
    parser.add_argument("--json", action="store_true", help="print the plan for programs")
    options = parser.parse_args(words)
    if options.recipe:
        heard = {"model", "memory", "gpus", "seq", "host_memory", "disk", "json", "recipe"}
        idle = [
            k for k, v in vars(options).items() if k not in heard and v != parser.get_default(k)
        ]
        if idle:
            told = ", ".join("--" + name.replace("_", "-") for name in idle)
            raise InputError(
                f"{told} beside --recipe {options.recipe}, which has its own: leave out"
            )
    from chunkft.recipes import planning

    return planning.run(options)


def _merge(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="chunkft merge",
        description="Load the base of ADAPTER in 16 bits, merge, and save a plain model to OUT. "
        "Virtual tokens (prefix, prompt, ptuning) cannot be merged.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="the folder that a run has saved")
    parser.add_argument("out", metavar="OUT", help="an empty folder")
    parser.add_argument("--base", metavar="MODEL", help="in the place of the one it was trained on")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32", "auto"], default="bfloat16"
    )
    options = parser.parse_args(words)
    from chunkft.recipes import merge

    return merge.run(options)


def _consolidate(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="chunkft consolidate",
        description="Write the weights that a run with --shard fsdp has saved in DIR, rank by "
        "rank, as a plain model to OUT. A few tensors are in memory at a time.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="a run's folder, or a checkpoint of it")
    parser.add_argument("out", metavar="OUT", help="an empty folder")
    options = parser.parse_args(words)
    from chunkft.recipes import consolidate

    return consolidate.run(options)


def _demo(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="chunkft demo",
        description="Fine-tune all 134,515,008 parameters of SmolLM2-135M-Instruct on a "
        "reasoning-gym task, on this machine, and compare with dense AdamW's first steps.",
    )
    parser.add_argument("--output_dir", default="runs/demo", help="replaced at each call")
    parser.add_argument("--max_steps", type=int, default=None, help="training steps")
    from chunkft.recipes import demo

    options = parser.parse_args(words)
    return demo.run(options.output_dir, options.max_steps)


def parse_job(command: str, words: Sequence[str]) -> Any:
    """A `recipes.job.Job` from the words after `chunkft <command>`.

    Raises:
        InputError: an unknown or malformed flag, or a config file that cannot be read.
    """
    words = [part for word in words for part in _normal(word)]
    # a bare flag goes on with the newest checkpoint
    for i, word in enumerate(words):
        bare = i + 1 == len(words) or words[i + 1].startswith("--")
        if word == "--resume_from_checkpoint" and bare:
            words.insert(i + 1, "last")
            break
    job = _parsed(command, words)
    if job.chunk.recipe is not None:
        from chunkft.recipes import presets

        job = _parsed(command, presets.words(job, command) + words)
    return job


def _parsed(command: str, words: list[str]) -> Any:
    import yaml

    from chunkft.recipes.job import Job

    parser = _recipe_parser(command)
    try:
        given = _given(words)
        if "output_dir" not in given:
            words = [*words, "--output_dir", f"runs/{command}"]
        if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
            given.add("bf16")  # `accelerate launch --mixed_precision`
        script, training, model, mixture, chunk = parser.parse_args_and_config(
            words, fail_with_unknown_args=True
        )
    except ChunkFTError:
        raise
    except (*FOREIGN, argparse.ArgumentError, yaml.YAMLError) as e:
        unknown = re.search(r"not used by the HfArgumentParser: (\[.*\])", str(e))
        if unknown:
            raise InputError(f"unknown flags {unknown[1]}; --help-all lists those known") from e
        raise InputError(f"chunkft {command}: {one_line(e)}") from e
    return Job(
        script, training, model, mixture, chunk, given, shlex.join(["chunkft", command, *words])
    )


def _normal(word: str) -> list[str]:
    """Flags by one spelling: `--max-steps` is --max_steps, and `--config=FILE` two words to TRL."""
    if not word.startswith("--"):
        return [word]
    name, equals, value = word[2:].partition("=")
    name = "--" + name.replace("-", "_")
    return [name, value] if name == "--config" and equals else [name + equals + value]


def _recipe_parser(command: str) -> Any:
    import torch
    import trl
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
    from trl.scripts.grpo import GRPOScriptArguments

    from chunkft.train.config import ChunkArguments

    @dataclass
    class Model(ModelConfig):
        dtype: str | None = field(
            default="bfloat16",
            metadata={
                "help": "Of the weights (TRL's default is float32). 16-bit ones train through an "
                "exact fp32 master of the active chunk.",
                "choices": ["auto", "bfloat16", "float16", "float32"],
            },
        )

    config = getattr(trl, RECIPES[command].config)
    script = GRPOScriptArguments if command in ("grpo", "rloo") else ScriptArguments
    parser = TrlParser(
        (script, config, Model, DatasetMixtureConfig, ChunkArguments),  # pyright: ignore[reportArgumentType]
        prog=f"chunkft {command}",
        add_help=False,
        allow_abbrev=False,
    )
    parser.exit_on_error = False
    # TRL asks for bf16 and then refuses a machine without accelerator unless told so
    parser.set_defaults_with_config(use_cpu=not torch.accelerator.is_available())
    return parser


def _given(words: Sequence[str]) -> set[str]:
    """Names of the settings on the command line and in the config file.

    Raises:
        InputError: a config file without a name, or of something else than settings.
    """
    import yaml

    names = {w[2:].split("=")[0].replace("-", "_") for w in words if w.startswith("--")}
    if "config" in names:
        following = list(words)[list(words).index("--config") + 1 :]
        if not following or following[0].startswith("--"):
            raise InputError("--config needs the path of a YAML file")
        with open(following[0]) as f:
            settings = yaml.safe_load(f) or {}
        if not isinstance(settings, dict):
            raise InputError(f"--config {following[0]}: needs lines of `name: value`")
        names |= set(settings)
    return names


def _own_flags() -> str:
    from chunkft.train.config import ChunkArguments

    lines = []
    for setting in fields(ChunkArguments):
        text = setting.metadata["help"].replace("%%", "%")  # as argparse wants it
        default = "" if setting.default is None else f" [{setting.default}]"
        lines.append(f"  --{setting.name:<24} {text}{default}")
    return "\n".join(lines)
