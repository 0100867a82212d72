"""`chunkft sft`, called as a user calls it, on a model of a few thousand parameters."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

from chunkft.cli import main, parse_job
from chunkft.memory import eight_bit
from chunkft.models.losses import head_log_probs
from tests.recipes.conftest import same, weights

STEPS = 8


@pytest.fixture
def sft(tiny_model, records, tmp_path, capsys):
    """Run the command; returns (exit code, stdout, stderr, output directory)."""

    def call(*more, out="run", data=records, model=tiny_model):
        folder = tmp_path / out
        words = ["sft", "--model_name_or_path", str(model), "--output_dir", str(folder)]
        words += ["--dataset_name", str(data), "--max_steps", str(STEPS)]
        words += ["--per_device_train_batch_size", "4", "--logging_steps", "1", *map(str, more)]
        words += ["--disable_tqdm", "true"]
        code = main(words)
        told = capsys.readouterr()
        return code, told.out, told.err, folder

    call.model = tiny_model
    return call


def test_a_run_trains_everything_and_says_so(sft, tiny_model):
    code, out, _, folder = sft("--chunks", 4, "--interval", 1, "--learning_rate", 1e-2)
    assert code == 0, out
    assert not same(folder, tiny_model)
    found = json.loads((folder / "metrics.json").read_text())
    assert found["after"] != found["before"]
    assert all(math.isfinite(value) for value in found["after"].values())
    last = found["history"][-1]
    assert last["grad_norm"] > 0
    assert last["cycle"] == 2
    assert {row["chunk"] for row in found["history"]} == {0, 1, 2, 3}
    # training leaves it off, and whoever loads the model would generate without a cache
    assert json.loads((folder / "config.json").read_text())["use_cache"]
    text = (folder / "report.md").read_text()
    count = f"{found['parameters']:,}"
    assert f"{count} of {count} trainable elements were trained" in text
    assert (folder / "loss.png").stat().st_size > 1000
    before, after = weights(tiny_model), weights(folder)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_exact_is_full_to_the_bit(sft):
    """Clipped, accumulated, with decay groups; stopped half-way and resumed without a word."""
    common = ["--gradient_accumulation_steps", 2, "--weight_decay", 0.1, "--max_grad_norm", 0.1]
    common += ["--learning_rate", 1e-2]
    assert sft("--method", "full", *common, out="full")[0] == 0
    common += ["--save_steps", 3]
    code, out, _, exact = sft("--method", "exact", "--chunks", 5, *common, out="exact")
    assert code == 0 and "in 5 chunks" in out and "all in every step" in out
    assert same(exact, exact.parent / "full")
    (exact / "checkpoint-8" / "chunkft_manifest.json").unlink()
    code, out, _, _ = sft(*common, "--resume_from_checkpoint", out="exact")
    assert code == 0 and "checkpoint-6" in out and "in 5 chunks" in out
    assert same(exact, exact.parent / "full")
    assert "| method | exact |" in (exact / "report.md").read_text()


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_streamed_weights_are_the_same_to_the_bit(sft, tmp_path, checkpointing):
    """On disk, stopped half-way and resumed without streaming, and with it."""
    common = ["--chunks", 4, "--learning_rate", 1e-2, "--gradient_checkpointing", checkpointing]
    assert sft(*common, out="resident")[0] == 0
    common += ["--save_steps", 3, "--stream-weights", "--store", tmp_path / "rest"]
    common += ["--interval", 1]
    code, out, _, folder = sft(*common, out="streamed")
    assert code == 0 and "units of" in out and "weights on disk" in out
    assert same(folder, folder.parent / "resident")
    assert "| weights on disk |" in (folder / "report.md").read_text()
    (folder / "checkpoint-8" / "chunkft_manifest.json").unlink()
    for more in (common, [*common, "--stream_weights", "false"]):
        code, out, _, _ = sft(*more, "--resume_from_checkpoint", out="streamed")
        assert code == 0 and "checkpoint-6" in out
        assert ("units of" in out) == (more is common)
        assert same(folder, folder.parent / "resident")
        (folder / "checkpoint-8" / "chunkft_manifest.json").unlink()


def test_a_fused_head_that_knows_no_slices_is_refused(sft):
    code, _, err, _ = sft("--use_liger_kernel")
    assert code == 2 and "--use_liger_kernel with --method chunk" in err


def test_streamed_weights_do_not_go_with_adapters(sft):
    code, _, err, _ = sft("--stream_weights", "--use_peft", "--method", "full")
    assert code == 2 and "--stream_weights with --method lora" in err


def test_every_element_moves_in_full_and_chunk(sft):
    assert sft("--method", "full", out="full")[0] == 0
    assert sft("--chunks", 4, "--layout", "stream", out="stream")[0] == 0


@pytest.mark.parametrize("stop", [3, 4])
def test_resume_is_the_uninterrupted_run_to_the_bit(sft, stop):
    common = ["--chunks", 2, "--interval", 2, "--save_steps", 1, "--max_grad_norm", 0.1]
    _, _, _, whole = sft(*common, out="whole")
    _, _, _, torn = sft(*common, out="torn")
    for step in range(stop + 1, STEPS + 1):
        (torn / f"checkpoint-{step}" / "chunkft_manifest.json").unlink()
    code, out, _, _ = sft(*common, "--resume_from_checkpoint", out="torn")
    assert code == 0
    assert f"checkpoint-{stop}" in out
    assert f"checkpoint-{STEPS} was never finished" in out
    assert same(whole, torn)


@pytest.mark.parametrize("method", ["chunk", "exact"])
def test_moments_that_rest_in_8_bits(sft, monkeypatch, method):
    """Smaller; stopped where a visit begins and resumed without a word, to the bit."""
    monkeypatch.setattr(eight_bit, "SMALLEST", 64)  # elements; the model has no larger slice
    common = ["--method", method, "--chunks", 3, "--save_steps", 5, "--learning_rate", 1e-2]
    _, _, _, plain = sft(*common, out="plain")
    code, _, _, whole = sft(*common, "--state_bits", 8, out="whole")
    assert code == 0 and not same(plain, whole)
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (plain, whole)]
    wide, narrow = (x["bytes_by_kind"]["resting"] for x in found)
    assert narrow < 0.5 * wide
    losses = [row["loss"] for row in found[1]["history"]]
    assert losses[-1] < 0.9 * losses[0]
    (whole / "checkpoint-8" / "chunkft_manifest.json").unlink()
    before = weights(whole)
    code, out, _, _ = sft(*common, "--resume_from_checkpoint", out="whole")
    assert code == 0 and "checkpoint-5" in out
    after = weights(whole)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "| state_bits | 8 |" in (whole / "report.md").read_text()


def test_yaml_config_and_trl_flags(sft, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "chunks: 2\nlayout: stream\nlearning_rate: 0.001\nlr_scheduler_type: cosine\n"
    )
    code, out, _, folder = sft("--config", config, "--optim", "sgd", "--weight_decay", 0.1)
    assert code == 0
    assert "in 2 chunks" in out
    assert "(stream)" in out
    text = (folder / "report.md").read_text()
    assert "| optim | sgd |" in text
    assert "| learning_rate | 0.001 |" in text


def test_lora_through_the_same_command(sft):
    code, out, _, folder = sft("--method", "full", "--use_peft", "--lora_r", 4)
    assert code == 0, out
    assert (folder / "adapter_model.safetensors").exists()


def test_packing_and_tensorboard(sft):
    code, _, _, folder = sft(
        "--packing", "--max_length", 96, "--report_to", "tensorboard", "--chunks", 2
    )
    assert code == 0
    (events,) = folder.rglob("events.out.tfevents*")
    assert b"train/grad_norm" in events.read_bytes()


def test_reasoning_gym_is_scored_before_and_after(sft):
    code, out, _, folder = sft(
        "--score_samples", 3, "--train_samples", 40,
        data="reasoning-gym:spell_backward?min_word_len=3&max_word_len=5",
    )  # fmt: skip
    assert code == 0
    assert "exact-match accuracy" in out
    assert len(json.loads((folder / "metrics.json").read_text())["samples"]) == 3


def test_text_records(sft, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"story": f"once {i} upon a time"}) for i in range(20)))
    code, out, _, _ = sft("--dataset_text_field", "story", data=path)
    assert code == 0, out


def test_init_kwargs_overrule_flags_as_in_trl(sft):
    kwargs = '{"attn_implementation": "eager", "dtype": "float32"}'
    code, _, _, folder = sft("--model_init_kwargs", kwargs)
    assert code == 0
    assert weights(folder)["model.norm.weight"].dtype == torch.float32


def test_records_that_lose_their_whole_completion_are_counted(sft, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "a" * 60, "completion": "b"}] * 3 + [{"prompt": "a", "completion": "b"}] * 9
    path.write_text("\n".join(map(json.dumps, rows)))
    code, out, _, _ = sft("--max_length", 30, data=path)
    assert code == 0
    assert "3 of 12 records have no token to learn within --max_length 30 and are left out" in out


@pytest.mark.parametrize(
    ("words", "on"),
    [
        ("", False),  # 16-bit weights and what they make are in one type already
        ("--bf16 true", True),
        ("--dtype float32", True),
        ("--dtype float32 --bf16 false", False),
        ("--method lora", True),  # of fp32
    ],
)
def test_where_autocast_is(sft, monkeypatch, words, on):
    seen = set()

    def head(*args, **kwargs):
        seen.add(torch.is_autocast_enabled("cpu"))
        return head_log_probs(*args, **kwargs)

    monkeypatch.setattr("chunkft.models.losses.head_log_probs", head)
    code, *_ = sft("--max_steps", 2, *words.split())
    assert code == 0 and seen == {on}


def test_autocast_that_accelerate_is_told_of(monkeypatch):
    assert "bf16" not in parse_job("sft", []).given
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "bf16" in parse_job("sft", []).given


def test_times_cover_the_run_and_steps_are_steps_alone(sft):
    code, _, _, folder = sft("--logging_strategy", "no")
    assert code == 0
    found = json.loads((folder / "metrics.json").read_text())
    assert len(found["step_seconds"]) == STEPS
    assert found["seconds"] >= sum(found["step_seconds"]) - 1e-3 * STEPS > 0


def test_a_longer_run_goes_on_with_its_rotation_and_rate(sft):
    common = ["--save_steps", 4]
    _, out, _, folder = sft(*common)
    assert "in 4 chunks" in out
    rate = json.loads((folder / "metrics.json").read_text())["history"][0]["learning_rate"]
    more = ["--max_steps", 32, "--learning_rate", 0.5, "--resume_from_checkpoint"]
    code, out, _, _ = sft(*common, *more)
    assert code == 0
    assert "in 4 chunks" in out
    assert f"--learning_rate 0.5 without effect: the schedule goes on from {rate:g}" in out
    assert f"| learning_rate | {rate:g} |" in (folder / "report.md").read_text()


def test_what_nobody_gives_on_resume_comes_from_the_checkpoint(sft):
    common = ["--save_steps", 4, "--layout", "stream", "--moments", "persist", "--chunks", 2]
    assert sft(*common)[0] == 0
    code, out, _, folder = sft("--save_steps", 4, "--max_steps", 16, "--resume_from_checkpoint")
    assert code == 0, out
    text = (folder / "report.md").read_text()
    for row in ("chunks | 2", "interval | 2", "layout | stream", "moments | persist"):
        assert f"| {row} |" in text


def test_a_run_that_has_all_its_steps_takes_no_further_one(sft):
    common = ["--save_steps", 4, "--lr_scheduler_type", "constant", "--learning_rate", 1e-2]
    _, _, _, whole = sft(*common, out="whole")
    code, _, _, folder = sft(*common, out="again")
    (folder / "model.safetensors").unlink()  # killed before the last save
    code, out, _, _ = sft(*common, "--resume_from_checkpoint", out="again")
    assert code == 0, out
    assert same(whole, folder)
    assert not (folder / f"checkpoint-{STEPS + 1}").exists()
    assert json.loads((folder / "metrics.json").read_text())["steps"] == STEPS


def test_a_schedule_without_a_beginning_resumes_as_it_was(sft, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(64)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs"]
    common += ['{"patience": 0, "threshold": 9.0}', "--eval_strategy", "steps", "--eval_steps", 1]
    common += ["--save_steps", 1, "--learning_rate", 1e-2, "--metric_for_best_model", "loss"]
    _, _, _, whole = sft(*common, data=folder, out="whole")
    sft(*common, data=folder, out="torn")
    torn = tmp_path / "torn"
    for step in range(5, STEPS + 1):
        (torn / f"checkpoint-{step}" / "chunkft_manifest.json").unlink()
    code, out, _, _ = sft(*common, "--resume-from-checkpoint", data=folder, out="torn")
    assert code == 0, out
    assert "without effect" not in out
    assert same(whole, torn)


def test_another_rule_does_not_take_over_a_state(sft):
    assert sft("--optim", "sgd", "--save_steps", 4)[0] == 0
    code, _, err, _ = sft("--save_steps", 4, "--resume_from_checkpoint")
    assert code == 2
    assert "the state is of SGD, the optimizer runs AdamW" in err


def test_settings_without_effect_warn(sft):
    code, out, _, _ = sft("--method", "full", "--order", "shuffled", "--chunks", 4)
    assert code == 0
    assert "warning: --chunks --order without effect" in out
    code, out, _, full = sft("--method", "full", "--state_bits", 8, out="8")
    assert code == 0 and "warning: --state_bits without effect: --method full" in out
    assert same(full, full.parent / "run")
    # whatever becomes of the run: the rule may not be installed here
    _, out, _, _ = sft("--optim", "adamw_bnb_8bit", "--state_bits", 8, out="rule")
    assert out.count("warning: --state_bits 8 without effect: adamw_bnb_8bit keeps") == 1


BAD = {
    "no data": (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl"),
    "chunks 0": (["--chunks", "0"], "--chunks 0 must be at least 1"),
    "interval 0": (["--interval", "0"], "--interval 0 must be at least 1"),
    "chunks over steps": (["--chunks", "64", "--interval", "20"], "never move"),
    "chunks over rows": (["--chunks", "99999", "--max_steps", "200000"], "rows"),
    "unknown model": (["--model_name_or_path", "./no-such-model"], "no-such-model"),
    "quantized": (["--load_in_8bit"], "--load_in_8bit freeze the weights"),
    "galore": (["--optim", "galore_adamw"], "galore"),
    "lomo": (["--optim", "lomo"], "lomo"),
    "apollo": (["--optim", "apollo_adamw"], "apollo"),
    "wrapped": (["--packing", "--packing_strategy", "wrapped"], "bfd"),
    "too long": (["--max_length", "4"], "longer than max_length 4"),
    "unknown flag": (["--chunkz", "3"], "chunkz"),
    "bad value": (["--layout", "diagonal"], "diagonal"),
    "no batch": (["--dataloader_drop_last", "--per_device_train_batch_size", "99"], "0 batches"),
    "rate below 0": (["--learning_rate", "-1"], "Invalid learning rate"),
    "no decay steps": (["--lr_scheduler_type", "warmup_stable_decay"], "num_decay_steps"),
    "config alone": (["--config"], "--config needs the path"),
    "schedule free": (["--optim", "schedule_free_adamw"], "evaluates other weights than it trains"),
    "init kwargs": (["--model_init_kwargs", '{"colour": 1}'], "colour"),
    "bad store": (["--store", "/dev/null/x"], "/dev/null/x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(sft, case):
    more, named = BAD[case]
    code, _, err, _ = sft(*more)
    assert code == 2
    assert named in err
    lines = [x for x in err.splitlines() if x.startswith("chunkft: error:")]
    assert len(lines) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp\n', "line 2"),
        ('{"question": "a", "answer": "b"}\n', "question"),
    ],
)
def test_broken_records_are_named(sft, tmp_path, text, named):
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    code, _, err, _ = sft(data=path)
    assert code == 2
    assert named in err


@pytest.mark.parametrize("text", ["chunks: [", "- chunks", "chunkz: 4", "chunks: many"])
def test_a_broken_config_is_one_line(sft, tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    code, _, err, _ = sft(f"--config={tmp_path / 'run.yaml'}")
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_learned_positions_bound_the_records(sft, tiny_model, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=19, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    code, _, err, _ = sft(model=tmp_path / "gpt2")
    assert code == 2
    assert "use --max_length 19" in err
    assert sft("--max_length", 19, model=tmp_path / "gpt2", out="short")[0] == 0


def test_another_runs_directory_is_left_alone(sft, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_text("precious")
    code, _, err, _ = sft()
    assert code == 2
    assert "holds model.safetensors" in err
    assert (tmp_path / "run" / "model.safetensors").read_text() == "precious"


def test_nan_stops_and_keeps_the_last_good_checkpoint(sft):
    code, _, err, folder = sft(
        "--learning_rate", 1e38, "--save_steps", 1, "--max_grad_norm", 0, "--chunks", 2,
        "--optim", "sgd", "--lr_scheduler_type", "constant", "--dtype", "float32",
    )  # fmt: skip
    assert code == 2
    assert "nan" in err.lower() or "inf" in err.lower()
    from chunkft.train.checkpoints import last_whole

    found, torn = last_whole(folder)
    assert found is not None
    assert torn == []
    assert all(torch.isfinite(w).all() for w in weights(found).values())


def losses(folder):
    return [row["loss"] for row in json.loads((folder / "metrics.json").read_text())["history"]]


def test_rows_go_without_padding_and_nothing_else_changes(sft, tmp_path):
    """The default: the same minibatches, the same losses, the same weights up to rounding."""
    rows = [
        {"prompt": f"say {'x' * (i * 7 % 40)}:", "completion": " " + "y" * (1 + i * 3 % 11)}
        for i in range(64)
    ]
    data = tmp_path / "ragged.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    # Adam would make much of a rounded gradient near zero
    common = ["--dtype", "float32", "--bf16", "false", "--optim", "sgd", "--learning_rate", 0.1]
    code, _, _, free = sft(*common, data=data, out="free")
    assert code == 0
    _, _, _, padded = sft(*common, "--padding_free", "false", data=data, out="padded")
    for a, b in zip(losses(free), losses(padded), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (free, padded)]
    seen = [row["num_tokens"] for row in found[0]["history"]]
    assert seen == [row["num_tokens"] for row in found[1]["history"]]
    for name, value in weights(padded).items():
        assert torch.allclose(weights(free)[name], value, atol=1e-5)
    assert "chunkft_varlen" not in (free / "config.json").read_text()


def test_rows_are_padded_where_they_would_leak(sft, tmp_path):
    """A recurrent model: said, not trained wrongly; and refused where it was asked for."""
    tokenizer = AutoTokenizer.from_pretrained(sft.model)
    folder = tmp_path / "mamba"
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = ["--dtype", "float32", "--gradient_checkpointing", "false", "--chunks", 2]
    code, out, err, _ = sft(*words, model=folder)
    assert code == 0, err
    assert "rows are padded:" in out and "recurrent" in out
    code, _, err, _ = sft(*words, "--padding_free", model=folder, out="asked")
    assert code == 2 and "recurrent" in err


def test_cut_rows_may_go_without_padding(sft):
    """TRL itself refuses padding_free beside max_length."""
    code, _, err, _ = sft("--padding_free", "--max_length", 19)
    assert code == 0, err
