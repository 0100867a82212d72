"""benchmarks/gpu.py on a CPU and a tiny model: all but what only CUDA can tell."""

import json
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_case
from benchmarks.gpu_case import Case, Few, Skipped, host_bytes, model_flops, peak_flops, run
from chunkft.core.store import GIB
from chunkft.models.shapes import config_of
from tests.conftest import tiny

REPO = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"seq": 16, "chunks": 4, "steps": 2}
CASES: dict[str, dict[str, Any]] = {
    "chunk": {"method": "chunk", "checkpointing": False},
    "lean": {"method": "chunk", "block": 2048, "offload": True},
    "streamed": {"method": "chunk", "block": 2048, "offload": True, "streamed": True},
    "exact": {"method": "exact"},
    "lora": {"method": "lora"},
    "adamw": {"method": "adamw"},
    "shared": {"method": "chunk", "layout": "stream", "block": 2048, "ranks": 2, "shard": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("tiny")
    tiny("llama")[0].config.save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("name", CASES)
def test_a_case_runs_and_tells(name: str, folder: str) -> None:
    if name in ("lora", "shared"):
        pytest.importorskip("peft")
    found = json.loads(json.dumps(run(Case(folder, 2, **SMALL | CASES[name]), "cpu")))
    assert found["timed"] == 2 and 0 < found["seconds"] <= found["worst"]
    assert found["tokens_per_second"] == pytest.approx(2 * 16 / found["seconds"])
    assert found["pinned_gib"] is None and found["mfu"] is None and "allocated_gib" not in found


def test_where_things_rest_changes_no_loss(folder: str) -> None:
    found = [run(Case(folder, 2, **SMALL | CASES[name]), "cpu") for name in ("lean", "streamed")]
    assert found[0]["last_loss"] == found[1]["last_loss"] != found[0]["first_loss"]


def test_a_few_chunks_in_turns() -> None:
    schedule = Few(64, interval=1, few=4)
    assert [schedule.chunk(step) for step in range(6)] == [0, 21, 42, 63, 0, 21]


def test_rows_of_processes(folder: str) -> None:
    """A row measured, with what the plan says; one that fails; one for which no time is left."""
    good, bad = Case(folder, 2, **SMALL | CASES["chunk"]), Case("no/such/model", 1, "chunk")
    (row, failed) = gpu.rows([good, bad], 2.0, "cpu")
    assert row["seconds"] > 0 and 0 < row["planned_gib"] < 1 and row["plan_error"] is None
    assert failed["failed"].startswith("InputError: ")
    (late,) = gpu.rows([good], 0.0, "cpu")
    assert late["skipped"] == "no time left of 0 minutes"
    text = gpu.report([row, failed, late], "python -m benchmarks.gpu")
    lines = text[text.index("| model") :].splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert f"{row['seconds']:.3f} ({row['worst']:.3f})" in lines[2] and "InputError" in lines[3]
    assert "Memory and speed on one GPU: cpu" in text


def test_the_plans_error_and_utilisation() -> None:
    case = Case("llama-2-7b", 1, "chunk")
    found = {"seconds": 0.5, "allocated_gib": 10.0, "device": "NVIDIA H100 80GB HBM3"}
    row = gpu.told(case, found, {"planned_gib": 11.0, "step_flop": 989e12 / 4})
    assert row["plan_error"] == pytest.approx(0.1) and row["hfu"] == pytest.approx(0.5)


def test_flops() -> None:
    config = config_of("llama-2-7b")
    size = gpu_case.parameters(config)
    assert size == 6_738_415_616
    found = model_flops(config, size, Case("llama-2-7b", 1, "chunk"))
    assert found == pytest.approx(6 * 6.607e9 * 1024 + 12 * 32 * 4096 * 1024**2, rel=1e-3)
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


def test_what_cannot_run_here_is_skipped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Case("llama-2-7b", 1, "exact")
    assert host_bytes(exact, 10**9) == 12 * 10**9 + gpu_case.PROCESS
    assert host_bytes(Case("", 1, "chunk", chunks=2, streamed=True), 100) == 1200 + gpu_case.PROCESS
    monkeypatch.setattr(gpu_case, "available", lambda: 8 * GIB)
    with pytest.raises(Skipped, match=r"needs 79\.3 GiB of host memory, 8\.0 there"):
        run(exact, "cpu")
    monkeypatch.setattr(gpu_case.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Skipped, match="bitsandbytes is not installed"):
        run(Case("llama-2-7b", 1, "adamw-8bit"), "cpu")


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        gpu.main()
    assert "needs a CUDA device" in str(left.value)  # a text: Python prints it and exits with 1


def test_torch_and_transformers_are_enough(folder: str, tmp_path: Path) -> None:
    for found in needed("torch", "transformers"):
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(str(found.locate_file(top)))
    case = json.dumps({"model": folder, "batch": 1, **SMALL, **CASES["lean"]})
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(REPO)!r}]; import benchmarks.gpu; "
        "assert not {'trl', 'peft', 'datasets', 'accelerate'} & set(sys.modules); "
        "benchmarks.gpu.main()"
    )
    for words in (["--device", "cpu", "--run", case], ["--predict", case]):
        # -S: no site-packages but the folder of links
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, *words],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        row = json.loads(done.stdout.splitlines()[-1])
        assert "seconds" in row or "step_flop" in row, row


def needed(*names: str) -> list[Distribution]:
    """Packages that come with these, whatever else is installed."""
    found: dict[str, Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        wanted = [line for line in found[name].requires or [] if "extra ==" not in line]
        todo += [re.split(r"[^\w.-]", line)[0] for line in wanted]
    return list(found.values())
