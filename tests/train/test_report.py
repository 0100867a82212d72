"""What a report says of the code that ran."""

import json
import subprocess
from types import SimpleNamespace

from chunkft.core.coverage import Audit
from chunkft.core.store import GIB
from chunkft.memory.budget import card_peaks
from chunkft.train import report
from chunkft.train.trainer import memory_line

# what torch.cuda answers: 10 GiB of 24 free, of which 12 are the allocator's
CARD = {
    "is_available": True,
    "mem_get_info": (10 * GIB, 24 * GIB),
    "memory_reserved": 12 * GIB,
    "max_memory_reserved": 13 * GIB,
    "max_memory_allocated": 11 * GIB,
}
PEAKS = {"allocated": 11 * GIB, "reserved": 13 * GIB, "process": 15 * GIB}


def answers(**values):
    return SimpleNamespace(**{name: lambda value=value: value for name, value in values.items()})


def test_peaks_of_a_card():
    assert card_peaks(answers(**CARD)) == PEAKS
    assert card_peaks(answers(**CARD | {"is_available": False})) == {}


def test_one_line_of_memory():
    assert memory_line({}, 3.254) == "peak 3.25 GiB"
    assert memory_line(PEAKS, 3.0) == "allocated 11.00 reserved 13.00 process 15.00 GiB"


def test_the_report_tells_what_the_card_held(tmp_path):
    audit = Audit(steps=1, cycles=1, waiting=0, updates={"w": 1}, without_gradient=())
    for card in (PEAKS, {}):
        outcome = report.Outcome("cmd", {}, [], {}, {}, audit, {"weights": GIB}, 2.5, 1.0, 1, card)
        text = report.write(tmp_path, outcome).read_text()
        report.write_metrics(tmp_path, outcome, [])
        assert json.loads((tmp_path / report.METRICS).read_text())["card"] == card
        assert ("| reserved by torch's allocator, peak | 13.000 |" in text) == bool(card)
        assert ("| peak of the process (CPU) | 2.500 |" in text) != bool(card)


def test_the_commit_of_a_repository_that_does_not_hold_us_is_not_ours(tmp_path, monkeypatch):
    package = tmp_path / "report.py"
    package.touch()

    def git(*words):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    monkeypatch.setattr(report, "__file__", str(package))
    assert report._commit() == "unknown"
    git("add", "report.py")
    assert report._commit() != "unknown"
