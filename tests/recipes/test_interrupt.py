"""Stopped by a signal or killed: the resumed run ends with the uninterrupted run's bits."""

import contextlib
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from chunkft.cli import main
from chunkft.memory import eight_bit
from chunkft.train.checkpoints import MANIFEST, fault, last_whole
from chunkft.train.trainer import CheckpointCallback

KILLS = 20
LEFT = "left by a kill"


def command(model, data, out, steps, *more):
    words = ["sft", "--model_name_or_path", str(model), "--dataset_name", str(data)]
    words += ["--output_dir", str(out), "--max_steps", str(steps), "--chunks", "3"]
    words += ["--interval", "2", "--order", "shuffled", "--per_device_train_batch_size", "2"]
    return [*words, "--disable_tqdm", "true", *more]


def same(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("number", "more"), [(signal.SIGINT, []), (signal.SIGTERM, ["--state_bits", "8"])]
)
def test_a_signal_saves_and_prints_the_line_that_resumes(
    tiny_model, records, tmp_path, capsys, monkeypatch, number, more
):
    monkeypatch.setattr(eight_bit, "SMALLEST", 64)  # elements; the model has no larger slice
    steps, stop = 14, 7
    words = command(tiny_model, records, tmp_path / "stopped", steps, *more)
    # in the middle, so that the printed line must keep what comes after
    words[1:1] = ["--resume_from_checkpoint", "last"]
    with monkeypatch.context() as patch:
        stock = CheckpointCallback.on_step_end

        def interrupted(self, args, state, control, **more):
            if state.global_step == stop:
                os.kill(os.getpid(), number)
            return stock(self, args, state, control, **more)

        patch.setattr(CheckpointCallback, "on_step_end", interrupted)
        before = signal.getsignal(number)
        assert main(words) == 128 + number
        assert signal.getsignal(number) is before
    out = capsys.readouterr().out
    line = re.search(r"^  (chunkft sft .*)$", out, re.M)
    assert line is not None
    assert (tmp_path / "stopped" / f"checkpoint-{stop}" / "chunkft_manifest.json").exists()
    assert main(shlex.split(line[1])[1:]) == 0
    assert main(command(tiny_model, records, tmp_path / "whole", steps, *more)) == 0
    assert same(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("stop", [4, 8])  # in the middle of an epoch, and at its end
@pytest.mark.parametrize(
    "saving",
    [
        # so that no evaluation after the first is the best
        "--eval_strategy steps --eval_steps 1 --save_strategy best --greater_is_better true",
        "--eval_strategy epoch --save_strategy epoch --save_total_limit 1",
        "--eval_strategy steps --eval_steps 2 --save_strategy no",
    ],
)
def test_a_signal_saves_whatever_else_decides_about_saving(
    tiny_model, records, tmp_path, monkeypatch, saving, stop
):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = records.read_text().splitlines()[:16]  # 8 steps of an epoch
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    more = [*saving.split(), "--metric_for_best_model", "loss", "--learning_rate", "0.01"]
    more += ["--lr_scheduler_type", "reduce_lr_on_plateau"]
    more += ["--lr_scheduler_kwargs", '{"patience": 0, "threshold": 9.0}']
    stock = CheckpointCallback.on_step_end

    def interrupted(self, args, state, control, **more):
        if state.global_step == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return stock(self, args, state, control, **more)

    words = command(tiny_model, folder, tmp_path / "run", 20, *more)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCallback, "on_step_end", interrupted)
        assert main(words) == 130
    assert fault(tmp_path / "run" / f"checkpoint-{stop}") is None
    assert main([*words, "--resume_from_checkpoint", "last"]) == 0
    assert main(command(tiny_model, folder, tmp_path / "whole", 20, *more)) == 0
    assert same(tmp_path / "run", tmp_path / "whole")


def test_what_was_trained_outlives_an_interrupted_evaluation(
    tiny_model, records, tmp_path, capsys, monkeypatch
):
    from chunkft.recipes import judging

    stock, calls = judging.evaluate, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) > 1:  # the first is before training
            raise KeyboardInterrupt
        return stock(*given)

    monkeypatch.setattr(judging, "evaluate", interrupted)
    words = command(tiny_model, records, tmp_path / "run", 12, "--save_strategy", "no")
    assert main(words) == 130
    assert "stopped" in capsys.readouterr().err
    assert not same(tmp_path / "run", tiny_model)


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_of_saving(tiny_model, records, tmp_path):
    steps, chance, run = 600, random.Random(0), tmp_path / "killed"
    assert main(command(tiny_model, records, tmp_path / "whole", steps, "--save_steps", "5")) == 0
    words = command(tiny_model, records, run, steps, "--save_steps", "5")
    words += ["--save_total_limit", "1", "--resume_from_checkpoint", "last"]
    torn, whole = 0, []
    while torn < KILLS:
        process = subprocess.Popen(
            [sys.executable, "-m", "chunkft", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        after = 0
        try:
            for _ in range(chance.randint(1, 2)):  # the last of these saves is hit
                while process.poll() is None and (saving := being_written(run)) <= after:
                    time.sleep(0.001)
                after = saving
            time.sleep(chance.uniform(0.0, 0.12))
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
        if step := being_written(run):
            torn += 1
            (run / f"checkpoint-{step}" / LEFT).touch()
        found, _ = last_whole(run)
        assert found is not None or not whole
        whole += [int(found.name[11:])] if found else []
    assert whole == sorted(whole)
    assert len(whole) > KILLS // 2  # the first kills may come before the first save's end
    assert main(words) == 0
    assert same(run, tmp_path / "whole")
    assert not list(run.rglob(LEFT))


def being_written(run):
    """Step of the checkpoint that has no manifest yet, 0 if there is none."""
    found = [0]
    for folder in run.glob("checkpoint-*"):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            if not {MANIFEST, LEFT} & set(os.listdir(folder)):
                found.append(int(folder.name[11:]))
    return max(found)
