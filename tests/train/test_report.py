"""What a report says of the code that ran."""

import subprocess

from chunkft.train import report


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
