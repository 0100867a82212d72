"""A disk without room costs the checkpoint being written, and nothing else."""

from collections import namedtuple

import pytest

from chunkft.cli import main
from chunkft.recipes.sft import ChunkSFTTrainer
from chunkft.train import checkpoints
from tests.recipes.test_interrupt import command, same

resource = pytest.importorskip("resource", reason="a limit on files of one's own, POSIX only")

STEPS, FULL = 12, 8
Usage = namedtuple("Usage", "total used free")


def refused(err, what, kept):
    (line,) = [x for x in err.splitlines() if x.startswith("chunkft: error:")]
    assert f"{what} was not written, it takes 0.00 GiB" in line
    assert f"{kept} is whole" in line
    assert "make room" in line
    assert "Traceback" not in err


# bytes a file may have: the config, the arguments, the weights or the state is too large
@pytest.mark.parametrize("limit", [100, 4_000, 40_000, 80_000])
def test_a_full_disk_leaves_the_old_checkpoint(
    tiny_model, records, tmp_path, capsys, monkeypatch, limit
):
    words = command(tiny_model, records, tmp_path / "run", STEPS, "--save_steps", "4")
    stock = ChunkSFTTrainer._save_checkpoint

    def limited(self, model, trial):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.state.global_step == FULL:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            stock(self, model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkSFTTrainer, "_save_checkpoint", limited)
        assert main([*words, "--save_total_limit", "1"]) == 2
    refused(capsys.readouterr().err, f"checkpoint-{FULL}", "checkpoint-4")
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    assert checkpoints.fault(tmp_path / "run" / "checkpoint-4") is None
    assert main([*words, "--resume_from_checkpoint", "last"]) == 0
    assert main(command(tiny_model, records, tmp_path / "whole", STEPS)) == 0
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("saves", "refused_one", "kept"),
    [(1, "checkpoint-8", "checkpoint-4"), (3, "the model", "checkpoint-12")],
)
def test_room_is_looked_for_before_anything_is_written(
    tiny_model, records, tmp_path, capsys, monkeypatch, saves, refused_one, kept
):
    words = command(tiny_model, records, tmp_path / "run", STEPS, "--save_steps", "4")
    asked = []

    def usage(path):
        asked.append(path)
        return Usage(10**12, 0, 10**12 if len(asked) <= saves else 1000)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "disk_usage", usage)
        assert main(words) == 2
    refused(capsys.readouterr().err, refused_one, kept)
    assert main([*words, "--resume_from_checkpoint", "last"]) == 0
    assert main(command(tiny_model, records, tmp_path / "whole", STEPS)) == 0
    assert same(tmp_path / "run", tmp_path / "whole")
