"""Records come from every source in one shape; each bad input is one line that names the place."""

import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from chunkft.data import sources
from chunkft.data.sources import load_records
from chunkft.errors import InputError

TEXT = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
PAIRS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "3"}]
CHAT = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
]
CHAT_PAIRS = [
    {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "hello"}],
    }
]


def write(path: Path, records: list[Any]) -> Path:
    """In the format that the suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        Dataset.from_list(records).to_csv(str(path), index=False)
    else:
        Dataset.from_list(records).to_parquet(str(path))
    return path


def refused(source: Path | str, match: str, **settings: Any) -> str:
    with pytest.raises(InputError, match=match) as caught:
        load_records(str(source), **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("records", [TEXT, PAIRS, CHAT, CHAT_PAIRS])
def test_every_shape_from_every_format(tmp_path: Path, records: list[Any], suffix: str) -> None:
    assert load_records(str(write(tmp_path / f"data{suffix}", records))).to_list() == records


@pytest.mark.parametrize("records", [TEXT, PAIRS])
def test_csv(tmp_path: Path, records: list[Any]) -> None:
    assert load_records(str(write(tmp_path / "data.csv", records))).to_list() == records


def test_csv_keeps_every_field_as_text(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    long = "x" * 200_000
    path.write_text(f'prompt,completion\nNA,012\n\n"a, ""b""\nc",{long}\n', encoding="utf-8-sig")
    assert load_records(str(path)).to_list() == [
        {"prompt": "NA", "completion": "012"},
        {"prompt": 'a, "b"\nc', "completion": long},
    ]


def test_blank_lines_and_unusual_line_ends_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\n  \n{"text": "c"}'.encode())
    assert load_records(str(path))["text"] == ["a\u2028b", "c"]


def test_json_may_hold_a_record_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert load_records(str(path))["text"] == ["a", "b"]


def test_further_columns_survive_whatever_they_hold(tmp_path: Path) -> None:
    records = [
        {"text": "a"},
        {"text": "b", "id": 1},
        {"text": "c", "id": "x", "z": {"k": [1, "y"]}},
    ]
    loaded = load_records(str(write(tmp_path / "data.jsonl", records)))
    assert loaded["id"] == [None, 1, "x"]
    assert loaded[2]["z"] == {"k": [1, "y"]}


def test_tool_calls_need_no_content(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    path = write(tmp_path / "data.jsonl", [{"messages": [*CHAT[0]["messages"], call]}])
    assert load_records(str(path))[0]["messages"][2]["tool_calls"] == [{"name": "f"}]


def test_a_column_of_a_second_shape_is_left_out_aloud(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [CHAT[0] | {"prompt": "hi", "id": 1}])
    with pytest.warns(UserWarning, match="left out: prompt"):
        assert load_records(str(path)).column_names == ["messages", "id"]


def test_another_text_column(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"body": "a"}])
    assert load_records(str(path), text_field="body")["body"] == ["a"]
    refused(path, "data.jsonl: line 1: unknown columns body; understood are .*text")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "", '{"text": "b"'], "line 3: broken JSON, .* at column"),
        (['{"text": "a"}', "[1]"], "line 2: list, needs an object"),
        (['{"text": "a"}', '{"text": null}'], "line 2: 'text' is null, needs text"),
        (['{"text": 12}'], "line 1: 'text' is int 12, needs text"),
        (['{"text": "a"}', '{"txt": "a"}'], "line 2: unknown columns txt; understood are messages"),
        (['{"text": "a", "text": "b"}'], "line 1: key 'text' occurs twice"),
        (['{"text": "a"}', json.dumps(PAIRS[0])], "line 2: .*prompt-completion .*before.*text"),
        ([json.dumps(PAIRS[0]), json.dumps(CHAT_PAIRS[0])], "line 2: .*messages.*those before"),
        (['{"prompt": "a", "completion": null}'], "line 1: 'completion' is null"),
        (['{"prompt": "a", "completion": []}'], "must both be text or both be lists"),
        (['{"prompt": "a"}'], "line 1: unknown columns prompt"),
        (['{"messages": []}'], r"line 1: 'messages' is list \[\], needs a list of messages"),
        (['{"messages": "hi"}'], "'messages' is str 'hi'"),
        (['{"messages": ["hi"]}'], "message 1 is str 'hi', needs role, content"),
        (['{"messages": [{"role": "user"}]}'], "message 1: 'content' is missing"),
        (['{"messages": [{"content": "a"}]}'], "message 1: 'role' is missing"),
        (['{"messages": [{"role": "user", "content": null}]}'], "message 1: 'content' is null"),
        ([], "0 records, the file is empty"),
        (["", " "], "0 records, the file is empty"),
    ],
)
def test_bad_jsonl(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    assert refused(path, message).startswith(str(path))


def test_a_wrong_byte_is_found_in_its_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    refused(path, "line 2: not UTF-8, byte 11")
    path = tmp_path / "data.csv"
    path.write_bytes(b"text\na\n\xff\n")
    refused(path, "not UTF-8 after line")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", '[{"text": "a"},\n {"text": }]', "broken JSON, .* at line 2, column 11"),
        ("data.json", "[]", "0 records"),
        ("data.json", '[{"text": "a"}, 3]', "record 2: int, needs an object"),
        ("data.csv", "text,id\na,1\nb\n", "line 3: 1 fields, the header has 2"),
        ("data.csv", "prompt,completion\na,b,c\n", "line 2: 3 fields, the header has 2"),
        ("data.csv", 'text\n"a\nb', "line 3: broken CSV"),
        ("data.csv", "text,text\na,b\n", "line 1: a column occurs twice"),
        ("data.csv", "text\n", "0 records"),
        ("data.csv", "words\na\n", "line 2: unknown columns words"),
        ("data.parquet", "nothing of the kind", "broken Parquet"),
        ("data.txt", "a text", "unknown kind '.txt'; needed is"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, message)


def test_bad_records_of_a_table_are_numbered(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", [*TEXT, {"text": None}])
    refused(path, "record 4: 'text' is null")


@pytest.mark.parametrize("name", ["nope.jsonl", "a/b/c/d", "/nowhere/at/all", "~/nope", "nope.txt"])
def test_what_is_not_there_is_not_looked_for_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    refused(name, "no such file or folder; needed is")


def test_size_draws_by_seed(tmp_path: Path) -> None:
    records = [{"text": str(i)} for i in range(50)]
    path = str(write(tmp_path / "data.jsonl", records))
    ten = load_records(path, size=10)["text"]
    assert len(set(ten)) == 10
    assert ten == load_records(path, size=10)["text"]
    assert ten != load_records(path, size=10, seed=1)["text"]
    assert load_records(path, size=50).to_list() == records
    with pytest.warns(UserWarning, match="has 50 records, 60 were asked for"):
        assert len(load_records(path, size=60)) == 50
    refused(path, "size 0 is below 1", size=0)


def test_settings_without_effect_and_splits_that_are_not(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", TEXT)
    with pytest.warns(UserWarning, match="config has no effect"):
        load_records(str(path), config={"name": "x"})
    refused(path, "a file has no split 'test'", split="test")


def test_a_folder_is_split_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", TEXT[:1])
    write(tmp_path / "train-1.parquet", TEXT[1:2])
    write(tmp_path / "test.csv", TEXT[2:])
    (tmp_path / "README.md").write_text("about")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_records(str(tmp_path))["text"] == ["one", "two"]
        assert load_records(str(tmp_path), split="test")["text"] == ["three"]
    refused(tmp_path, "no split 'validation'; the files' names say test, train", split="validation")
    write(tmp_path / "more.jsonl", TEXT)
    with pytest.warns(UserWarning, match=r"more.jsonl not used"):
        load_records(str(tmp_path))


def test_a_folder_without_split_names_is_all_for_training(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", TEXT[1:])
    write(tmp_path / "a.json", TEXT[:1])
    assert load_records(str(tmp_path)).to_list() == TEXT
    write(tmp_path / "c.jsonl", PAIRS)
    refused(tmp_path, r"c.jsonl: line 1: .*prompt-completion.*those before it are text")
    (tmp_path / "c.jsonl").unlink()
    write(tmp_path / "c.parquet", PAIRS)
    refused(tmp_path, r"c.parquet: record 1: .*prompt-completion.*those before it are text")


def test_bad_folders(tmp_path: Path) -> None:
    refused(tmp_path, "no data file in this folder")
    write(tmp_path / "a.jsonl", [{"text": "a", "id": "x"}])
    write(tmp_path / "b.parquet", [{"text": "a", "id": [1]}])
    refused(tmp_path, "its files do not fit together")
    (tmp_path / "b.parquet").unlink()
    (tmp_path / "b.jsonl").touch()
    refused(tmp_path, "b.jsonl: 0 records")


def test_what_datasets_saved(tmp_path: Path) -> None:
    Dataset.from_list(TEXT).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": Dataset.from_list(PAIRS)}).save_to_disk(tmp_path / "two")
    assert load_records(str(tmp_path / "one")).to_list() == TEXT
    assert load_records(str(tmp_path / "two")).to_list() == PAIRS
    refused(tmp_path / "two", "no split 'test'; it has train", split="test")


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, **settings: Any) -> Dataset:
        asked.append((path, settings))
        if path == "no/such":
            raise ConnectionError("Couldn't reach 'no/such'\non the Hub")
        return Dataset.from_list(TEXT)

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    assert load_records("owner/name", split="test", config={"name": "en"}).to_list() == TEXT
    assert asked == [("owner/name", {"split": "test", "name": "en"})]
    refused("no/such", "no/such: neither a file nor a folder, and the hub says: Couldn't reach")
