"""What a stranger gets: the wheel, built, installed elsewhere and used from an empty folder.

The tests around this one import the source tree. A module that the build leaves out, or one that
only works from the repository's root, shows here alone.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

SMOKE = """
import sys
from pathlib import Path

import torch

import chunkft
from chunkft import ChunkedOptimizer

assert Path(chunkft.__file__).is_relative_to(sys.argv[1]), chunkft.__file__

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
before = [p.detach().clone() for p in model.parameters()]
x, y = torch.randn(32, 8), torch.randn(32, 4)
optimizer = ChunkedOptimizer(model, torch.optim.AdamW, lr=1e-3, chunks=4, interval=1)
for _ in optimizer.partition:
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
optimizer.audit()
assert all((p != old).all() for p, old in zip(model.parameters(), before, strict=True))
"""


def run(*command: str | Path, cwd: Path, python_path: Path | None = None) -> None:
    """Run it outside the repository; show what it said when it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python_path:
        env["PYTHONPATH"] = str(python_path)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPO)
    run(*build, cwd=folder)
    (built,) = folder.glob("chunkft-*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {path.relative_to(REPO).as_posix() for path in (REPO / "chunkft").rglob("*.py")}
    assert ours <= inside
    assert "chunkft/cli.py" in ours  # the console script points there
    strangers = {name for name in inside if not name.startswith(("chunkft/", "chunkft-"))}
    assert not strangers


def test_the_wheel_trains_one_cycle_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", site, wheel, cwd=empty)
    run(sys.executable, "-c", SMOKE, site, cwd=empty, python_path=site)
    assert not list(empty.iterdir())
