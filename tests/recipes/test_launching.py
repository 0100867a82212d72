"""The launch files start ranks that train, here two on the CPU; slurm.sbatch beside a stand-in."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.recipes.conftest import metrics

FILES = Path(__file__).parents[2] / "examples" / "distributed"
SMALL = {"chunks": 2, "state_block": 1024, "max_length": 64, "gradient_accumulation_steps": 1}
SMALL |= {"dtype": "float32", "bf16": False, "use_cpu": True, "max_steps": 6, "save_steps": 4}


@pytest.fixture
def run(tiny_model: Path, records: Path, tmp_path: Path) -> Any:
    """Start a launch file with its own settings but for the model, the data and their size."""
    settings = yaml.safe_load((FILES / "sft-70b.yaml").read_text()) | SMALL
    settings |= {"model_name_or_path": str(tiny_model), "dataset_name": str(records)}
    settings |= {"output_dir": str(tmp_path / "out")}
    settings["gradient_checkpointing_kwargs"] = {"offload": False}  # it pins host memory
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    for name, line in (("srun", 'exec "$@"'), ("scontrol", "echo localhost")):
        (stand_in / name).write_text(f"#!/bin/sh\n{line}\n")
        (stand_in / name).chmod(0o755)
    places = [str(stand_in), str(Path(sys.executable).parent), os.environ["PATH"]]
    told = {"PATH": os.pathsep.join(places), "CONFIG": str(config), "GPUS": "2"}
    told |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PORT": "0"}
    told |= {"SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here"}

    def call(name: str, *words: str) -> Path:
        command = ["bash", str(FILES / name), *words]
        done = subprocess.run(
            command, env={**os.environ, **told}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "weights are sharded over 2 ranks (FSDP2)" in done.stdout
        return tmp_path / "out"

    return call


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch", "accelerate.sh"])
def test_it_starts_ranks_that_train_and_go_on(name: str, run: Any) -> None:
    out = run(name, "--max_steps", "4")
    assert (out / "checkpoint-4").is_dir()
    out = run(name, "--learning_rate", "1e-3")  # the command line goes before the file
    assert metrics(out)["steps"] == 6
