"""`--recipe rlhf-24gb`: its plan at 20B, its runs on a tiny model, and what it refuses."""

import json
import sys

import pytest

from chunkft.cli import main, parse_job
from chunkft.recipes import presets
from tests.recipes.conftest import metrics

REWARD = """
def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / 10 for text in completions]
"""
# of 3 % or, where a kind is small here, so many bytes
SMALL = 2**14
WAYS = {
    "int8": ["--quantize", "int8"],
    "nf4": ["--quantize", "nf4"],
    "chunk": ["--method", "chunk", "--chunks", "2"],
    "copy": ["--reference", "copy", "--gradient_checkpointing", "false"],
}


@pytest.fixture
def call(wider_model, tmp_path, capsys, monkeypatch):
    """Run a command by the recipe; returns (exit code, stdout, stderr, output directory)."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"say {i:03} in words:" + "!" * (i % 2)} for i in range(40)]
    prompts.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "rewards_here.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("rewards_here", None)

    def call(*more, command="grpo"):
        words = [command, "--recipe", "rlhf-24gb", "--model_name_or_path", str(wider_model)]
        words += ["--output_dir", str(tmp_path / "out"), "--dataset_name", str(prompts)]
        words += ["--max_steps", "4", "--disable_tqdm", "true", "--logging_steps", "1"]
        if command == "grpo":
            words += ["--reward_funcs", "rewards_here.vowels"]
        code = main([*words, *more])
        told = capsys.readouterr()
        return code, told.out, told.err, tmp_path / "out"

    return call


@pytest.mark.parametrize(
    "way",
    ["int8", "chunk", *(pytest.param(way, marks=pytest.mark.slow) for way in ("nf4", "copy"))],
)
def test_a_run_is_as_planned(way, call):
    """Answers, the reference and quantized weights included: every kind within 3 %."""
    more = ["--generation_kwargs", '{"min_new_tokens": 24}', "--max_completion_length", "24"]
    code, out, err, folder = call(*WAYS[way], *more, "--num_generations", "4")
    assert code == 0, err
    assert "plan for 22.73GiB:" in out and "more than planned" not in out
    found = metrics(folder)
    for kind, planned in found["planned"].items():
        assert found["measured"][kind] == pytest.approx(planned, rel=0.03, abs=SMALL), kind
    assert found["history"][0]["kl"] == pytest.approx(0.0, abs=1e-3)
    told = (folder / "report.md").read_text()
    assert "| beta | 0.04 |" in told and "rlhf-24gb" in told


def test_a_flag_goes_before_the_recipe(tmp_path):
    """On the command line or in a file; the KL coefficient too, but not as 0."""
    config = tmp_path / "run.yaml"
    config.write_text("recipe: rlhf-24gb\nbeta: 0.1\nload_in_8bit: true\n")
    job = parse_job("grpo", ["--config", str(config), "--num_generations", "4"])
    assert (job.training.beta, job.training.num_generations) == (0.1, 4)
    assert job.training.generation_batch_size == 8  # made of the recipe's settings
    assert (job.chunk.method, job.chunk.quantize, job.model.lora_r) == ("lora", None, presets.RANK)
    job = parse_job("rloo", ["--recipe", "rlhf-24gb", "--method", "exact"])
    assert (job.chunk.method, job.chunk.stream_weights) == ("exact", True)
    assert job.chunk.quantize is None and job.training.beta == 0.04
    again = parse_job("rloo", job.command.split()[2:])  # the line that resumes
    assert again.chunk == job.chunk and again.training.beta == 0.04


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("grpo", ["--beta", "0"], "nothing would keep the policy near"),
        ("grpo", ["--beta", "0.0", "--method", "chunk"], "give a value above 0 (0.04)"),
        ("sft", [], "one of chunkft grpo and rloo, not of sft"),
    ],
)
def test_what_it_refuses(command, more, said, call):
    code, _, err, folder = call(*more, command=command)
    assert code == 2 and said in err
    assert not folder.exists()


def test_a_file_with_an_unknown_recipe(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("recipe: rlhf-8gb\n")
    assert main(["grpo", "--config", str(config), "--output_dir", str(tmp_path / "out")]) == 2
    assert "--recipe rlhf-8gb must be rlhf-24gb" in capsys.readouterr().err


def test_a_plan_of_its_variants(wider_model, capsys):
    words = ["plan", str(wider_model), "--gpus", "rtx-4090", "--recipe", "rlhf-24gb", "--seq", "40"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "8 answers of 20 tokens to a prompt of 20" in table
    assert table.count("chunkft grpo --recipe rlhf-24gb") == 3
    (weights,) = (line for line in table.splitlines() if line.startswith("  weights"))
    assert len(weights.split()) == 4
    assert main([*words[:-1], "1"]) == 2
    assert "--seq 1 must be at least 2" in capsys.readouterr().err
    assert main([*words, "--method", "exact", "--state-bits", "8"]) == 2
    assert "--method, --state-bits beside --recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_no_variant_fits(wider_model, capsys):
    words = ["plan", str(wider_model), "--gpus", "rtx-4090", "--recipe", "rlhf-24gb", "--seq", "40"]
    assert main([*words, "--memory", "30MiB"]) == 2  # less than the libraries take
    assert capsys.readouterr().out.count("GiB at least") == 3


@pytest.mark.slow
def test_twenty_billion_parameters_on_24_gb(capsys):
    """Each variant fits, and of what it holds the parts that can be told by hand are right."""
    words = ["plan", "gpt-neox-20b", "--recipe", "rlhf-24gb", "--gpus", "rtx-4090", "--json"]
    assert main(words) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert list(plans) == ["int8, lora", "nf4, lora", "chunk, streamed"]
    assert all(one["fits"] and one["total"] < 24 * 2**30 for one in plans.values())
    linear, rest = 44 * 12 * 6144**2, 2 * 50432 * 6144  # the head and embedding stay in 16 bits
    adapter = 44 * presets.RANK * 6144 * (1 + 3 + 1 + 1 + 1 + 4 + 4 + 1) * 4
    by_hand = {"int8, lora": linear + 2 * rest, "nf4, lora": linear * 9 / 16 + 2 * rest}
    for name, size in by_hand.items():
        assert plans[name]["bytes"]["weights"] == pytest.approx(size + adapter, rel=0.002)
    cache = 44 * 2 * 6144 * 2 * presets.ANSWERS * (2 * presets.TOKENS - 1)
    assert all(one["highest"]["activations"] > cache for one in plans.values())


@pytest.mark.slow
def test_a_real_model_by_the_recipe(tmp_path):
    """The three variants on SmolLM2-135M; all parameters in chunks take less than LoRA whose
    reference is a copy, by the meter."""
    ways = {name: [*WAYS[name], "--max_steps", "8"] for name in ("int8", "nf4")}
    ways["chunk"] = ["--method", "chunk", "--chunks", "8", "--max_steps", "16"]  # two cycles
    ways["blocks"] = [*ways["chunk"], "--state_block", str(2**18)]
    ways["copy"] = ["--load_in_4bit", "false", "--reference", "copy", "--max_steps", "8"]
    most = {}
    for name, words in ways.items():
        out = tmp_path / name
        words = ["grpo", "--recipe", "rlhf-24gb", "--output_dir", str(out), *words]
        words += ["--dataset_name", "reasoning-gym:word_sequence_reversal?min_words=3&max_words=4"]
        words += ["--train_samples", "64", "--score_samples", "2"]
        words += ["--max_completion_length", "32", "--disable_tqdm", "true", "--logging_steps", "1"]
        assert main(words) == 0
        found = metrics(out)
        assert found["history"][0]["kl"] == pytest.approx(0.0, abs=1e-2)
        for kind, planned in found["planned"].items():
            assert found["measured"][kind] <= planned * 1.03 + SMALL, (name, kind)
        most[name] = sum(found["measured_at_peak"].values())
        print(name, {k: round(v / 2**20) for k, v in found["measured_at_peak"].items()})
    assert most["blocks"] < most["chunk"] < most["copy"]
