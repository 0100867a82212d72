"""A checkpoint is whole or it is named; nothing whole is lost."""

import shutil

import pytest

from chunkft.errors import CheckpointError, InputError
from chunkft.train import checkpoints

STATE = "optimizer/part-00000.safetensors"


def make(run, step, sealed=True):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "optimizer").mkdir()
    (folder / STATE).write_bytes(b"state" * 1000)
    if sealed:
        checkpoints.seal(folder)
    return folder


def test_the_newest_whole_checkpoint_is_used(tmp_path):
    make(tmp_path, 9)
    newest = make(tmp_path, 10)
    assert checkpoints.to_resume("last", tmp_path) == (newest, [])


def truncate(folder):
    path = folder / STATE
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"W" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / checkpoints.MANIFEST).unlink(), "no manifest"),
        (lambda f: (f / checkpoints.MANIFEST).write_text("{"), "broken manifest"),
        (lambda f: (f / STATE).unlink(), f"lost {STATE}"),
        (truncate, f"damaged {STATE}"),
        (flip, "damaged model.safetensors"),
    ],
)
@pytest.mark.parametrize("explicit", [False, True])
def test_a_torn_checkpoint_is_named_and_the_one_before_used(tmp_path, damage, named, explicit):
    whole, torn = make(tmp_path, 5), make(tmp_path, 10)
    damage(torn)
    found, told = checkpoints.to_resume(str(torn) if explicit else "true", tmp_path)
    assert found == whole
    assert len(told) == 1
    assert "checkpoint-10" in told[0]
    assert named in told[0]


def test_an_explicit_checkpoint_is_not_overtaken_by_a_newer_one(tmp_path):
    older = make(tmp_path, 5)
    make(tmp_path, 10)
    assert checkpoints.to_resume(str(older), tmp_path)[0] == older


def test_nothing_whole_is_an_error_for_a_path_and_a_fresh_start_for_last(tmp_path):
    torn = make(tmp_path, 5, sealed=False)
    assert checkpoints.to_resume("last", tmp_path)[0] is None
    with pytest.raises(CheckpointError, match="checkpoint-5"):
        checkpoints.to_resume(str(torn), tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        checkpoints.to_resume(str(tmp_path / "nowhere"), tmp_path)


def test_rotation_counts_whole_checkpoints_only(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    make(tmp_path, 4, sealed=False)
    make(tmp_path, 0, sealed=False)  # killed while it was deleted
    checkpoints.rotate(tmp_path, 2, best=None)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]
    checkpoints.rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-2").exists()


BEFORE = checkpoints.BEFORE


def fill(run, *names):
    run.mkdir(exist_ok=True)
    for name in names:
        (run / name).write_text("mine")


@pytest.mark.parametrize("resuming", [False, True])
@pytest.mark.parametrize(
    "names", [["report.md"], [BEFORE, "model.safetensors"], ["README.md", "config.json"]]
)
def test_what_is_not_this_runs_is_refused_untouched(tmp_path, names, resuming):
    fill(tmp_path, *names)
    with pytest.raises(InputError, match=r"holds .* and no checkpoint to go on from"):
        checkpoints.prepare_output(tmp_path, None, resuming)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(names, "mine")


def test_another_runs_checkpoints_are_refused_unless_they_are_gone_on_with(tmp_path):
    fill(tmp_path / "run", BEFORE, "report.md")
    found = make(tmp_path / "run", 5)
    for other in (None, make(tmp_path / "other", 5)):
        with pytest.raises(InputError, match=r"holds another run.*resume_from_checkpoint"):
            checkpoints.prepare_output(tmp_path / "run", other, resuming=other is not None)
    checkpoints.prepare_output(tmp_path / "run", found, resuming=True)


def test_a_start_that_failed_does_not_stand_in_the_way(tmp_path):
    fill(tmp_path, BEFORE)
    checkpoints.prepare_output(tmp_path, None, resuming=False)
    fill(tmp_path, "README.md")  # which TRL writes with the first checkpoint
    make(tmp_path, 5, sealed=False)
    checkpoints.prepare_output(tmp_path, None, resuming=True)
    with pytest.raises(InputError, match="and no checkpoint to go on from"):
        checkpoints.prepare_output(tmp_path, None, resuming=False)


def test_a_run_does_not_fork_where_it_lies(tmp_path):
    fill(tmp_path, BEFORE)
    older = make(tmp_path, 5)
    newer = make(tmp_path, 10)
    with pytest.raises(InputError, match="checkpoint-10, newer than checkpoint-5"):
        checkpoints.prepare_output(tmp_path, older, resuming=True)
    (newer / checkpoints.MANIFEST).unlink()
    checkpoints.prepare_output(tmp_path, older, resuming=True)


def test_checkpoints_that_no_kill_explains_are_not_started_over(tmp_path):
    make(tmp_path / "foreign", 4, sealed=False)  # trl sft writes no manifest
    make(tmp_path / "foreign", 8, sealed=False)
    truncate(make(tmp_path / "damaged", 8))
    for name, said in (("foreign", "checkpoint-4.*no manifest"), ("damaged", "damaged optimizer")):
        with pytest.raises(CheckpointError, match=said):
            checkpoints.to_resume("last", tmp_path / name)


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path):
    folder = make(tmp_path, 5, sealed=False)
    shutil.rmtree(folder / "optimizer")
    checkpoints.seal(folder)
    with pytest.raises(CheckpointError, match="save_only_model"):
        checkpoints.to_resume("last", tmp_path)


@pytest.mark.parametrize("setting", [None, "", "false", "False", "no"])
def test_a_config_may_say_that_nothing_is_resumed(tmp_path, setting):
    make(tmp_path, 5)
    assert not checkpoints.wanted(setting)
    assert checkpoints.to_resume(setting, tmp_path) == (None, [])


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name a directory you can write"):
        checkpoints.prepare_output(tmp_path / "file" / "run", None, resuming=False)
