"""`chunkft dpo` and `chunkft reward`, called as a user calls them, on a tiny model."""

import copy
import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from chunkft.cli import main
from chunkft.data.tasks import ReasoningGymTask
from chunkft.recipes import dpo
from tests.recipes.conftest import metrics, same

STEPS = 6
RATE = ["--learning_rate", 1e-2]


def rows(count=48):
    return [
        {"prompt": f"say {i} backward:", "chosen": f" {str(i)[::-1]}", "rejected": f" {i}{i % 7}"}
        for i in range(count)
    ]


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


@pytest.fixture
def call(tiny_model, tmp_path, capsys):
    """Run a command; returns (exit code, stdout, stderr, output directory)."""
    preferences = write(tmp_path / "preferences.jsonl", rows())

    def call(*more, command="dpo", out="run", data=preferences, model=tiny_model):
        folder = tmp_path / out
        words = [command, "--model_name_or_path", str(model), "--output_dir", str(folder)]
        words += ["--dataset_name", str(data), "--max_steps", str(STEPS), "--logging_steps", "1"]
        words += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
        code = main([*words, *map(str, more)])
        told = capsys.readouterr()
        return code, told.out, told.err, folder

    return call


CHUNK, EXACT = ["--method", "chunk", "--chunks", 2], ["--method", "exact", "--chunks", 2]


@pytest.mark.parametrize(
    "method",
    [CHUNK, EXACT, ["--method", "lora"], ["--method", "dora"], ["--method", "adalora"],
     *(pytest.param(["--method", *words], marks=pytest.mark.slow)
       for words in (["full"], ["oft", "--lora_r", 4], ["ia3"]))],
    ids=lambda words: words[1],
)  # fmt: skip
def test_it_begins_at_ln_2_and_learns(call, method):
    code, _, err, folder = call(*method, *RATE)
    assert code == 0, err
    found = metrics(folder)
    first = found["history"][0]
    bound = 1e-4 if method[1] == "dora" else 1e-6  # it divides by norms and multiplies again
    if method[1] != "adalora":  # whose training loss has its penalty
        assert first["loss"] == pytest.approx(math.log(2), abs=bound)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=bound)
    assert first["rewards/rejected"] == pytest.approx(0.0, abs=bound)
    assert found["before"]["loss"] == pytest.approx(math.log(2), abs=bound)
    assert found["before"]["rewards/margins"] == pytest.approx(0.0, abs=bound)
    assert found["after"]["rewards/margins"] > 0
    assert found["after"]["loss"] < math.log(2)
    count = f"{found['parameters']:,}"
    report = (folder / "report.md").read_text()
    assert f"{count} of {count} trainable elements were trained" in report


def test_virtual_tokens_may_begin_elsewhere(call):
    code, _, err, folder = call("--method", "prompt", *RATE)
    assert code == 0, err
    assert metrics(folder)["history"][0]["rewards/chosen"] != 0.0


def test_computed_before_is_the_copy_to_the_bit(call):
    assert call(*CHUNK, *RATE, out="before")[0] == 0
    code, _, err, folder = call(*CHUNK, *RATE, "--reference", "copy", out="copy")
    assert code == 0, err
    assert same(folder, folder.parent / "before")
    code, _, _, folder = call(*CHUNK, *RATE, "--precompute_ref_log_probs", "false", out="asked")
    assert code == 0 and same(folder, folder.parent / "before")


def test_streamed_is_resident_to_the_bit(call):
    assert call(*CHUNK, *RATE, out="resident")[0] == 0
    for reference in ("auto", "copy"):
        code, out, err, folder = call(
            *CHUNK, *RATE, "--stream-weights", "--reference", reference, out=reference
        )
        assert code == 0, err
        assert out.count("units of") == (2 if reference == "copy" else 1)
        assert same(folder, folder.parent / "resident")


@pytest.mark.parametrize("method", [CHUNK, ["--method", "lora"]], ids=["chunk", "lora"])
def test_resumes_to_the_bit(call, method):
    common = [*method, *RATE, "--save_steps", 1]
    _, _, _, whole = call(*common, out="whole")
    torn = shutil.copytree(whole, whole.parent / "torn")
    for step in range(4, STEPS + 1):
        (torn / f"checkpoint-{step}" / "chunkft_manifest.json").unlink()
    code, out, err, _ = call(*common, "--resume_from_checkpoint", out="torn")
    assert code == 0, err
    assert "checkpoint-3" in out
    assert metrics(whole)["after"] == metrics(torn)["after"]
    if method is CHUNK:
        assert same(whole, torn)


def test_another_reference_stops_the_run(call, monkeypatch):
    """As TRL's own re-reading by name would give it for a model that was edited in memory."""

    def elsewhere(job, model):
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in reference.parameters():
            parameter.data *= 1.5
        return reference

    monkeypatch.setattr(dpo, "_reference", elsewhere)
    code, _, err, folder = call(*CHUNK, "--save_steps", 1)
    assert code == 2 and "policy and reference differ by" in err
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "words", [["pissa"], ["lora", "--adapter_kwargs", '{"init_lora_weights": "olora"}']]
)
def test_an_adapter_that_changes_its_base_is_no_reference(call, words):
    code, _, err, _ = call("--method", *words)
    assert code == 2 and "with the adapter off the model is not its base" in err
    code, _, err, folder = call("--method", *words, "--reference", "copy", out="copy")
    assert code == 0, err
    assert metrics(folder)["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_other_losses_and_weighting(call):
    """What reads more of the head: WPO's weights, length desensitization."""
    words = ["--use_weighting", "--ld_alpha", 0.5, "--loss_type", "ipo"]
    code, _, err, folder = call(*CHUNK, *RATE, *words)
    assert code == 0, err
    assert all(math.isfinite(row["loss"]) for row in metrics(folder)["history"])


GOOD = rows(3)
BAD = {
    "no rejected answer": ([*GOOD, {"prompt": "a", "chosen": "b"}], "'rejected' is missing"),
    "no chosen answer": ([{"prompt": "a", "rejected": "b"}], "'chosen' is missing"),
    "a null": ([*GOOD, GOOD[0] | {"rejected": None}], "'rejected' is null"),
    "the same twice": ([GOOD[0] | {"rejected": GOOD[0]["chosen"]}], "prefers nothing"),
    "text and messages": (
        [GOOD[0] | {"chosen": [{"role": "assistant", "content": "x"}]}],
        "must all be text or all be lists",
    ),
    "not a preference": ([{"text": "x"}], "'chosen' is missing"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["dpo", "reward"])
def test_bad_records_are_named(call, tmp_path, case, command):
    records, told = BAD[case]
    data = write(tmp_path / "bad.jsonl", records)
    code, _, err, folder = call(command=command, data=data)
    assert code == 2 and told in err and "bad.jsonl" in err
    assert not any(folder.iterdir())


def test_prompts_that_leave_no_room_are_counted(call, tmp_path):
    records = [*rows(20), {"prompt": "x" * 90, "chosen": " a", "rejected": " b"}]
    code, out, err, _ = call(*CHUNK, "--max_length", 64, data=write(tmp_path / "d.jsonl", records))
    assert code == 0, err
    assert "1 of 21 preferences have a prompt of --max_length 64 tokens or more" in out
    code, _, err, _ = call("--max_length", 8, out="none")
    assert code == 2 and "--max_length 8" in err


def test_a_task_makes_preferences(call):
    """Chosen is right, rejected the answer to another question; what it learned is scored."""
    task = ReasoningGymTask.parse("reasoning-gym:chain_sum?max_terms=2")
    made = task.preferences(task.records(40, seed=0))
    for row in made.to_list():
        assert task.score(row, row["chosen"][0]["content"]) == 1.0
        assert task.score(row, row["rejected"][0]["content"]) < 1.0
    code, out, err, folder = call(
        *CHUNK, "--train_samples", 40, "--score_samples", 4,
        data="reasoning-gym:chain_sum?max_terms=2",
    )  # fmt: skip
    assert code == 0, err
    assert "exact-match accuracy" in out
    assert "rewards/accuracies" in metrics(folder)["after"]


@pytest.mark.parametrize(
    "method", [CHUNK, EXACT, ["--method", "lora"]], ids=["chunk", "exact", "lora"]
)
def test_a_reward_model_learns_to_tell_answers_apart(call, tiny_model, method):
    code, _, err, folder = call(*method, *RATE, "--save_steps", 3, command="reward")
    assert code == 0, err
    found = metrics(folder)
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["after"]["margin"] > found["before"]["margin"]
    auto = AutoModelForSequenceClassification
    if method[1] == "lora":
        base = auto.from_pretrained(tiny_model, num_labels=1)
        model = PeftModel.from_pretrained(base, str(folder))
    else:
        model = auto.from_pretrained(folder)
        assert model.config.num_labels == 1
    ids = torch.arange(8)[None]
    assert model(ids).logits.shape == (1, 1)
    (folder / "checkpoint-6" / "chunkft_manifest.json").unlink()
    code, out, err, _ = call(
        *method, *RATE, "--save_steps", 3, "--resume_from_checkpoint", command="reward"
    )
    assert code == 0 and "checkpoint-3" in out, err
    assert metrics(folder)["after"] == found["after"]


def test_a_reward_adapter_merges_with_its_head(call, tiny_model, tmp_path):
    more = ["--method", "lora", "--trainable", "5%", *RATE]
    code, _, err, folder = call(*more, command="reward")
    assert code == 0, err
    assert main(["merge", str(folder), str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    auto, ids = AutoModelForSequenceClassification, torch.arange(8)[None]
    base = auto.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, str(folder))(ids).logits
    merged = auto.from_pretrained(tmp_path / "merged", dtype="auto")(ids).logits
    assert merged.item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("line", "told"),
    [("method: qlora", "--method qlora must be one of"), ("reference: Copy", "--reference Copy"),
     ("sync_ref_model: true\nmethod: lora", "--sync_ref_model with --method lora"),
     ("sync_ref_model: true\nstream_weights: true", "--sync_ref_model with --stream_weights"),
     ("trainable: 10\nmethod: lora", "the closest that lora comes")],
)  # fmt: skip
def test_a_yaml_file_is_checked_as_the_command_line_is(call, tmp_path, line, told):
    path = tmp_path / "config.yaml"
    path.write_text(line + "\n")
    code, _, err, _ = call("--config", path)
    assert code == 2 and told in err and "Traceback" not in err


@pytest.mark.parametrize("command", ["sft", "dpo", "reward"])
def test_help_says_what_there_is(command, capsys):
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"trl {command}" in told and "--chunks" in told and "--quantize" in told
    assert main([command, "--help-all"]) == 0
    assert "--gradient_accumulation_steps" in capsys.readouterr().out
    assert main([command, "--no_such_flag"]) == 2
    assert "--no_such_flag" in capsys.readouterr().err
