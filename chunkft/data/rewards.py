"""Rewards of completions: what they are made of, and what a run does when they fail.

    the task itself            of --dataset_name reasoning-gym:<task>, its own score in [0, 1]
    accuracy_reward, ...       TRL's, by name
    package.module.function    a callable as TRL has it: (prompts, completions, **columns) -> list

A reward that raises, takes too long, or gives another number of values or NaN would end a run with
somebody else's traceback, or be averaged over. Each is an error here that names the reward; None
says that a completion cannot be scored, and is left out of the average as TRL does.
"""

import asyncio
import functools
import importlib
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from chunkft.data.tasks import ReasoningGymTask
from chunkft.errors import InputError, RewardError, one_line

Reward = Callable[..., Any]


def task_reward(task: ReasoningGymTask) -> Reward:
    """The task's own score of each completion; needs the columns of `task.records`."""

    def score(
        completions: Sequence[Any],
        task_seed: Sequence[int],
        task_size: Sequence[int],
        task_index: Sequence[int],
        **_: Any,
    ) -> list[float | None]:
        places = zip(completions, task_seed, task_size, task_index, strict=True)
        return [
            task.score({"task_seed": s, "task_size": n, "task_index": i}, text_of(c))
            for c, s, n, i in places
        ]

    score.__name__ = task.name
    return score


def text_of(completion: Any) -> str:
    """The text of a completion, which is a string or a list of messages."""
    return completion.strip() if isinstance(completion, str) else completion[-1]["content"].strip()


def named_reward(name: str) -> Reward:
    """A reward by TRL's name or by its import path.

    Raises:
        InputError: there is none.
    """
    module, _, function = name.rpartition(".")
    try:
        if not module:
            from trl import rewards

            found = getattr(rewards, function)
            if function.startswith("get_"):  # makes the reward
                found = found(max_completion_len=1280, soft_punish_cache=256)
        else:
            found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"--reward_funcs {name}: {one_line(error)}; needed is one of TRL's names or "
            f"package.module.function"
        ) from error
    if not callable(found):
        raise InputError(f"--reward_funcs {name} is a {type(found).__name__}, no function")
    return found


def guarded(reward: Reward, seconds: float) -> Reward:
    """`reward`, whose failures are a RewardError that names it.

    Args:
        seconds: that one call may take. It runs in a thread of its own, which is left behind when
            it does not come back: Python cannot stop it.
    """
    name = getattr(reward, "__name__", type(reward).__name__)

    @functools.wraps(reward)
    def call(*args: Any, **kwargs: Any) -> list[float | None]:
        found = _within(seconds, name, functools.partial(reward, *args, **kwargs))
        wanted = len(kwargs["completions"])
        try:
            values = list(found)
        except TypeError:
            raise RewardError(
                f"reward {name} returned a {type(found).__name__}, needed is a list of {wanted} "
                f"numbers"
            ) from None
        if len(values) != wanted:
            raise RewardError(
                f"reward {name} returned {len(values)} values for {wanted} completions"
            )
        for i, value in enumerate(values):
            if value is None:
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise RewardError(
                    f"reward {name} returned {value!r} for completion {i} of {wanted} "
                    f"({text_of(kwargs['completions'][i])[:60]!r}); needed is a finite number, or "
                    f"None where there is no answer to score"
                )
        return values

    return call


async def _awaited(value: Any) -> Any:
    return await value


def _within(seconds: float, name: str, function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            value = function()
            if inspect.isawaitable(value):
                value = asyncio.run(_awaited(value))
            found.append(value)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise RewardError(
            f"reward {name} took more than {seconds:g} s; make it faster or raise --reward_timeout"
        )
    if failed:
        error = failed[0]
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        raise RewardError(f"reward {name}: {type(error).__name__}: {one_line(error)}") from error
    return found[0]
