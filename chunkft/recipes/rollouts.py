"""Reinforcement learning on completions that the model writes: what GRPO and RLOO have in common.

    prompts -> completions, sampled from the weights as they are -> rewards (data/rewards.py)
            -> advantages and loss (TRL's trainer) -> one chunk's step

The schedule of chunks counts optimizer steps, however many of them a batch of completions serves.
With --beta above 0 the policy is kept near a reference: the adapter switched off (proven to be the
base), else a frozen copy, streamed where the weights are. TRL would read that copy anew from the
model's name.
"""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head

from chunkft.data.rewards import guarded, named_reward, task_reward
from chunkft.errors import InputError, ReferenceMismatchError, as_input_error
from chunkft.models.adapters import METHODS
from chunkft.models.losses import install_head
from chunkft.recipes import methods
from chunkft.recipes.job import Job
from chunkft.recipes.loading import computed_in, load, settle, stream_if_need_be
from chunkft.recipes.records import Data, load_data
from chunkft.recipes.run import check, drive, prepare
from chunkft.train.trainer import ChunkTrainer

JUDGED = 16  # prompts, where no task scores the model's answers
# Mean KL at the first step: two passes of the same weights round alike but for batching, and for
# where FSDP puts what it gathers. GRPO's is a token's, quadratic in its log-ratio; RLOO's is linear
# and an answer's, whose tokens round either way: its bound grows with their root.
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-2}
SUMMED = 3e-6  # a token's at least, in RLOO's


class RolloutTrainer(ChunkTrainer):
    """Goes before TRL's trainer; stops a run whose reference is not what the policy begins as."""

    kl_is_summed = False
    """Over the tokens of an answer; else their mean."""
    beta: float
    temperature: float
    ref_model: Any

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        first = self.run is not None and self.state.global_step == 0
        kl = self._metrics["train"].get("kl") if first and self.beta else None
        config = getattr(self.model, "active_peft_config", None)
        if kl and not getattr(config, "is_prompt_learning", False):
            bound = ROUNDING.get(computed_in(self), ROUNDING[torch.float32])
            if self.kl_is_summed:
                bound = max(bound, SUMMED) * inputs["completion_mask"].shape[1] ** 0.5
            if not abs(kl[0]) <= bound:
                raise ReferenceMismatchError(
                    f"before the first step the KL from the reference is {kl[0]:.3g}, not 0 (bound "
                    f"{bound:g}): the reference is another model than the one that is trained; use "
                    f"--reference copy"
                )
        return found


def run(job: Job, trainer_class: Callable[..., RolloutTrainer]) -> int:
    """Do the job; returns the exit code, as `run.drive`.

    Args:
        trainer_class: a RolloutTrainer before one of TRL's.

    Raises:
        ChunkFTError: whatever is wrong with the input or the run, in one line.
    """
    check(job)
    args = job.training
    found = prepare(args.resume_from_checkpoint, Path(str(args.output_dir)))
    with as_input_error("loading"), args.main_process_first(desc="loading"):
        data = load_data(job, "prompt")
        rewards = _rewards(job, data)
        model, tokenizer = load(job)
        reference = _reference(job, model)
        stream_if_need_be(job, model)
    with as_input_error("building the trainer"):
        trainer = _build_trainer(job, trainer_class, data, rewards, model, reference, tokenizer)
    return drive(job, trainer, model, data, found, temperature=trainer.temperature)


def _rewards(job: Job, data: Data) -> list[Any]:
    names, seconds = job.script.reward_funcs or [], job.chunk.reward_timeout
    names = [names] if isinstance(names, str) else names  # one in a YAML file
    if job.script.reward_funcs and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as TRL's own command
    found: list[Any] = [guarded(named_reward(name), seconds) for name in names]
    if job.script.reward_model_name_or_path:  # first, as TRL has it: --reward_weights go by place
        found.insert(0, job.script.reward_model_name_or_path)
    if not found and data.task is not None:
        found.append(guarded(task_reward(data.task), seconds))
    if not found:
        raise InputError(
            "no reward: give --reward_funcs a function (package.module.function), "
            "--reward_model_name_or_path a model, or --dataset_name reasoning-gym:<task>"
        )
    return found


def _reference(job: Job, model: PreTrainedModel) -> PreTrainedModel | None:
    """A frozen copy, or None where there is no KL or the adapter can be switched off."""
    args, adapter = job.training, job.chunk.method in METHODS
    if getattr(args, "entropy_coef", 0.0) or getattr(args, "use_adaptive_entropy", False):
        raise InputError(
            "--entropy_coef and --use_adaptive_entropy: the tiled head gives entropy no gradient, "
            "so they would change the loss and no weight; leave them out"
        )
    if args.beta == 0.0:
        if job.chunk.reference == "copy":
            raise InputError("--reference copy with --beta 0: there is nothing to compare with it")
        return None
    if adapter and job.chunk.reference == "auto":
        return None
    if args.sync_ref_model and job.chunk.stream_weights:
        raise InputError("--sync_ref_model with --stream_weights: leave one of them out")
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    stream_if_need_be(job, reference, copies=2)
    return reference


def _build_trainer(
    job: Job,
    trainer_class: Callable[..., RolloutTrainer],
    data: Data,
    rewards: list[Any],
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: Any,
) -> RolloutTrainer:
    args = job.training
    held_out = data.held_out
    if held_out is None:
        held_out = data.train.select(range(min(JUDGED, len(data.train))))
    if data.task is not None:  # judged by the answers it writes, greedily
        assert data.items is not None
        held_out = None
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
            held_out = data.items.remove_columns("completion")
    if "per_device_eval_batch_size" not in job.given:  # whole groups, whatever evaluates them
        groups = args.num_generations_eval or args.num_generations
        args.per_device_eval_batch_size = -(-args.per_device_eval_batch_size // groups) * groups
    adapter = methods.adapter_of(job, model)
    probe = methods.probe(job, model) if adapter and reference is None and args.beta else None
    beta, sync = args.beta, args.sync_ref_model
    if reference is not None:
        args.beta, args.sync_ref_model = 0.0, False  # or TRL would read a model by its name
    trainer = trainer_class(
        model=model,
        reward_funcs=rewards,
        args=args,
        train_dataset=data.train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    settle(job, trainer)
    if probe is not None:
        methods.check_off(job, trainer.model, probe)
    if reference is not None:
        args.beta, args.sync_ref_model, trainer.beta = beta, sync, beta
        add_fused_lm_head(reference, temperature=trainer.temperature)
        trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
        install_head(reference, trainer.temperature)
        if sync:
            trainer.add_callback(SyncRefModelCallback(reference, trainer.accelerator))
    return trainer
