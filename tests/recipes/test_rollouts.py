"""`chunkft grpo` and `chunkft rloo`, called as a user calls them, on a tiny model."""

import copy
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from chunkft.cli import main
from chunkft.recipes import rollouts
from chunkft.recipes.records import Data
from chunkft.train import adalora
from chunkft.train.config import ChunkArguments
from tests.recipes.conftest import metrics, same

STEPS = 4
REWARDS = """
import math, time

def text(x):
    return x if isinstance(x, str) else x[-1]["content"]

def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text(x)) / 10 for x in completions]

def some(completions, **_):
    return [None if i % 2 else 1.0 for i, _ in enumerate(completions)]

async def later(completions, **_):
    return vowels(completions)

def raises(completions, trainer_state, **_):
    if trainer_state.global_step >= 2:
        raise KeyError("no such key")
    return vowels(completions)

def late_nan(completions, trainer_state, **_):
    return [math.nan if trainer_state.global_step >= 2 else 0.5 for _ in completions]

def short(completions, **_):
    return [1.0]

def words(completions, **_):
    return ["good" for _ in completions]

def nothing(completions, **_):
    return None

def hangs(completions, **_):
    time.sleep(60)

number = 3
"""


@pytest.fixture
def call(tiny_model, tmp_path, capsys, monkeypatch):
    """Run a command; returns (exit code, stdout, stderr, output directory)."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"say {i}:"}) for i in range(32)) + "\n")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_rewards", None)

    def call(*more, command="grpo", out="run", data=prompts, reward="vowels", model=tiny_model):
        folder = tmp_path / out
        words = [command, "--model_name_or_path", str(model), "--output_dir", str(folder)]
        words += ["--dataset_name", str(data), "--max_steps", str(STEPS), "--logging_steps", "1"]
        words += ["--per_device_train_batch_size", "8", "--num_generations", "4"]
        words += ["--max_completion_length", "12", "--learning_rate", "1e-2"]
        words += ["--disable_tqdm", "true", *map(str, more)]
        words += ["--reward_funcs", f"my_rewards.{reward}"] if reward else []
        code = main(words)
        told = capsys.readouterr()
        return code, told.out, told.err, folder

    call.model = tiny_model
    return call


CHUNK, EXACT = ["--method", "chunk", "--chunks", 2], ["--method", "exact", "--chunks", 2]
LORA = ["--method", "lora"]


@pytest.mark.parametrize(
    ("command", "method"),
    [
        *[("grpo", CHUNK), ("grpo", LORA), ("rloo", CHUNK)],
        pytest.param("grpo", EXACT, marks=pytest.mark.slow),
        pytest.param("rloo", EXACT, marks=pytest.mark.slow),
        pytest.param("rloo", LORA, marks=pytest.mark.slow),
    ],
)
def test_it_begins_at_kl_0_and_trains(call, command, method):
    code, _, err, folder = call(*method, "--beta", 0.1, command=command)
    assert code == 0, err
    found = metrics(folder)
    assert abs(found["history"][0]["kl"]) < 1e-6
    assert found["history"][-1]["kl"] > 1e-4
    assert "mean reward" in found["before"] and "mean reward" in found["after"]
    count = f"{found['parameters']:,}"
    report = (folder / "report.md").read_text()
    assert f"{count} of {count} trainable elements were trained" in report
    assert "| beta | 0.1 |" in report
    for name in ("loss", "reward", "kl"):
        assert f"({name}.png)" in report and (folder / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize("method", [["--method", "prompt"], ["--method", "pissa"]])
def test_other_adapters(call, method):
    code, _, err, _ = call(*method, "--beta", 0.1)
    assert (code == 2) == (method[1] == "pissa"), err
    if code:
        assert "with the adapter off the model is not its base" in err
        code, _, err, _ = call(*method, "--beta", 0.1, "--reference", "copy", out="copy")
        assert code == 0, err


def test_no_reference_without_kl(call):
    """As TRL's default has it: no copy is made, and none can be asked for."""
    code, _, err, folder = call(*CHUNK)
    assert code == 0, err
    assert "kl" not in metrics(folder)["history"][0]
    code, _, err, _ = call(*CHUNK, "--reference", "copy", out="copy")
    assert code == 2 and "--beta 0" in err


def test_another_reference_stops_the_run(call, monkeypatch):
    def elsewhere(job, model):
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in reference.parameters():
            parameter.data *= 2
        return reference

    monkeypatch.setattr(rollouts, "_reference", elsewhere)
    for command in ("grpo", "rloo"):
        code, _, err, _ = call(*CHUNK, "--beta", 0.1, command=command, out=command)
        assert code == 2 and "KL from the reference" in err


def test_chunks_move_with_optimizer_steps_and_not_with_generations(call):
    """Two micro-batches a step, and every batch of completions serves two steps."""
    more = ["--gradient_accumulation_steps", 2, "--steps_per_generation", 4]
    code, _, err, folder = call(*CHUNK, "--interval", 1, *more)
    assert code == 0, err
    assert [row["chunk"] for row in metrics(folder)["history"]] == [0, 1, 0, 1]


def test_what_is_generated_is_from_the_weights_as_they_are(call, monkeypatch):
    """Each generation's log-probabilities are those of the policy that is trained next."""
    seen = []
    stock = rollouts.RolloutTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        text = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logits = self.model(input_ids=text, attention_mask=mask).logits[:, :-1].float()
        greedy = logits.argmax(-1)[:, -inputs["completion_ids"].shape[1] :]
        hit = (greedy == inputs["completion_ids"]) | (inputs["completion_mask"] == 0)
        seen.append(hit.float().mean().item())
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(rollouts.RolloutTrainer, "compute_loss", spy)
    code, _, err, _ = call(*CHUNK, "--temperature", 1e-4)  # the likeliest token, but for ties
    assert code == 0, err
    assert len(seen) >= STEPS and min(seen) > 0.9


@pytest.mark.parametrize("method", [CHUNK, LORA], ids=["chunk", "lora"])
def test_resumes_to_the_bit(call, method):
    common = [*method, "--beta", 0.1, "--save_steps", 1]
    code, _, err, whole = call(*common, out="whole")
    assert code == 0, err
    torn = shutil.copytree(whole, whole.parent / "torn")
    for step in (3, 4):
        (torn / f"checkpoint-{step}" / "chunkft_manifest.json").unlink()
    code, out, err, _ = call(*common, "--resume_from_checkpoint", out="torn")
    assert code == 0, err
    assert "checkpoint-2" in out
    a, b = metrics(whole)["history"], metrics(torn)["history"]
    for name in ("loss", "reward", "kl", "grad_norm"):
        assert [row[name] for row in a] == [row[name] for row in b]
    if method is CHUNK:
        assert same(whole, torn)


def test_streamed_is_resident_to_the_bit(call):
    assert call(*CHUNK, "--beta", 0.1, out="resident")[0] == 0
    code, out, err, folder = call(*CHUNK, "--beta", 0.1, "--stream-weights", out="streamed")
    assert code == 0, err
    assert out.count("units of") == 2  # policy and reference
    assert same(folder, folder.parent / "resident")


def test_some_completions_may_have_no_score(call):
    code, _, err, _ = call(*CHUNK, reward="some")
    assert code == 0, err


FAILING = {
    "raises": ("reward raises: KeyError: 'no such key'", True),
    "late_nan": ("reward late_nan returned nan for completion 0 of 8", True),
    "short": ("reward short returned 1 values for", False),
    "words": ("reward words returned 'good' for completion 0", False),
    "nothing": ("reward nothing returned a NoneType", False),
    "hangs": ("reward hangs took more than 1 s", False),
    "number": ("is a int, no function", False),
    "missing": ("has no attribute 'missing'", False),
}


@pytest.mark.parametrize("reward", FAILING)
def test_a_reward_that_fails_is_named_and_costs_no_checkpoint(call, reward):
    told, late = FAILING[reward]
    # rewards of the steps themselves: the evaluation before training is at step 0
    more = ["--save_steps", 1, "--reward_timeout", 1 if reward == "hangs" else 60]
    code, _, err, _ = call(*CHUNK, *more, reward=reward)
    assert code == 2 and told in err
    if late:
        code, out, err, _ = call(*CHUNK, *more, "--resume_from_checkpoint")
        assert code == 0 and "checkpoint-2" in out, err


def test_a_run_needs_prompts_and_a_reward(call, tmp_path):
    code, _, err, _ = call(reward=None)
    assert code == 2 and "no reward" in err
    for name, rows, told in (
        ("none", [], "the file is empty"),
        ("blank", [{"prompt": "  "}], "is empty"),
        ("other", [{"text": "x"}], "'prompt' is missing"),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, _, err, folder = call(data=path, out=name)
        assert code == 2 and told in err and f"{name}.jsonl" in err
        assert not any(folder.iterdir())


def test_a_task_is_its_own_reward(call):
    code, _, err, folder = call(
        *CHUNK, "--train_samples", 16, "--score_samples", 4, reward=None,
        data="reasoning-gym:spell_backward?max_word_len=4",
    )  # fmt: skip
    assert code == 0, err
    found = metrics(folder)
    assert set(found["after"]) == {"exact-match accuracy", "mean score"}
    assert "rewards/spell_backward/mean" in found["history"][0]


def test_a_reward_model_scores_as_trained(call, tmp_path):
    path = tmp_path / "preferences.jsonl"
    rows = [{"prompt": f"{i}:", "chosen": " a", "rejected": " b"} for i in range(16)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = ["reward", "--model_name_or_path", str(call.model), "--dataset_name", str(path)]
    words += ["--output_dir", str(tmp_path / "judge"), "--max_steps", "2", "--chunks", "2"]
    assert main(words) == 0
    code, _, err, folder = call(
        *CHUNK, "--reward_model_name_or_path", tmp_path / "judge", reward=None
    )
    assert code == 0, err
    assert metrics(folder)["history"][0]["reward_std"] > 0


def test_more_answers_a_question_than_an_evaluation_batch(call):
    """And a reward that is awaited."""
    more = ["--num_generations", 16, "--per_device_train_batch_size", 16]
    code, _, err, folder = call(*CHUNK, *more, reward="later")
    assert code == 0, err
    assert metrics(folder)["before"]["mean reward"] > 0


def test_a_task_is_evaluated_on_the_way(call):
    code, _, err, _ = call(
        *CHUNK, "--train_samples", 16, "--score_samples", 4, "--eval_strategy", "steps",
        "--eval_steps", 2, reward=None, data="reasoning-gym:spell_backward?max_word_len=3",
    )  # fmt: skip
    assert code == 0, err


def test_a_reward_model_comes_first_as_its_weight_does():
    script = SimpleNamespace(reward_funcs="math.sqrt", reward_model_name_or_path="judge")
    job = SimpleNamespace(script=script, chunk=ChunkArguments())
    model, function = rollouts._rewards(job, Data(None))
    assert model == "judge" and function.__name__ == "sqrt"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "lora", "--beta", 0.1, "--sync_ref_model"], "--sync_ref_model with --method"),
        (["--entropy_coef", 0.1], "--entropy_coef"),
        ([*CHUNK, "--beta", 0.1, "--sync_ref_model", "--stream-weights"], "--stream_weights"),
    ],
)
def test_what_would_not_act_is_refused(call, words, told):
    code, _, err, _ = call(*words)
    assert code == 2 and told in err


def test_the_penalty_of_adalora_counts_once_a_step(call, monkeypatch):
    """Whoever divides by the micro-batches: GRPO's loss does, so the penalty must."""
    seen = {}
    stock = adalora.AdaLoraTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        monkeypatch.setattr(adalora, "penalty", lambda *_: torch.zeros(()))
        without = stock(self, model, inputs, *args, **kwargs)
        monkeypatch.setattr(adalora, "penalty", lambda *_: torch.ones(()))
        found = stock(self, model, inputs, *args, **kwargs)
        if self.run is not None and self.model.training:
            seen.setdefault(type(self).__name__, (found - without).item())
        return found

    monkeypatch.setattr(adalora.AdaLoraTrainer, "compute_loss", spy)
    for command in ("grpo", "rloo"):
        more = ["--method", "adalora", "--gradient_accumulation_steps", 4]
        code, _, err, _ = call(*more, command=command, out=command)
        assert code == 0, err
    # Trainer divides RLOO's
    assert seen == pytest.approx({"ChunkGRPOTrainer": 0.25, "ChunkRLOOTrainer": 1.0}, abs=1e-6)
