"""Drive a TRL trainer with ChunkedOptimizer: build it from the trainer's own arguments, show the
run, keep its checkpoints whole, stop on signals.

Class, keyword arguments and decay groups come from Trainer's own helpers, so `--optim`,
`--optim_args` and `--weight_decay` mean what they mean there. Clipping moves into the optimizer:
Trainer clips `model.parameters()`, which carry no gradient here.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.ranks import reshard
from chunkft.core.store import GIB, Store
from chunkft.errors import ChunkFTError, InputError, UnsupportedError
from chunkft.memory.budget import card_peaks
from chunkft.memory.eight_bit import EightBitMoments
from chunkft.train import checkpoints, processes, sharding
from chunkft.train.adalora import AdaLoraTrainer
from chunkft.train.config import ChunkArguments, Rotation, choose_moments, refuse_optimizer
from chunkft.train.saving import StreamingTrainer

if sys.platform == "win32":
    import psutil  # comes with accelerate
else:
    import resource


class NonFiniteLossError(ChunkFTError, RuntimeError):
    """The loss is NaN or infinite; the last checkpoint is intact."""


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps that `trainer.train()` will take.

    Raises:
        InputError: none, because the records do not fill a batch.
    """
    batches = trainer.get_train_dataloader()
    steps = trainer.set_initial_training_values(trainer.args, batches)[-1]
    if not len(batches) or steps < 1:
        raise InputError(
            f"{len(batches.dataset)} records make {len(batches)} batches of "  # pyright: ignore[reportArgumentType]
            f"{trainer.args.train_batch_size} and {steps} steps: nothing would be trained; use a "
            f"smaller batch, more records or steps, or leave --dataloader_drop_last out"
        )
    return steps


def check_schedule(args: TrainingArguments, steps: int) -> None:
    """Build the learning rate's schedule once for nothing: it fails now or in Trainer's loop."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    kind, kwargs = args.lr_scheduler_type, args.lr_scheduler_kwargs
    get_scheduler(
        kind,
        optimizer,
        args.get_warmup_steps(steps),
        steps,
        kwargs if isinstance(kwargs, dict) else None,
    )


def build_optimizer(
    trainer: Trainer, settings: ChunkArguments, rotation: Rotation
) -> ChunkedOptimizer:
    """The optimizer that `trainer` would make, on chunks; clips in the trainer's place.

    Raises:
        InputError: an optimizer or engine that cannot be driven chunk by chunk; another FSDP.
        UnsupportedError: several devices in one process.
    """
    args, model = trainer.args, trainer.model
    assert isinstance(model, torch.nn.Module)
    optim = str(getattr(args.optim, "value", args.optim))
    refuse_optimizer(optim, args.deepspeed)
    if args.fsdp or trainer.is_fsdp_enabled:  # after the optimizer is built; on a CPU, never
        raise InputError(
            "--fsdp, and FSDP in accelerate's configuration, shard weights behind the optimizer's "
            "back; leave them out and give --shard fsdp"
        )
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"{args.n_gpu} GPUs visible to one process, which would wrap the model in "
            f"nn.DataParallel: start one a GPU (torchrun --nproc-per-node {args.n_gpu} -m chunkft "
            f"...), or set CUDA_VISIBLE_DEVICES=0"
        )
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)  # pyright: ignore[reportArgumentType]
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise InputError(f"--optim {args.optim} is not a plain torch optimizer; use adamw_torch")
    reshard(model)  # or it would show gathered weights in the place of its own
    decayed = set(trainer.get_decay_parameter_names(model))
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trainable if n in decayed], "weight_decay": args.weight_decay},
        {"params": [p for n, p in trainable if n not in decayed], "weight_decay": 0.0},
    ]
    schedule: dict[str, Any] = {"exact": True}
    if settings.method != "exact":
        schedule = {
            "interval": rotation.interval,
            "layout": settings.layout,
            "order": settings.order,
            "moments": settings.moments or choose_moments(optim),
            "seed": args.seed,
        }
    optimizer = ChunkedOptimizer(
        model,
        cls,
        groups=groups,
        chunks=rotation.chunks,
        store=Store(
            settings.store,
            EightBitMoments() if settings.state_bits == 8 else None,
            settings.state_block if settings.method == "chunk" else None,
        ),
        max_grad_norm=args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None,
        **schedule,
        **kwargs,
    )
    args.max_grad_norm = 0.0
    trainer.optimizer = optimizer
    return optimizer


def peak_memory_gib() -> float:
    """Peak of the device's allocations, or of the whole process on a CPU, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def memory_line(peaks: Mapping[str, int], peak_gib: float) -> str:
    """One line of memory, in GiB: the bytes of `card_peaks`, or on a CPU the process's peak."""
    if not peaks:
        return f"peak {peak_gib:.2f} GiB"
    return " ".join(f"{kind} {size / GIB:.2f}" for kind, size in peaks.items()) + " GiB"


class RunCallback(TrainerCallback):
    """Progress bar, true gradient norm and rotation in every log, NaN stop."""

    def __init__(self, optimizer: ChunkedOptimizer, tokens: Callable[[], float]):
        self.optimizer, self.tokens = optimizer, tokens
        self.bar: Any = None
        self.step_seconds: list[float] = []
        """Forward, backward and update of each step; evaluation and saving are not in it."""
        self.seconds = 0.0
        """From the first step to the end, all in."""
        self._counted, self._logged = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            dynamic_ncols=True,
            unit="step",
            disable=not processes.is_main(),
        )
        self._counted, self._begin = self.tokens(), time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.update(state.global_step - self.bar.n)
        self.step_seconds.append(round(time.perf_counter() - self._step_began, 4))

    def extend(self, logs: dict[str, float]) -> None:
        """Add what only we know to a training log, before anybody sees it."""
        loss = logs.get("loss")
        if loss is None:
            return
        tokens, done = self.tokens(), self.optimizer.steps
        seconds = sum(self.step_seconds[self._logged :])
        logs["grad_norm"] = self.optimizer.grad_norm or 0.0
        if not self.optimizer.exact:
            logs["chunk"] = self.optimizer.schedule.chunk(done - 1)
            logs["cycle"] = self.optimizer.schedule.cycle(done)
        logs["tokens_per_second"] = round((tokens - self._counted) / max(seconds, 1e-9), 1)
        logs["peak_gib"] = round(peak_memory_gib(), 3)
        self._counted, self._logged = tokens, len(self.step_seconds)
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"loss is {loss} at step {done}: stopped, the last checkpoint is intact; lower "
                f"--learning_rate or look at the data"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            where = f"all {self.optimizer.schedule.chunks} chunks"
            if "chunk" in logs:
                place = f"{logs['chunk'] + 1:.0f}/{self.optimizer.schedule.chunks}"
                where = f"chunk {place} cycle {logs['cycle']:.0f}"
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.4f} lr {logs['learning_rate']:.2e} "
                f"norm {logs['grad_norm']:.3g} {where} "
                f"{logs['tokens_per_second']:.0f} tok/s "
                f"{memory_line(card_peaks(), logs['peak_gib'])}"
            )
        elif logs and any(key.startswith("eval_loss") for key in logs):
            tqdm.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.seconds = time.perf_counter() - self._begin
        self.close()

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self.bar is not None:
            self.bar.close()


class ChunkTrainer(AdaLoraTrainer, StreamingTrainer):
    """Goes before TRL's trainer among the bases of a class: training logs carry what only the
    optimizer knows, checkpoints take constant memory, AdaLoRA gets what PEFT leaves out.
    """

    run: RunCallback | None = None
    _prepared = False
    judged: Mapping[str, float] = MappingProxyType({})
    """TRL's numbers of the last evaluation before or after training."""
    _metrics: Any  # TRL's
    _total_train_tokens: float

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.run is None:
            # the numbers before and after are told by the report; a tracker that is asked before
            # training begins does not know its folder yet
            self.judged = {name: sum(x) / len(x) for name, x in self._metrics["eval"].items()}
            self._metrics["eval"].clear()
            return
        self.run.extend(logs)
        super().log(logs, start_time)

    def _wrap_model(
        self, model: torch.nn.Module, training: bool = True, dataloader: Any = None
    ) -> torch.nn.Module:
        """Of several processes each trains the model itself: the optimizer averages gradients.

        What accelerate finds prepared it does not put into DDP, which knows only the parameters
        that are trainable when it is built.
        """
        if not training or self.args.world_size == 1:
            return super()._wrap_model(model, training, dataloader)
        if not self._prepared:
            # for autocast and compilation, as for an evaluation
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
            marked: Any = model
            marked._is_accelerate_prepared = self._prepared = True
        return model

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not sharding.is_kept_from_device(model):
            super()._move_model_to_device(model, device)

    def tokens_seen(self) -> float:
        """Tokens trained on so far, as TRL counts them."""
        return max(self._total_train_tokens, self.state.num_input_tokens_seen)


class CheckpointCallback(TrainerCallback):
    """Seals each checkpoint when it is whole, deletes old ones after that, stops on signals."""

    def __init__(self, run: Path, keep: int | None):
        self.run, self.keep = run, keep
        self.stopped_by: str | None = None
        self._before: dict[int, Any] = {}
        self._heard = 0

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        args.save_total_limit = (
            None  # Trainer would delete the old one before the new one is sealed
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._heard = number
        # the second signal is not ours to catch
        signal.signal(number, self._before[number])
        tqdm.write(f"{signal.Signals(number).name}: saving after this step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if heard := processes.largest(self._heard):  # by any rank
            self.stopped_by = signal.Signals(heard).name
            control.should_training_stop = True
            # where an evaluation is due at the epoch's end, the resumed run must find it done
            control.should_save = not _due_at_the_epochs_end(args, state)
            if args.save_strategy == SaveStrategy.BEST:
                args.save_strategy = SaveStrategy.STEPS  # or no other than the best is saved
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.stopped_by:  # Trainer calls this in the middle of an epoch too when it stops
            due = _due_at_the_epochs_end(args, state)
            control.should_save = due
            control.should_evaluate &= due
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        processes.wait()  # until every rank has written its part
        if processes.is_main():
            checkpoints.seal(self.run / f"checkpoint-{state.global_step}")
            checkpoints.rotate(self.run, self.keep, state.best_model_checkpoint)
        processes.wait()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _due_at_the_epochs_end(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether this step ends an epoch, and something is to be done then."""
    by_epoch = args.eval_strategy == "epoch" or args.save_strategy == "epoch"
    return by_epoch and float(state.epoch or 0.0).is_integer()


def watch(trainer: Trainer, run: RunCallback, saves: CheckpointCallback) -> None:
    """Put the callbacks in, in the place of Trainer's own bar."""
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.add_callback(run)
    trainer.add_callback(saves)
