"""A save is as small in memory as its largest buffer, and takes old checkpoints too."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.train import state_files
from chunkft.train.saving import StreamingTrainer
from tests.conftest import loss_of, tiny, weights


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_saving_takes_no_private_memory() -> None:
    """Half a GB of weights and state, both in mapped files, saved in the middle of a visit."""
    size = ["--layers", "8", "--width", "512"]
    words = [sys.executable, "-m", "benchmarks.saving", *size, "--json"]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    state = found["state MiB"]
    assert found["weights MiB"] + state > 400
    assert found["save, Trainer's"] > state / 2  # or the measure sees nothing
    assert found["save, ours"] < 64
    assert found["load, same K"] < state / 2
    assert found["load, K + 1"] < state


def trainer_of(kind: type[Trainer], folder: Path, seed: int = 0) -> tuple[Any, ChunkedOptimizer]:
    model, batch = tiny("moe", seed)
    model.to(torch.bfloat16)
    optimizer = ChunkedOptimizer(model, torch.optim.AdamW, lr=1e-3, chunks=3, interval=2)
    args = TrainingArguments(str(folder), report_to=[], use_cpu=True)
    trainer: Any = kind(model=model, args=args, optimizers=(optimizer, None))
    trainer.create_scheduler(10, optimizer)
    for _ in range(0 if seed else 9):
        loss_of(model, batch).backward()
        optimizer.step()
    return trainer, optimizer


@pytest.mark.parametrize("writer", [StreamingTrainer, Trainer])
def test_checkpoints_of_both_kinds_are_gone_on_with(tmp_path: Path, writer: type[Trainer]) -> None:
    """Those with the state in one file, too; experts come back from ours alone."""
    first, saved = trainer_of(writer, tmp_path)
    first._save_checkpoint(first.model, None)
    folder = tmp_path / "checkpoint-0"
    assert (folder / state_files.FOLDER).is_dir() == (writer is StreamingTrainer)
    second, optimizer = trainer_of(StreamingTrainer, tmp_path / "other", seed=1)
    if writer is StreamingTrainer:
        second._load_from_checkpoint(str(folder))
    else:
        second.model.load_state_dict(first.model.state_dict())
    second._load_optimizer_and_scheduler(str(folder))
    assert optimizer.steps == saved.steps
    assert optimizer.active == saved.active
    assert second.lr_scheduler.state_dict() == first.lr_scheduler.state_dict()
    _, batch = tiny("moe")
    for trainer, chunked in ((first, saved), (second, optimizer)):
        for _ in range(7):
            loss_of(trainer.model, batch).backward()
            chunked.step()
    found = weights(second.model)
    for name, value in weights(first.model).items():
        assert torch.equal(value, found[name]), name


def test_what_a_kill_left_is_not_sealed(tmp_path: Path) -> None:
    trainer, _ = trainer_of(StreamingTrainer, tmp_path)
    left = tmp_path / "checkpoint-0" / state_files.FOLDER / "part-00099.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("of a run with more chunks")
    trainer._save_checkpoint(trainer.model, None)
    assert left.parent.is_dir()
    assert not left.exists()
