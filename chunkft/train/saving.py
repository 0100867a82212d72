"""Checkpoints in constant memory: the parts of Trainer that write and read them, on streams.

Weights go out tensor by tensor (weights.py), optimizer state chunk by chunk (state_files.py); what
is small stays Trainer's. A checkpoint counts from its manifest on (checkpoints.py), so one that is
cut short, by a kill or a full disk, costs nothing but itself.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.train import checkpoints, processes, sharding, state_files, weights
from chunkft.train.adalora import all_ranks

ENCODER = "prompt_encoder.pt"


class StreamingTrainer(Trainer):
    """Goes before another Trainer among the bases of a class."""

    _in_checkpoint = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        run = Path(str(self.args.output_dir))
        with checkpoints.room(run, "the model", self._model_bytes()):
            super().save_model(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(str(self.args.output_dir))
        folder = run / f"checkpoint-{self.state.global_step}"
        if processes.is_main():
            checkpoints.remove(folder)  # what a kill left there would be sealed with the rest
        processes.wait()
        needed = self._model_bytes()
        optimizer = self._chunked_optimizer()
        if optimizer is not None and not self.args.save_only_model:
            needed += state_files.nbytes(optimizer)
        with checkpoints.room(run, folder.name, needed, torn=folder):
            self._in_checkpoint = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._in_checkpoint = False

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        model = self._stock_model()
        if sharding.sharded(model):
            self._save_shards(model, Path(str(output_dir or self.args.output_dir)))
            return
        if not self.args.should_save:
            return
        if state_dict is not None or not weights.streamable(model):
            # one to go on from has the ranks that AdaLoRA has set to zero, too
            with all_ranks(model) if self._in_checkpoint else nullcontext():
                super()._save(output_dir, state_dict)
            # and what makes virtual tokens: PEFT saves the tokens
            encoder = getattr(model, "prompt_encoder", None)
            if self._in_checkpoint and encoder is not None:
                torch.save(encoder.state_dict(), Path(str(output_dir)) / ENCODER)
            return
        super()._save(output_dir, state_dict={})  # all but the weights
        folder = Path(str(output_dir or self.args.output_dir))
        weights.write(model, folder, original=not self._in_checkpoint)

    def _save_shards(self, model: nn.Module, folder: Path) -> None:
        """Each rank what it holds; an adapter, which is small, in PEFT's own way too."""
        folder.mkdir(parents=True, exist_ok=True)
        adapter = sharding.gathered(model) if isinstance(model, PeftModel) else {}
        if self.args.should_save:
            super()._save(str(folder), state_dict=adapter)
            if not adapter:
                for path in folder.glob("model*.safetensors*"):  # without a tensor in it
                    path.unlink()
        if self._in_checkpoint or not adapter:
            sharding.save(model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stock = self._stock_model() if model is None else model
        found = Path(resume_from_checkpoint)
        if sharding.sharded(stock) or sharding.is_sharded_save(found):
            sharding.load(stock, found)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / ENCODER
        if path.is_file():
            kept = torch.load(path, map_location="cpu", weights_only=True)
            cast("Any", self._stock_model()).prompt_encoder.load_state_dict(kept)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self._chunked_optimizer()
        if optimizer is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder, scheduler = Path(output_dir), cast("Any", self.lr_scheduler)
        if self.args.should_save or sharding.sharded(self._stock_model()):
            folder.mkdir(parents=True, exist_ok=True)
            state_files.save(optimizer, folder / state_files.FOLDER)
        if not self.args.should_save:
            return
        torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = self._chunked_optimizer()
        folder = Path(checkpoint or "")
        if checkpoint is None or optimizer is None or not (folder / state_files.FOLDER).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)  # optimizer.pt, as it once was
            return
        optimizer.load_state_dict(state_files.load(folder / state_files.FOLDER))
        scheduler = cast("Any", self.lr_scheduler)
        scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _model_bytes(self) -> int:
        """That this rank will write."""
        model = self._stock_model()
        return sharding.nbytes(model) if sharding.sharded(model) else weights.nbytes(model)

    def _stock_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _chunked_optimizer(self) -> ChunkedOptimizer | None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return optimizer if isinstance(optimizer, ChunkedOptimizer) else None
