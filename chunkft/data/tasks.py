"""Tasks made on the spot, with their own scorers: `reasoning-gym:<task>?<setting>=<value>&...`.

reasoning-gym generates item i of (task, settings, seed, size) deterministically. So a record need
not carry the entry it came from, whose metadata no table holds without loss: it carries
(task_seed, task_size, task_index), and the scorer makes the entry again.

Item i of seed s is item i-1 of seed s+1, so neighbouring seeds share all items but one. Our seeds
therefore start WINDOW items apart, and train and held-out items have a window each:

    task_seed = (2 * seed + held_out) * WINDOW

Small tasks repeat themselves all the same, so held-out items whose question is in the training
records are dropped, and counted.
"""

import dataclasses
import difflib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from datasets import Dataset

from chunkft.data.shapes import Wanted
from chunkft.errors import InputError, one_line

PREFIX = "reasoning-gym:"
WINDOW = 1_000_003  # items from one seed to the next
SEEDS = 2**32 - WINDOW  # numpy, behind one of the tasks, takes no larger ones
DEFAULT_SIZE = {"train": 2000}
DEFAULT_HELD_OUT_SIZE = 200
OWN = ("seed", "size")  # arguments of ours, not settings of a task

logger = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """Records that do not occur in training, and how many were dropped because they do."""

    records: Dataset
    dropped: int


class ReasoningGymTask:
    """One task with its settings: makes records, scores answers.

    Args:
        name: one of reasoning-gym's tasks, e.g. `chain_sum`.
        settings: what the task's own config takes, e.g. `min_terms=2`.

    Raises:
        InputError: no such task or setting, or a value the task refuses.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        _check_name(name)
        self.name = name
        self.settings = dict(sorted(settings.items()))
        self._check_settings()

    @classmethod
    def parse(cls, source: str, settings: Mapping[str, Any] | None = None) -> "ReasoningGymTask":
        """From `reasoning-gym:<task>?min_terms=2&max_terms=3`; `settings` come on top."""
        name, _, query = source.removeprefix(PREFIX).partition("?")
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        except ValueError:
            raise InputError(
                f"{source}: {query!r} is not of the form <setting>=<value>&<setting>=<value>"
            ) from None
        return cls(name, **{key: _value(text) for key, text in pairs} | dict(settings or {}))

    def records(self, size: int, seed: int = 0) -> Dataset:
        """Conversational prompt-completion records.

        Returns:
            `size` rows of `prompt` [one user message], `completion` [one assistant message: the
            answer], and the integers `task_seed`, `task_size`, `task_index`, from which `score`
            finds the entry.

        Raises:
            InputError: size < 1, or the task has no reference answers to imitate.
        """
        return self._records(size, 2 * seed * WINDOW % SEEDS)

    def preferences(self, records: Dataset) -> Dataset:
        """`records` as preferences: chosen is the right answer, rejected another record's answer.

        The next record in turn whose answer scores lower here is the one.

        Raises:
            InputError: an answer that no other record's answer is worse than.
        """
        answers = [completion[-1]["content"] for completion in records["completion"]]
        rejected = [self._worse(records[i], i, answers) for i in range(len(records))]
        columns = {
            "chosen": [[{"role": "assistant", "content": text}] for text in answers],
            "rejected": [[{"role": "assistant", "content": text}] for text in rejected],
        }
        made = records.remove_columns("completion")
        for name, column in columns.items():
            made = made.add_column(name, column)  # pyright: ignore[reportCallIssue]
        return made

    def _worse(self, record: Mapping[str, Any], place: int, answers: list[str]) -> str:
        right = self.score(record, answers[place])
        for step in range(1, len(answers)):
            other = answers[(place + step) % len(answers)]
            if other != answers[place] and self.score(record, other) < right:
                return other
        raise InputError(
            f"{self}: item {place} has no worse answer among {len(answers)} records, so there is "
            f"nothing to prefer; use more records or another task"
        )

    def held_out(self, size: int, seed: int, training: Dataset) -> HeldOut:
        """`size` records of the seed's other window, less those whose question is in `training`.

        Raises:
            InputError: none is left.
        """
        known = set(questions(training))
        records = self._records(size, (2 * seed + 1) * WINDOW % SEEDS)
        new = [i for i, question in enumerate(questions(records)) if question not in known]
        if not new:
            raise InputError(
                f"all {size} held-out questions of {self} occur among its {len(training)} training "
                f"records; train on fewer or widen the task's settings"
            )
        dropped = size - len(new)
        logger.info("%s: %d of %d held-out items occur in training, dropped", self, dropped, size)
        return HeldOut(records.select(new), dropped)

    def entry(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The task's own entry (`question`, `answer`, `metadata`) behind a record."""
        return self._dataset(record["task_size"], record["task_seed"])[record["task_index"]]

    def score(self, record: Mapping[str, Any], answer: str | None) -> float:
        """The task's own score of an answer, 0 to 1; many tasks give a little for a near miss.

        Args:
            record: a row of `records`, or an entry of the task.
        """
        entry = record if "metadata" in record else self.entry(record)
        return float(self._dataset(1, 0).score_answer(answer, entry))

    def __repr__(self) -> str:
        settings = "&".join(f"{key}={json.dumps(v)}" for key, v in self.settings.items())
        return f"{PREFIX}{self.name}" + (f"?{settings}" if settings else "")

    def _dataset(self, size: int, seed: int) -> Any:
        return _made(self.name, json.dumps(self.settings), size, seed)

    def _records(self, size: int, task_seed: int) -> Dataset:
        if size < 1:
            raise InputError(f"size {size} is below 1: {self} needs at least one record")
        return Dataset.from_list([self._record(i, size, task_seed) for i in range(size)])

    def _record(self, index: int, size: int, seed: int) -> dict[str, Any]:
        entry = self._dataset(size, seed)[index]
        if not isinstance(entry["answer"], str):
            raise InputError(
                f"{self}: item {index} has no reference answer ({entry['answer']!r}), so there is "
                f"nothing to imitate; the task can only be scored, choose another for sft"
            )
        return {
            "prompt": [{"role": "user", "content": entry["question"]}],
            "completion": [{"role": "assistant", "content": entry["answer"]}],
            "task_seed": seed,
            "task_size": size,
            "task_index": index,
        }

    def _check_settings(self) -> None:
        """Every setting is one of the task's, and the task accepts the values."""
        known = [f.name for f in dataclasses.fields(_tasks()[self.name][1]) if f.name not in OWN]
        for key in self.settings:
            if key in OWN:
                raise InputError(f"{self}: {key!r} is no setting of a task; give it as an argument")
            if key not in known:
                raise InputError(
                    f"{PREFIX}{self.name} has no setting {key!r}{_closest(key, known)}; "
                    f"it has {', '.join(known)}"
                )
        try:
            self._dataset(1, 0)
        except (AssertionError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{self} is refused by the task: {one_line(error)}") from error


def questions(records: Dataset) -> Iterator[str]:
    """The text of each record's last prompt message."""
    for prompt in records["prompt"]:
        yield prompt[-1]["content"] if isinstance(prompt, list) else prompt


def split_records(
    task: ReasoningGymTask,
    split: str,
    size: int | None,
    seed: int,
    exclude: Dataset | None,
    wanted: Wanted = "training",
) -> Dataset:
    """The records of one split; every split but "train" is held out, against `exclude`."""
    if wanted == "preference":
        return task.preferences(split_records(task, split, size, seed, exclude))
    if size is None:
        size = DEFAULT_SIZE.get(split, DEFAULT_HELD_OUT_SIZE)
    if split == "train":
        return task.records(size, seed)
    training = exclude if exclude is not None else task.records(DEFAULT_SIZE["train"], seed)
    return task.held_out(size, seed, training).records


@lru_cache(maxsize=8)
def _made(name: str, settings: str, size: int, seed: int) -> Any:
    """One of reasoning-gym's data sets; some build all their items at once, so they are kept."""
    from reasoning_gym.factory import create_dataset

    return create_dataset(name, size=size, seed=seed, **json.loads(settings))


def _tasks() -> dict[str, Any]:
    """Name -> (data set class, config class)."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise InputError(
            f"{PREFIX}<task> needs reasoning-gym ({one_line(error)}): pip install reasoning-gym"
        ) from error
    return DATASETS


def _check_name(name: str) -> None:
    if name not in (tasks := _tasks()):
        closest = _closest(name, tasks, otherwise="; for example chain_sum, spell_backward")
        raise InputError(f"{PREFIX}{name}: unknown task, {len(tasks)} are known{closest}")


def _closest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    found = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else otherwise


def _value(text: str) -> Any:
    """`2`, `0.5`, `true`, `[1, 2]` as JSON has them; anything else is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text
