"""The shapes of record that TRL trains on, recognised and checked record by record.

    messages | prompt, completion | text        sft
    (prompt,) chosen, rejected                  dpo, reward
    prompt                                      grpo, rloo

TRL looks at the first record only and takes the rest on trust; what does not fit fails deep inside
tokenization, or trains on the wrong thing. Here every record is looked at, and the first bad one
is named by its place. Columns of a second shape are taken out, because TRL picks between shapes
by looking at whichever such column it meets first.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from chunkft.errors import InputError

Record = Mapping[str, Any]
Wanted = Literal["training", "preference", "prompt"]
# columns by which TRL decides what a record is
DECISIVE = ("messages", "prompt", "completion", "chosen", "rejected", "conversations", "text")


class Shape(NamedTuple):
    """What a record is: the columns that make it so, and whether they hold messages."""

    name: str
    columns: tuple[str, ...]
    messages: bool

    def __str__(self) -> str:
        kind = "messages" if self.messages else "text"
        return f"{self.name} ({', '.join(self.columns)}: {kind})"


def check_shape(
    rows: Iterable[tuple[str, Record]], text_field: str = "text", wanted: Wanted = "training"
) -> Shape:
    """The one shape that all rows have.

    Args:
        rows: (place, record) pairs; the place goes into the message.
        text_field: the column of a text record.
        wanted: what they are for.

    Raises:
        InputError: a record of no known shape, of another shape than those before it, or with a
            field that is null or of the wrong type; or no record at all.
    """
    found: Shape | None = None
    for place, record in rows:
        if wanted == "training":
            shape = _shape_of(record, place, text_field)
        else:
            shape = _preference(record, place) if wanted == "preference" else _prompt(record, place)
        if found is None:
            found = shape
            _warn_of_a_second_shape(shape, record)
        elif shape != found:
            raise InputError(
                f"{place}: this record is {shape}, those before it are {found}; "
                f"give all records one shape"
            )
    if found is None:
        raise InputError("no records: at least 1 is needed")
    return found


def superfluous(shape: Shape, columns: Iterable[str]) -> list[str]:
    """The columns that would make TRL take the record for another shape."""
    return [name for name in columns if name in DECISIVE and name not in shape.columns]


def _shape_of(record: Record, place: str, text_field: str) -> Shape:
    if "messages" in record:
        _check_messages(record["messages"], f"{place}: 'messages'")
        return Shape("conversational", ("messages",), True)
    if "prompt" in record and "completion" in record:
        return _prompt_completion(record, place)
    if text_field in record:
        _check_text(record[text_field], f"{place}: {text_field!r}")
        return Shape("text", (text_field,), False)
    raise InputError(
        f"{place}: unknown columns {', '.join(record) or '(none)'}; understood are "
        f"messages | prompt and completion | {text_field} (--dataset_text_field names another)"
    )


def _preference(record: Record, place: str) -> Shape:
    for name in ("chosen", "rejected"):
        if name not in record:
            raise InputError(
                f"{place}: {name!r} is missing (columns: {', '.join(record) or 'none'}); a "
                f"preference has a chosen and a rejected answer, and a prompt"
            )
    names = ("prompt",) * ("prompt" in record) + ("chosen", "rejected")
    kinds = [isinstance(record[name], list) for name in names]
    if len(set(kinds)) > 1 and None not in (record[name] for name in names):
        raise InputError(
            f"{place}: {', '.join(names)} must all be text or all be lists of messages"
        )
    for name in names:
        (_check_messages if all(kinds) else _check_text)(record[name], f"{place}: {name!r}")
    if record["chosen"] == record["rejected"]:
        raise InputError(f"{place}: chosen and rejected are the same, which prefers nothing")
    return Shape("preference", names, all(kinds))


def _prompt(record: Record, place: str) -> Shape:
    if "prompt" not in record:
        raise InputError(f"{place}: 'prompt' is missing (columns: {', '.join(record) or 'none'})")
    messages = isinstance(record["prompt"], list)
    (_check_messages if messages else _check_text)(record["prompt"], f"{place}: 'prompt'")
    if not messages and not record["prompt"].strip():
        raise InputError(f"{place}: 'prompt' is empty, there is nothing to answer")
    return Shape("prompt", ("prompt",), messages)


def _prompt_completion(record: Record, place: str) -> Shape:
    kinds = [isinstance(record[name], list) for name in ("prompt", "completion")]
    check = _check_messages if all(kinds) else _check_text
    if kinds[0] != kinds[1] and None not in (record["prompt"], record["completion"]):
        raise InputError(
            f"{place}: 'prompt' and 'completion' must both be text or both be lists of messages"
        )
    for name in ("prompt", "completion"):
        check(record[name], f"{place}: {name!r}")
    return Shape("prompt-completion", ("prompt", "completion"), all(kinds))


def _check_text(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"{where} is {_said(value)}, needs text")


def _check_messages(value: object, where: str) -> None:
    """A non-empty list of {"role": text, "content": text}; a tool call may have no content."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is {_said(value)}, needs a list of messages (role, content)")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise InputError(f"{where}, message {number} is {_said(message)}, needs role, content")
        for key in ("role", "content"):
            if key == "content" and message.get("tool_calls"):
                continue
            if not isinstance(message.get(key), str):
                said = _said(message[key]) if key in message else "missing"
                raise InputError(f"{where}, message {number}: {key!r} is {said}, needs text")


def _said(value: object) -> str:
    """`null`, or the type and the value, short enough for a line."""
    if value is None:
        return "null"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _warn_of_a_second_shape(shape: Shape, record: Record) -> None:
    if others := superfluous(shape, record):
        warnings.warn(
            f"records are taken as {shape}; columns of another shape are left out: "
            f"{', '.join(others)}",
            stacklevel=3,
        )
