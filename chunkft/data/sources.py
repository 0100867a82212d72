"""Where training records come from: files, folders, the hub, or tasks made on the spot.

    data.jsonl | .json | .csv | .parquet     all of it is the split "train"
    a folder of these                        split by file name: train*, validation*, test*
    owner/name                               a data set of the hub
    reasoning-gym:<task>?<setting>=<value>   see tasks.py

Nothing is lost silently: a line that does not parse is an error that names it, and only blank
lines are skipped. Local text files are held in memory, some three times their size while read.
"""

import csv
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from chunkft.data.shapes import DECISIVE, Wanted, check_shape, superfluous
from chunkft.data.tasks import PREFIX, ReasoningGymTask, split_records
from chunkft.errors import InputError

Rows = Iterator[tuple[str, dict[str, Any]]]  # (place, record)

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FILE_NAME = re.compile(r".*\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zst|zip|xlsx?|ya?ml)", re.I)
UNDERSTOOD = f"a .jsonl, .json, .csv, .parquet file, a folder of these, a hub id, {PREFIX}<task>"


def load_records(
    source: str,
    *,
    split: str = "train",
    size: int | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    text_field: str = "text",
    wanted: Wanted = "training",
    exclude: Dataset | None = None,
) -> Dataset:
    """Records in one of TRL's shapes (shapes.py); for training `messages` | `prompt`, `completion`
    | `text`.

    Args:
        source: see the head of this file.
        split: a file has only "train"; of a task every other split is held out.
        size: at most so many: drawn with `seed` where records exist, made where they are made.
            None: all there are; of a task 2000 for training, 200 held out.
        seed: of the draw, or of the task.
        config: settings of a task, or what `datasets.load_dataset` takes (name, revision, ...).
        text_field: the column of text records (TRL: --dataset_text_field).
        wanted: what the records are for: "training", "preference" or "prompt".
        exclude: the training records; held-out items of a task that occur there are dropped.

    Raises:
        InputError: in one line, what is wrong, where, and what would do.
    """
    if size is not None and size < 1:
        raise InputError(f"size {size} is below 1: at least one record of {source} is needed")
    if source.startswith(PREFIX):
        task = ReasoningGymTask.parse(source, config)
        return split_records(task, split, size, seed, exclude, wanted)
    path = Path(source).expanduser()
    if path.exists():
        if config:
            warnings.warn(f"{source}: config has no effect on local files", stacklevel=2)
        read = _from_folder if path.is_dir() else _from_file
        dataset = read(path, split, text_field, wanted)
    else:
        dataset = _from_hub(source, split, dict(config or {}), text_field, wanted)
    return _drawn(dataset, size, seed, source)


def _drawn(dataset: Dataset, size: int | None, seed: int, source: str) -> Dataset:
    """`size` records drawn without replacement: the first ones may all be of one kind."""
    if size is None or size == len(dataset):
        return dataset
    if size > len(dataset):
        warnings.warn(f"{source} has {len(dataset)} records, {size} were asked for", stacklevel=3)
        return dataset
    return dataset.shuffle(seed=seed).select(range(size))


def _from_file(path: Path, split: str, text_field: str, wanted: Wanted) -> Dataset:
    if split != "train":
        raise InputError(
            f"{path}: a file has no split {split!r}, all of it is 'train'; name a folder with "
            f"train{path.suffix} and {split}{path.suffix}"
        )
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path}: unknown kind {path.suffix!r}; needed is {UNDERSTOOD}")
    return _read_all([path], text_field, wanted)


def _from_folder(folder: Path, split: str, text_field: str, wanted: Wanted) -> Dataset:
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        return _saved(folder, split, text_field, wanted)
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in READERS)
    if not files:
        raise InputError(f"{folder}: no data file in this folder; needed is {UNDERSTOOD}")
    splits = {file: _split_of(file) for file in files}
    if not any(splits.values()):  # nothing is named after a split, so all of it is for training
        splits = dict.fromkeys(files, "train")
    named = _split_of(Path(split)) or split
    chosen = [file for file in files if splits[file] == named]
    if not chosen:
        there = ", ".join(sorted({s for s in splits.values() if s}))
        raise InputError(f"{folder}: no split {split!r}; the files' names say {there}")
    if nameless := [file.name for file in files if splits[file] is None]:
        warnings.warn(
            f"{folder}: {', '.join(nameless)} not used, named after no split", stacklevel=3
        )
    return _read_all(chosen, text_field, wanted)


def _split_of(file: Path) -> str | None:
    """The split that a file's name begins with: `test-00000-of-00001.parquet` is of "test"."""
    first = re.split(r"[^a-z]", file.stem.lower())[0]
    return next((split for split, words in SPLIT_WORDS.items() if first in words), None)


def _saved(folder: Path, split: str, text_field: str, wanted: Wanted) -> Dataset:
    """What `save_to_disk` of datasets wrote."""
    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise InputError(f"{folder}: no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return _shaped(loaded, str(folder), text_field, wanted)


def _from_hub(
    source: str, split: str, config: dict[str, Any], text_field: str, wanted: Wanted
) -> Dataset:
    if FILE_NAME.fullmatch(source) or not HUB_ID.fullmatch(source):
        raise InputError(f"{source}: no such file or folder; needed is {UNDERSTOOD}")
    try:
        loaded = datasets.load_dataset(source, split=split, **config)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{source}: neither a file nor a folder, and the hub says: {reason} "
            f"(split {split!r}); needed is {UNDERSTOOD}"
        ) from error
    return _shaped(loaded, source, text_field, wanted)


def _read_all(files: list[Path], text_field: str, wanted: Wanted) -> Dataset:
    """The records of these files, one shape and one table: text formats first, then Parquet."""
    parts = {str(file): _part(file) for file in files}
    rows = [row for part in parts.values() if isinstance(part, list) for row in part]
    tables = {name: part for name, part in parts.items() if isinstance(part, Dataset)}
    numbered = (_numbered(table, name, text_field) for name, table in tables.items())
    shape = check_shape(chain(rows, *numbered), text_field, wanted)
    try:
        made = [_table(rows)] if rows else []
        whole = datasets.concatenate_datasets([*made, *tables.values()])
    except (ValueError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{files[0].parent}: its files do not fit together: {reason}") from error
    return whole.remove_columns(superfluous(shape, whole.column_names))


def _part(file: Path) -> Dataset | list[tuple[str, dict[str, Any]]]:
    """A file's records: a table where the file holds one, else (place, record) pairs."""
    try:
        read = READERS[file.suffix.lower()](file)
        part = read if isinstance(read, Dataset) else list(read)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if not len(part):
        raise InputError(f"{file}: 0 records, the file is empty; at least 1 is needed")
    return part


def _table(rows: list[tuple[str, dict[str, Any]]]) -> Dataset:
    # from_list looks for columns in the first record only
    columns = list(dict.fromkeys(key for _, record in rows for key in record))
    full = [{key: record.get(key) for key in columns} for _, record in rows]
    # a further column may hold any JSON: it is kept as it is
    return Dataset.from_list(full, on_mixed_types="use_json")


def _shaped(dataset: Dataset, name: str, text_field: str, wanted: Wanted) -> Dataset:
    """A table from elsewhere, checked record by record."""
    if not len(dataset):
        raise InputError(f"{name}: 0 records; at least 1 is needed")
    shape = check_shape(_numbered(dataset, name, text_field), text_field, wanted)
    return dataset.remove_columns(superfluous(shape, dataset.column_names))


def _numbered(dataset: Dataset, name: str, text_field: str) -> Rows:
    names = dataset.column_names
    # other columns may be pictures, which nobody needs decoded for this
    seen = [n for n in names if n in DECISIVE or n == text_field] or names
    records = cast(Iterable[dict[str, Any]], dataset.select_columns(seen))
    for number, record in enumerate(records, 1):
        yield f"{name}: record {number}", record


def _jsonl(path: Path) -> Rows:
    # bytes, so that a line ends at \n alone and a wrong byte is found in its line
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}: line {number}"
                yield place, _object(_parsed(line, place), place)


def _json(path: Path) -> Rows:
    """A list of records; anything else is read as one record a line."""
    text = path.read_bytes()
    if not text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _jsonl(path)
        return
    for number, record in enumerate(_parsed(text, str(path)), 1):
        place = f"{path}: record {number}"
        yield place, _object(record, place)


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        raise InputError(f"{place}: broken JSON, {error.msg} at {where} {error.colno}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8, byte {error.start + 1}; convert the file") from None
    except KeyError as error:
        raise InputError(f"{place}: key {error} occurs twice; one would be lost") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise KeyError(key)
        made[key] = value
    return made


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f'{place}: {type(value).__name__}, needs an object {{"text": ...}}')
    return value


def _csv(path: Path) -> Rows:
    """A header, then as many fields a row; every field is text, also `NA` and `12`."""
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than the 128 KiB allowed
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise InputError(f"{path}: line 1: a column occurs twice in {', '.join(header)}")
            for fields in filter(None, reader):
                place = f"{path}: line {reader.line_num}"
                if len(fields) != len(header):
                    raise InputError(
                        f"{place}: {len(fields)} fields, the header has {len(header)}; "
                        f"put quotes around commas and line breaks"
                    )
                yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: broken CSV, {error}") from None
    except UnicodeDecodeError:
        last = reader.line_num
        raise InputError(f"{path}: not UTF-8 after line {last}; convert the file") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Dataset:
    try:
        return Dataset(pq.read_table(path))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: broken Parquet, {reason}") from error


READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
