"""Direct preference optimization (arXiv 2305.18290): TRL's DPOTrainer on chunks, or an adapter.

The loss compares the model with what it was, the reference. Where the reference's numbers are from:

    an adapter             the same model with the adapter off, proven to be the base at the start
    chunk, exact, full     computed before the first step, so that one model is there and not two
    --reference copy       a frozen copy, streamed where the weights are (--stream_weights)

TRL would read the reference anew from the model's name, which is another model if this one was
edited since. At the first step policy and reference are the same, so the loss is ln 2 and the
rewards are 0; a run that begins otherwise is stopped.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import DPOTrainer

from chunkft.core.ranks import world_size
from chunkft.errors import InputError, ReferenceMismatchError, as_input_error
from chunkft.models.adapters import METHODS
from chunkft.models.losses import install_head
from chunkft.recipes import methods
from chunkft.recipes.job import Job
from chunkft.recipes.loading import computed_in, load, settle, stream_if_need_be
from chunkft.recipes.records import SAMPLE, Data, check_prompts, load_data
from chunkft.recipes.run import check, drive, prepare
from chunkft.train.trainer import ChunkTrainer

# |log-ratio| a token at the first step: other batches round otherwise (LOG.md)
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class ChunkDPOTrainer(ChunkTrainer, DPOTrainer):
    """TRL's trainer on chunks; stops a run whose reference is not what the policy begins as."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if self.run is not None and self.state.global_step == 0 and _base(model).training:
            self._check_reference(inputs)
        return found

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """TRL's, through the head that training uses: it rounds as that does."""
        undo = install_head(_base(self.ref_model or self.model))
        try:
            return super().compute_ref_log_probs(model, inputs)
        finally:
            undo()

    def _check_reference(self, inputs: Any) -> None:
        config = getattr(self.model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            return  # its tokens are new text before anything is trained
        seen = self._metrics["train"]
        worst = max(abs(seen[f"rewards/{side}"][-1]) / self.beta for side in ("chosen", "rejected"))
        tokens = inputs["completion_mask"].sum() / len(inputs["completion_mask"])
        bound = ROUNDING.get(computed_in(self), ROUNDING[torch.float32]) * tokens.item() ** 0.5
        if worst > bound:
            raise ReferenceMismatchError(
                f"before the first step policy and reference differ by {worst:.3g} in the "
                f"log-probability of an answer (bound {bound:.2g}): the reference is another model "
                f"than the one that is trained; use --reference copy"
            )


def run(job: Job) -> int:
    """Do the job; returns the exit code, as `run.drive`.

    Raises:
        ChunkFTError: whatever is wrong with the input or the run, in one line.
    """
    check(job)
    args = job.training
    if args.use_liger_kernel and job.chunk.method in ("chunk", "exact"):
        raise InputError(f"--use_liger_kernel with --method {job.chunk.method}; leave it out")
    found = prepare(args.resume_from_checkpoint, Path(str(args.output_dir)))
    with as_input_error("loading"), args.main_process_first(desc="loading"):
        data = load_data(job, "preference")
        model, tokenizer = load(job)
        reference = _reference(job, model)
        stream_if_need_be(job, model)
        check_prompts(data.train, tokenizer, args.max_length)
    with as_input_error("building the trainer"):
        trainer = _build_trainer(job, data, model, reference, tokenizer)
    return drive(job, trainer, model, data, found, more=True)


def _reference(job: Job, model: PreTrainedModel) -> PreTrainedModel | None:
    """A frozen copy, or None where the reference's numbers come from elsewhere."""
    args, adapter = job.training, job.chunk.method in METHODS
    if args.sync_ref_model and job.chunk.stream_weights:
        raise InputError("--sync_ref_model with --stream_weights: leave one of them out")
    given = "precompute_ref_log_probs" in job.given
    wanted = job.chunk.reference == "copy" or args.sync_ref_model
    if world_size() > 1 and not adapter:
        # what is computed before training TRL keeps in a file that rank 0 alone has
        if args.precompute_ref_log_probs:
            raise InputError(
                "--precompute_ref_log_probs with several processes: its numbers stay with the "
                "first one; leave it out, a copy of the model is the reference then"
            )
        wanted = True
    if not adapter and given and not args.precompute_ref_log_probs:
        wanted = True
    if not wanted:
        args.precompute_ref_log_probs |= not adapter
        return None
    if given and args.precompute_ref_log_probs:
        raise InputError(
            "--precompute_ref_log_probs with --reference copy or --sync_ref_model: what is "
            "computed before training needs no copy; leave one of them out"
        )
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    stream_if_need_be(job, reference, copies=2)
    return reference


def _build_trainer(
    job: Job, data: Data, model: PreTrainedModel, reference: PreTrainedModel | None, tokenizer: Any
) -> ChunkDPOTrainer:
    args = job.training
    held_out = data.held_out
    if held_out is None:  # judged before and after, and its reference numbers are made here
        held_out = data.train.select(range(min(SAMPLE, len(data.train))))
    adapter = methods.adapter_of(job, model)
    probe = methods.probe(job, model) if adapter and reference is None else None
    trainer = ChunkDPOTrainer(
        model=model,
        ref_model=reference,
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
        install_head(reference)
    return trainer


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
