"""AdaLoRA in a trainer (arXiv 2303.10512): its budget, its regularizer, its checkpoints.

PEFT leaves three things to the loop around it:

1. `update_and_allocate` after every step, while the step's gradients are there. A ChunkedOptimizer
   moves gradients off the weights before its step, so they are put back for the call.
2. The penalty  w / n  sum ||P^T P - I||_F  over the n factors P and Q. PEFT adds it to
   `output.loss`, which TRL's trainers do not read: they make their loss of log-probabilities.
3. The importance of every element so far, which no checkpoint of PEFT holds; and once ranks are
   settled it saves the ones that are left, which do not fit the model that goes on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from chunkft.errors import CheckpointError, InputError

FILE = "adalora.pt"
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
# shares of a run, where nobody gave steps: before the first rank goes, and after the last has gone
WARM_UP, SETTLED, REALLOCATIONS = 0.1, 0.3, 100


def config_of(model: Any) -> AdaLoraConfig | None:
    """The active adapter's configuration if it is AdaLoRA's."""
    config = getattr(model, "active_peft_config", None) if isinstance(model, PeftModel) else None
    return config if isinstance(config, AdaLoraConfig) else None


def plan_ranks(config: AdaLoraConfig, steps: int, given: set[str]) -> None:
    """Spread the loss of ranks over a run of `steps` optimizer steps.

    Args:
        given: settings of `config` that somebody gave.

    Raises:
        InputError: they leave no step in which ranks could go.
    """
    if "tinit" not in given:
        config.tinit = int(WARM_UP * steps)
    if "tfinal" not in given:
        config.tfinal = int(SETTLED * steps)
    if "deltaT" not in given:
        config.deltaT = max(1, steps // REALLOCATIONS)
    if config.tinit >= steps - config.tfinal:
        raise InputError(
            f"adalora: tinit {config.tinit} and tfinal {config.tfinal} leave none of {steps} steps "
            f"for ranks to go; lower one of them in --adapter_kwargs, or train longer"
        )
    config.total_step = steps


def penalty(model: PeftModel, config: AdaLoraConfig) -> Tensor:
    """The penalty of skewed factors, a scalar (paper, equation 4)."""
    found: list[Tensor] = []
    for name, factor in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = factor @ factor.T if "lora_A" in name else factor.T @ factor
            eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
            found.append(torch.linalg.norm(square - eye))
    return config.orth_reg_weight * torch.stack(found).mean()


@contextmanager
def all_ranks(model: Any) -> Iterator[None]:
    """What PEFT saves within has every rank, those at zero too."""
    config = config_of(model)
    if config is None:
        yield
        return
    kept, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = kept


class AdaLoraTrainer(Trainer):
    """Goes before another Trainer among the bases of a class; of other adapters it changes none."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        stock = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        config = config_of(stock)
        if config is None or not stock.training:
            return found
        more = penalty(stock, config)
        # where Trainer leaves the division by micro-batches to the loss
        divided = getattr(self, "loss_is_scaled_for_ga", None)
        if divided or (divided is None and kwargs.get("num_items_in_batch") is not None):
            more = more / self.current_gradient_accumulation_steps
        if isinstance(found, tuple):
            return found[0] + more, *found[1:]
        return found + more


class AdaLoraCallback(TrainerCallback):
    """Takes ranks away step by step, and keeps what that needs in checkpoints.

    Args:
        run: the output directory.
        resumed: the checkpoint that training goes on from.
    """

    def __init__(self, model: PeftModel, run: Path, resumed: Path | None):
        self.model, self.run, self.resumed = model, run, resumed
        self.tuner: Any = model.base_model
        self._gradients: dict[int, Tensor] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.resumed is None:
            return
        path = self.resumed / FILE
        if not path.is_file():
            raise CheckpointError(f"{self.resumed} has no {FILE}: it is no checkpoint of adalora")
        kept = torch.load(path, map_location="cpu", weights_only=True)
        device = next(self.model.parameters()).device
        for name in AVERAGES:
            moved = {key: value.to(device) for key, value in kept[name].items()}
            setattr(self.tuner.rankallocator, name, moved)
        self._config.rank_pattern = kept["rank_pattern"]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        groups = more["optimizer"].param_groups
        leaves = [leaf for group in groups for leaf in group["params"]]
        # a leaf shares its weight's storage
        self._gradients = {x.data_ptr(): x.grad for x in leaves if x.grad is not None}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = self._gradients.get(parameter.data_ptr())
        self._gradients = {}
        try:
            self.tuner.update_and_allocate(state.global_step + 1)
        finally:
            for parameter in trained:
                parameter.grad = None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        allocator = self.tuner.rankallocator
        kept = {name: getattr(allocator, name) for name in AVERAGES}
        kept["rank_pattern"] = self._config.rank_pattern
        torch.save(kept, self.run / f"checkpoint-{state.global_step}" / FILE)

    @property
    def _config(self) -> AdaLoraConfig:
        config = config_of(self.model)
        assert config is not None
        return config
