"""A rank dies: the others end, the message names it, and the run goes on where it was saved."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from chunkft.cli import main
from tests.conftest import assert_close
from tests.recipes.conftest import same, weights

STEPS, SAVES = 60, 5
REPO = Path(__file__).parents[2]
SECONDS = 60.0  # until all have ended


class Run:
    """`torchrun ... chunkft sft` in a process group of its own, which dies with it."""

    def __init__(self, out, model, records, ranks, *more):
        self.out, self.log = out, out.with_suffix(".log")
        words = ["sft", "--model_name_or_path", model, "--dataset_name", records]
        words += ["--output_dir", out, "--max_steps", STEPS, "--save_steps", SAVES]
        words += ["--per_device_train_batch_size", 8 // ranks, "--dtype", "float32"]
        words += ["--chunks", 4, "--interval", 1, "--learning_rate", "1e-3", "--bf16", "false"]
        words += ["--adam_epsilon", "1e-4", "--save_total_limit", 3, *more]
        launch = [sys.executable]
        if ranks > 1:
            launch += ["-m", "torch.distributed.run", "--nproc-per-node", ranks, "--standalone"]
        self.process = subprocess.Popen(
            [*map(str, [*launch, "-m", "chunkft", *words])],
            cwd=REPO,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def end(self):
        try:
            return self.process.wait(SECONDS)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def saved(self):
        """Steps of the newest checkpoint that is there, whole or not."""
        return max((int(p.name[11:]) for p in self.out.glob("checkpoint-*")), default=0)

    def kill_a_rank(self, rank, after):
        """SIGKILL to that rank once it has saved something beyond `after`, and a bit later."""
        while self.saved() <= after:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(random.random() * 0.3)
        workers = psutil.Process(self.process.pid).children()
        os.kill(sorted(worker.pid for worker in workers)[rank], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["fsdp", "ddp"])
def test_killed_five_times_the_weights_are_the_same(tiny_model, records, tmp_path, shard):
    more = ("--shard", shard)
    whole = Run(tmp_path / "whole", tiny_model, records, 2, *more)
    assert whole.end() == 0, whole.log.read_text()[-3000:]
    random.seed(0)
    for kill in range(5):
        resume = () if kill == 0 else ("--resume_from_checkpoint", "last")
        run = Run(tmp_path / "killed", tiny_model, records, 2, *more, *resume)
        rank = random.randrange(2)
        run.kill_a_rank(rank, run.saved())
        began = time.monotonic()
        assert run.end() != 0
        assert time.monotonic() - began < SECONDS
        told = run.log.read_text()
        assert f"local_rank: {rank}" in told
        assert "SIGKILL" in told
    # on one process, from the same checkpoint, before the last of it goes on as it was
    again = ("--resume_from_checkpoint", sorted(run.out.glob("checkpoint-*"))[0])
    alone = Run(tmp_path / "alone", tiny_model, records, 1, *again)
    assert alone.end() == 0, alone.log.read_text()[-3000:]
    last = Run(run.out, tiny_model, records, 2, *more, "--resume_from_checkpoint", "last")
    assert last.end() == 0, last.log.read_text()[-3000:]
    folders = whole.out, last.out
    if shard == "fsdp":
        for folder in folders:
            assert main(["consolidate", str(folder), str(folder) + "-plain"]) == 0
        folders = [folder.with_name(folder.name + "-plain") for folder in folders]
    assert same(*folders)  # to the bit
    expected = weights(folders[0])
    for name, weight in weights(alone.out).items():
        assert_close(weight, expected[name], 1e-4)
