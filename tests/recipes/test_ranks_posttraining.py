"""Preferences and rollouts on two ranks, replicas and shards."""

import json
import math
import os
import shutil
import sys

import pytest
from transformers import AutoModelForSequenceClassification

from tests.ranks import on_ranks
from tests.recipes.conftest import metrics
from tests.recipes.test_dpo import rows
from tests.recipes.test_ranks import command

pytestmark = pytest.mark.slow
STEPS = 6


def command_in(rank, folder, words):
    os.chdir(folder)
    sys.path.insert(0, folder)  # where the reward is
    try:
        return command(rank, words)
    finally:
        sys.path.remove(folder)


@pytest.fixture
def run(tiny_model, tmp_path):
    """Run a command on so many ranks; returns the output directory."""
    preferences, prompts = tmp_path / "preferences.jsonl", tmp_path / "prompts.jsonl"
    preferences.write_text("\n".join(map(json.dumps, rows())) + "\n")
    prompts.write_text("\n".join(json.dumps({"prompt": f"say {i}:"}) for i in range(32)) + "\n")
    (tmp_path / "vowels.py").write_text(
        "def count(completions, **_):\n"
        "    return [sum(c in 'aeiou' for c in text) / 10 for text in completions]\n"
    )

    def call(ranks, name, *more, model=tiny_model):
        folder = tmp_path / f"{name}-{ranks}"
        rollouts = name in ("grpo", "rloo")
        data = prompts if rollouts else preferences
        words = [name, "--model_name_or_path", str(model), "--output_dir", str(folder)]
        words += ["--dataset_name", str(data), "--max_steps", str(STEPS), "--logging_steps", "1"]
        words += ["--per_device_train_batch_size", str(8 // ranks), "--disable_tqdm", "true"]
        words += ["--dtype", "float32", "--bf16", "false", "--learning_rate", "1e-2"]
        words += ["--adam_epsilon", "1e-4"]
        if rollouts:
            words += ["--reward_funcs", "vowels.count", "--num_generations", "4"]
            words += ["--max_completion_length", "12", "--beta", "0.04"]
        words += map(str, more)
        here = os.getcwd()
        try:
            found = on_ranks(ranks, command_in, str(tmp_path), words)
        finally:
            os.chdir(here)
        assert [code for code, *_ in found] == [0] * ranks, found
        return folder

    return call


CHUNK = ("--method", "chunk", "--chunks", 2, "--interval", 1)


@pytest.mark.parametrize(
    ("shard", "method"),
    [
        ("ddp", CHUNK),
        ("ddp", ("--method", "lora")),
        ("fsdp", ("--method", "exact")),
        ("fsdp", ("--method", "lora")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_preferences_on_two_ranks_are_those_of_one(run, name, shard, method, tiny_model, tmp_path):
    begun = tiny_model
    if name == "reward":  # a head of random numbers would be drawn in the checkpoint's dtype
        begun = tmp_path / "begun"
        shutil.copytree(tiny_model, begun)
        head = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
        head.save_pretrained(begun)
    two = run(2, name, "--shard", shard, *method, model=begun)
    one = run(1, name, *method, model=begun)
    if name == "dpo":
        assert metrics(two)["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for x, y in zip(metrics(one)["history"], metrics(two)["history"], strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-4)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", [CHUNK, ("--method", "lora")], ids=["chunk", "lora"])
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_two_ranks_learn_from_rewards(run, name, method, shard):
    """Answers are drawn by each rank for itself, so two ranks do not draw those of one."""
    found = metrics(run(2, name, "--shard", shard, *method))
    assert found["steps"] == STEPS
    assert all(math.isfinite(row["loss"]) for row in found["history"])
    assert all(row["grad_norm"] > 0 for row in found["history"] if row["reward_std"] > 0)
    assert found["history"][0]["kl"] == pytest.approx(0.0, abs=2e-5)  # the reference is the policy
    assert found["after"]["mean reward"] != found["before"]["mean reward"]
