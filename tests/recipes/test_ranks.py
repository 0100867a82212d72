"""`torchrun -m chunkft sft`: the same command on several ranks, and what they save."""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from chunkft.cli import main
from chunkft.train import sharding
from tests.conftest import assert_close
from tests.ranks import on_ranks
from tests.recipes.conftest import metrics, same, weights

STEPS = 8


def command(rank, words):
    """What a rank tells, and its exit code."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def sft(tiny_model, records, tmp_path):
    """Run the command on so many ranks; returns the output directory and what was told."""

    def call(ranks, out, *more, model=tiny_model, batch=8, code=0):
        folder = tmp_path / out
        words = ["sft", "--model_name_or_path", str(model), "--output_dir", str(folder)]
        words += ["--dataset_name", str(records), "--max_steps", str(STEPS), "--logging_steps", "1"]
        words += ["--per_device_train_batch_size", str(batch // ranks), "--disable_tqdm", "true"]
        words += ["--dtype", "float32", "--adam_epsilon", "1e-4", "--learning_rate", "1e-2"]
        words += ["--bf16", "false"]
        words += map(str, more)
        found = on_ranks(ranks, command, words) if ranks > 1 else [command(0, words)]
        assert [c for c, _, _ in found] == [code] * ranks, found
        return folder, found

    return call


DROP = ("--dataloader_drop_last", "true")
CHUNKS = ("--chunks", 4, "--interval", 1)
WAYS = {
    "spread": CHUNKS,
    "stream": (*CHUNKS, "--layout", "stream", "--gradient_accumulation_steps", 2),
    "exact": ("--method", "exact", "--max_grad_norm", 0.1),
    "lora": ("--method", "lora"),
    "padded": ("--method", "exact", "--padding_free", "false"),
    # the last rows of an epoch are dealt otherwise to two ranks
    "packed": ("--method", "exact", "--packing", "true", "--max_length", 64, *DROP),
}


def check_same_run(one, two):
    for x, y in zip(metrics(one)["history"], metrics(two)["history"], strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-4)
    assert metrics(two)["after"] == pytest.approx(metrics(one)["after"], rel=1e-5)


def check_close(one, two, relative=1e-4):
    expected, found = weights(one), weights(two)
    for name, weight in found.items():
        assert_close(weight, expected[name], relative)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one(sft, way):
    alone, _ = sft(1, "alone", *WAYS[way])
    folder, told = sft(2, "two", *WAYS[way])
    assert "averaged a step" in (folder / "report.md").read_text()
    assert told[1][1] == ""  # one tells
    check_same_run(alone, folder)
    if way != "lora":
        check_close(alone, folder)


@pytest.mark.parametrize("way", ["exact", "lora", "padded", "packed"])
def test_sharded_ranks_train_as_one(sft, way, tmp_path):
    """Where a run is the same however rows are cut into chunks."""
    alone, _ = sft(1, "alone", *WAYS[way])
    folder, told = sft(2, "two", "--shard", "fsdp", *WAYS[way])
    assert "sharded over 2 ranks (FSDP2)" in told[0][1]
    check_same_run(alone, folder)
    if way == "lora":
        one, two = (load_file(f / "adapter_model.safetensors") for f in (alone, folder))
        assert one.keys() == two.keys()
        for name, weight in one.items():
            assert_close(two[name], weight, 1e-4)
        return
    assert not list(folder.glob("*.safetensors"))
    assert main(["consolidate", str(folder), str(tmp_path / "plain")]) == 0
    check_close(alone, tmp_path / "plain")


ROWS = {"packed": WAYS["packed"][2:], "padded": ("--padding_free", "false", *DROP)}
METHODS = {
    "spread": (*CHUNKS, "--layout", "spread"),
    "stream": (*CHUNKS, "--layout", "stream"),
    "exact": WAYS["exact"],
    "lora": WAYS["lora"],
}
ALL_AT_ONCE = ("--gradient_accumulation_steps", 2, "--gradient_checkpointing", "true")
ALL_AT_ONCE = (*ALL_AT_ONCE, "--max_grad_norm", 0.1, "--save_steps", 4)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one_in_every_way(sft, ranks, shard, method, rows, tmp_path):
    """Accumulated, clipped and checkpointed; in chunks of shards one process goes on with them."""
    words = (*METHODS[method], *ROWS[rows], *ALL_AT_ONCE)
    folder, _ = sft(ranks, "ranks", "--shard", shard, *words)
    begun = ()
    if shard == "fsdp" and method in ("spread", "stream"):
        begun = ("--resume_from_checkpoint", folder / "checkpoint-4")
    alone, _ = sft(1, "alone", *words, *begun)
    both = (metrics(f)["history"] for f in (alone, folder))
    for x, y in zip(*(history[4 if begun else 0 :] for history in both), strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-4)
    if method == "lora":
        return
    if shard == "fsdp":
        assert main(["consolidate", str(folder), str(tmp_path / "plain")]) == 0
        folder = tmp_path / "plain"
    check_close(alone, folder)


@pytest.mark.parametrize("layout", ["spread", "stream"])
def test_a_sharded_run_goes_on_with_any_number_of_ranks(sft, layout, tmp_path):
    common = (*CHUNKS, "--layout", layout, "--save_steps", 5)
    whole, _ = sft(2, "whole", "--shard", "fsdp", *common)
    assert main(["consolidate", str(whole), str(tmp_path / "plain")]) == 0
    assert main(["consolidate", str(whole / "checkpoint-8"), str(tmp_path / "last")]) == 0
    assert same(tmp_path / "plain", tmp_path / "last")
    begun = str(whole / "checkpoint-5")
    assert main(["consolidate", begun, str(tmp_path / "begun")]) == 0
    assert not same(tmp_path / "plain", tmp_path / "begun")
    resumed = (*common, "--resume_from_checkpoint", begun)
    again, _ = sft(2, "again", "--shard", "fsdp", *resumed)
    assert main(["consolidate", str(again), str(tmp_path / "again-plain")]) == 0
    assert same(tmp_path / "plain", tmp_path / "again-plain")  # to the bit
    alone, told = sft(1, "one", *resumed)
    assert "resuming from" in told[0][1]
    check_close(tmp_path / "plain", alone)
    replicas, _ = sft(2, "replicas", "--shard", "ddp", *resumed)
    check_close(tmp_path / "plain", replicas)
    other, _ = sft(1, "other", *common[2:], "--chunks", 2, *resumed[-2:])
    sharded, _ = sft(2, "sharded", "--shard", "fsdp", *common[2:], "--chunks", 2, *resumed[-2:])
    assert main(["consolidate", str(sharded), str(tmp_path / "other-plain")]) == 0
    check_close(other, tmp_path / "other-plain")


def test_a_run_of_one_goes_on_sharded(sft, tmp_path):
    common = ("--method", "exact", "--save_steps", 5)
    alone, _ = sft(1, "alone", *common)
    resumed = (*common, "--resume_from_checkpoint", alone / "checkpoint-5")
    sharded, _ = sft(2, "sharded", "--shard", "fsdp", *resumed)
    assert main(["consolidate", str(sharded), str(tmp_path / "plain")]) == 0
    check_close(alone, tmp_path / "plain")


def test_what_does_not_go_together_is_refused_on_all_ranks(sft, tmp_path):
    _, told = sft(1, "one", "--shard", "fsdp", code=2)
    assert "needs several processes: torchrun" in told[0][2]
    _, told = sft(2, "theirs", "--fsdp", "full_shard", *CHUNKS, code=2)
    assert "leave them out and give --shard fsdp" in told[1][2]
    _, told = sft(2, "both", "--shard", "fsdp", "--stream_weights", code=2)
    assert "--stream_weights with --shard fsdp" in told[1][2]
    folder, _ = sft(2, "full", *CHUNKS)
    _, told = sft(2, "full", *CHUNKS, code=2)
    for rank, (_, _, error) in enumerate(told):
        assert f"error on rank {rank}: --output_dir {folder} holds another run" in error
    with pytest.raises(SystemExit):
        main(["consolidate"])
    assert main(["consolidate", str(folder), str(tmp_path / "out")]) == 2


def test_weights_that_fit_are_not_sharded(sft):
    _, told = sft(2, "fits", *CHUNKS, "--max_steps", 8)
    assert "FSDP2" not in told[0][1]


@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_ranks_are_planned(sft, shard):
    """Of a CPU the memory is a process's, which takes a GiB before it holds a tensor."""
    folder, told = sft(2, "planned", "--shard", shard, "--memory", "1.01GiB")
    assert "plan for 1.01GiB" in told[0][1]
    where = "sharded over 2 ranks" if shard == "fsdp" else "on the device"
    assert f"weights {where}" in told[0][1]
    assert metrics(folder)["steps"] == STEPS
    _, told = sft(2, "none", "--shard", shard, "--memory", "100KB", code=2)
    for rank, (_, _, error) in enumerate(told):
        assert f"error on rank {rank}: needs 1.0" in error


def generate(rank, folder, count):
    """Answers of a sharded model to this rank's prompts, which end at different lengths."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = torch.arange(3, 3 + 8).reshape(2, 4)
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    end = model.generate(prompts[:1], **settings, eos_token_id=None)[0, 6].item()
    alone = model.generate(prompts[rank : rank + 1], **settings, eos_token_id=end)
    sharding.shard(model, torch.device("cpu"))
    found = model.generate(prompts[rank : rank + 1], **settings, eos_token_id=end)
    return found.shape[1], torch.equal(found[:, : alone.shape[1]], alone)


def test_a_rank_whose_answers_are_done_waits(tiny_model):
    (first, same_first), (second, same_second) = on_ranks(2, generate, str(tiny_model), 2)
    assert first < second
    assert same_first
    assert same_second
