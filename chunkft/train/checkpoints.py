"""Checkpoints that are whole or named as torn.

A checkpoint is written file by file. When all are there and on disk, a manifest with the size and
the ends of every file is put beside them by rename, so a checkpoint without a fitting manifest is
one that a kill interrupted. Older checkpoints are deleted only after that. One that the disk has no
room for is taken away again.

A directory is a run's by its `before.json`, which a run writes before its first step. In any other
nothing is written unless it is empty.
"""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from chunkft.core.store import GIB
from chunkft.errors import CheckpointError, ChunkFTError, InputError, one_line
from chunkft.memory.eight_bit import EightBitMoments
from chunkft.train import state_files

MANIFEST = "chunkft_manifest.json"
BEFORE = "before.json"
OLD_STATE = "optimizer.pt"  # in one file, as Trainer writes it
UNFINISHED = "was never finished (no manifest)"
NEWEST, NEVER = ("true", "last", "latest", "1", "yes"), ("", "false", "0", "no", "none")
ENDS = 1 << 20  # bytes looked at on either end of a file


def seal(folder: Path) -> None:
    """Declare the checkpoint in `folder` whole."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb+") as f:
                os.fsync(f.fileno())
            files[path.relative_to(folder).as_posix()] = _look(path)
        elif path.is_dir():
            _sync_names(path)
    temporary = folder / (MANIFEST + ".tmp")
    with temporary.open("w") as f:
        json.dump({"files": files}, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(folder / MANIFEST)
    _sync_names(folder)
    _sync_names(folder.parent)


def _sync_names(folder: Path) -> None:
    """Bring the names in `folder` to disk: a file whose name is not there is not there."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def room(run: Path, what: str, needed: int, torn: Path | None = None) -> Iterator[None]:
    """Write `what` into `run` inside; where that fails, `torn` is removed and the cure is told.

    Args:
        needed: bytes that will be written.

    Raises:
        CheckpointError: the disk has no room for it, or refuses.
    """
    free = shutil.disk_usage(run).free
    try:
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except BaseException as error:
        if torn is not None:
            remove(torn)
        # torch says RuntimeError and tokenizers Exception when a disk is full
        if isinstance(error, ChunkFTError) or not isinstance(error, Exception):
            raise
        found, _ = last_whole(run)
        raise CheckpointError(
            f"{run}: {what} was not written, it takes {needed / GIB:.2f} GiB and "
            f"{free / GIB:.2f} GiB were free ({type(error).__name__}: {one_line(error)}); "
            f"{f'{found.name} is whole' if found else 'no checkpoint is there yet'}: make room, "
            f"and go on with --resume_from_checkpoint last"
        ) from error


def remove(folder: Path) -> None:
    """Delete a checkpoint, if there is one."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)  # first: half of it is none
        shutil.rmtree(folder)


def has_state(found: Path) -> bool:
    """Whether a checkpoint holds more than the model."""
    return (found / state_files.FOLDER).is_dir() or (found / OLD_STATE).is_file()


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return UNFINISHED
    except (ValueError, KeyError):
        return "has a broken manifest"
    for name, seen in files.items():
        path = folder / name
        if not path.is_file():
            return f"has lost {name}"
        if _look(path) != seen:
            return f"has a damaged {name}"
    return None


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def last_whole(run: Path, upto: Path | None = None) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of `run` (not newer than `upto`), and what was passed over."""
    torn: list[str] = []
    for folder in reversed(checkpoints(run)):
        if upto is not None and int(folder.name[11:]) > int(upto.name[11:]):
            continue
        if (why := fault(folder)) is None:
            return folder, torn
        torn.append(f"{folder} {why}")
    return None, torn


def to_resume(setting: str | None, run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume_from_checkpoint setting` means, and the torn ones passed over.

    `true` and `last` mean the newest whole one in the output directory, or the beginning when the
    run was killed before its first.

    Raises:
        InputError: a path that does not exist.
        CheckpointError: neither it nor an older one is whole, or it holds the model only.
    """
    if not wanted(setting):
        return None, []
    assert setting is not None
    newest, folder = setting.lower() in NEWEST, Path(setting)
    if newest:
        found, torn = last_whole(run)
    elif not folder.is_dir():
        raise InputError(f"--resume_from_checkpoint {setting}: no such folder; use 'last'")
    elif re.fullmatch(r"checkpoint-\d+", folder.name):
        found, torn = last_whole(folder.parent, upto=folder)
    else:
        found, torn = last_whole(folder)
    # a kill leaves one unfinished checkpoint at most
    killed_early = newest and (not torn or (len(torn) == 1 and UNFINISHED in torn[0]))
    if found is None and not killed_early:
        raise CheckpointError(
            f"no whole checkpoint in {run if newest else setting}: "
            f"{'; '.join(torn) or 'it holds none'}"
        )
    if found is not None and not has_state(found):
        raise CheckpointError(
            f"{found} holds the model only (--save_only_model), no optimizer state to go on with; "
            f"start a new run with --model_name_or_path {found} and an empty --output_dir"
        )
    return found, torn


def wanted(setting: str | None) -> bool:
    """Whether `--resume_from_checkpoint setting` asks for anything; YAML may say false."""
    return setting is not None and setting.lower() not in NEVER


class Kept(NamedTuple):
    """What a checkpoint's optimizer goes on with."""

    steps: int
    chunks: int
    interval: int
    order: str
    layout: str
    moments: str
    exact: bool
    state_bits: int
    state_block: int | None
    learning_rate: float | None
    """Of the schedule's beginning; None where the schedule keeps none (reduce_lr_on_plateau)."""


def kept(found: Path) -> Kept:
    """Settings of the run that wrote `found`; reads no tensor."""
    if (found / state_files.FOLDER).is_dir():
        state = state_files.header(found / state_files.FOLDER)
    else:
        state = torch.load(found / OLD_STATE, map_location="cpu", mmap=True, weights_only=True)
    schedule, rate = state["schedule"], state["param_groups"][0].get("initial_lr")
    return Kept(
        state["steps"],
        schedule["chunks"],
        schedule["interval"],
        schedule["order"],
        state["layout"],
        state["moments"],
        state.get("exact", False),
        8 if state.get("codec") == EightBitMoments.__name__ else 32,
        state.get("block"),
        None if rate is None else float(rate),
    )


def rotate(run: Path, keep: int | None, best: str | None) -> None:
    """Delete the oldest whole checkpoints beyond `keep`, never the best or the newest.

    What a kill left of older ones goes too.
    """
    if not keep or keep < 1:
        return
    found = checkpoints(run)
    whole = [p for p in found if (p / MANIFEST).exists()]
    torn = [p for p in found[: found.index(whole[-1])] if p not in whole] if whole else []
    for folder in [*torn, *whole[:-keep]]:
        if best is None or folder.resolve() != Path(best).resolve():
            remove(folder)


def prepare_output(run: Path, found: Path | None, resuming: bool) -> None:
    """Make the output directory, and refuse one in which something could be overwritten.

    Args:
        found: the checkpoint to go on from, if any.
        resuming: whether to go on was asked for.

    Raises:
        InputError: it holds what is not this run's, or cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe = run / ".chunkft-probe"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise InputError(
            f"--output_dir {run}: {e.strerror or e}; name a directory you can write"
        ) from e
    inside = {path.name for path in run.iterdir()}
    if not inside:
        return
    if found is not None and found.resolve().parent == run.resolve():
        _refuse_to_fork(run, found)
        return
    # what a run leaves that stopped before its first step or was killed before its checkpoint
    early = {BEFORE, "runs"}
    if resuming and found is None:
        early |= {"README.md", *(path.name for path in checkpoints(run))}
    if BEFORE in inside and inside <= early:
        return
    if any(fault(path) is None for path in checkpoints(run)):
        raise InputError(
            f"--output_dir {run} holds another run; add --resume_from_checkpoint last to go on "
            f"with it, or name an empty directory"
        )
    raise InputError(
        f"--output_dir {run} holds {min(inside - {BEFORE})} and no checkpoint to go on from; name "
        f"an empty directory"
    )


def _refuse_to_fork(run: Path, found: Path) -> None:
    """What comes after `found` would be taken for the newest, and the new ones be rotated away."""
    newer = [p for p in checkpoints(run) if int(p.name[11:]) > int(found.name[11:])]
    if whole := [p.name for p in newer if fault(p) is None]:
        raise InputError(
            f"{run} holds {whole[-1]}, newer than {found.name}: resume from 'last', or go on from "
            f"{found.name} with an empty --output_dir"
        )


def _look(path: Path) -> list[int]:
    size = path.stat().st_size
    with path.open("rb") as f:
        head = zlib.crc32(f.read(ENDS))
        f.seek(max(0, size - ENDS))
        return [size, head, zlib.crc32(f.read(ENDS))]
