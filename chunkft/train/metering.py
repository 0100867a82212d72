"""The meter in a run: two steps are metered, after every chunk has state, and held to the plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.store import GIB
from chunkft.memory.meter import KINDS, Measured, Meter
from chunkft.memory.plan import Plan

matplotlib.use("agg")
import matplotlib.pyplot as plt

METERED = 2  # steps: the last of a visit and the first of the next, where T is 1
OVERRUN = 0.03
SMALL = 2**20  # bytes; less than this above the plan is nobody's trouble


class MeterCallback(TrainerCallback):
    """Meters `METERED` steps of the second cycle, or of a dense run."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: ChunkedOptimizer,
        vocabulary: int,
        beside: Sequence[nn.Module] = (),
    ):
        self.meter = Meter(model, optimizer, vocabulary, beside)
        self.optimizer = optimizer
        self.measured: Measured | None = None
        self._first = self._taken = 0
        self._on = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        schedule = self.optimizer.schedule
        cycle = 1 if self.optimizer.exact else schedule.chunks * schedule.interval
        self._first = min(
            max(state.global_step + 1, schedule.start + cycle), state.max_steps - METERED
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= self._first and not self._on and self.measured is None:
            self._on = True
            self.meter.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._taken += self._on
        if self._on and self._taken == METERED:
            self._stop()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._on:
            self._stop()

    def _stop(self) -> None:
        self._on = False
        self.meter.__exit__(None, None, None)
        self.measured = self.meter.measured()


def overruns(measured: Measured, plan: Plan) -> list[str]:
    """A line for each kind of which there was more than planned."""
    lines: list[str] = []
    for kind, planned in plan.highest.items():
        over = measured.highest[kind] - planned
        if over > OVERRUN * planned and over > SMALL:
            lines.append(
                f"{kind} took {measured.highest[kind] / GIB:.3f} GiB, {planned / GIB:.3f} were "
                f"planned ({over / max(planned, 1):+.0%})"
            )
    return lines


def plot(path: Path, measured: Measured) -> None:
    """Bytes on the device over time, stacked by kind."""
    figure, axis = plt.subplots(figsize=(8, 4))
    seconds = [reading.seconds for reading in measured.timeline]
    rows = [[reading.bytes[kind] / GIB for reading in measured.timeline] for kind in KINDS]
    axis.stackplot(seconds, rows, labels=KINDS, step="post")
    axis.set_xlabel("seconds")
    axis.set_ylabel("GiB on the device")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
