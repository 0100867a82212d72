"""`chunkft sft --method <adapter>`, called as a user calls it, on a tiny model."""

import functools
import json
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from chunkft.cli import main
from chunkft.models.adapters import METHODS, attach, configure
from chunkft.train.config import ADAPTERS

# those with parts of their own in checkpoints; the others run with `make test-slow`
OWN_WAYS = ("lora", "pissa", "adalora", "ptuning", "prefix")
SOME = [m if m in OWN_WAYS else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
SIZES = {"oft": 4, "miss": 4, "vera": 16, "ptuning": 8, "prefix": 3, "prompt": 3}


@pytest.fixture
def sft(tiny_model, records, tmp_path, capsys):
    """Run the command; returns (exit code, stdout, stderr, output directory)."""

    def call(*more, out="run", model=tiny_model):
        folder = tmp_path / out
        words = ["sft", "--model_name_or_path", str(model), "--output_dir", str(folder)]
        words += ["--dataset_name", str(records), "--max_steps", "8", "--logging_steps", "1"]
        words += ["--per_device_train_batch_size", "4", *map(str, more), "--disable_tqdm", "true"]
        code = main(words)
        told = capsys.readouterr()
        return code, told.out, told.err, folder

    return call


def adapter(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def size(method):
    return ["--lora_r", SIZES[method]] if method in SIZES else []


def test_the_command_knows_every_method():
    assert set(ADAPTERS) == set(METHODS)


@pytest.mark.parametrize("method", SOME)
def test_trains_an_adapter_and_saves_nothing_else(sft, tiny_model, method):
    rate = 20 * METHODS[method].learning_rate
    code, out, err, folder = sft("--method", method, *size(method), "--learning_rate", rate)
    assert code == 0, err
    assert f"{method}" in out and "trainable parameters" in out
    found = json.loads((folder / "metrics.json").read_text())
    assert found["after"] != found["before"]
    first, last = found["history"][0], found["history"][-1]
    assert last["loss"] < first["loss"] and first["grad_norm"] > 0
    assert found["bytes_by_kind"]["adapter"] == 4 * found["parameters"]
    assert not (folder / "model.safetensors").exists()
    count = f"{found['parameters']:,}"
    assert (
        f"{count} of {count} trainable elements were trained" in (folder / "report.md").read_text()
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto")
    again = PeftModel.from_pretrained(base, str(folder))
    logits = again(torch.arange(9)[None]).logits
    with again.disable_adapter():
        assert not torch.equal(again(torch.arange(9)[None]).logits[:, -9:], logits[:, -9:])


@pytest.mark.parametrize("method", SOME)
def test_resumes_to_the_bit(sft, method):
    common = ["--method", method, *size(method), "--save_steps", 1, "--learning_rate", 1e-2]
    if method == "adalora":
        common += ["--adapter_kwargs", '{"init_r": 8, "target_r": 2}']
    _, _, _, whole = sft(*common, out="whole")
    # of AdaLoRA before and after its ranks are settled
    for stop in (3, 7) if method == "adalora" else (5,):
        torn = shutil.copytree(whole, whole.parent / f"torn{stop}")
        for step in range(stop + 1, 9):
            (torn / f"checkpoint-{step}" / "chunkft_manifest.json").unlink()
        code, out, err, _ = sft(*common, "--resume_from_checkpoint", out=f"torn{stop}")
        assert code == 0, err
        assert f"checkpoint-{stop}" in out
        sealed = json.loads((torn / "checkpoint-8" / "chunkft_manifest.json").read_text())
        inside = {path.name for path in (torn / "checkpoint-8").iterdir() if path.is_file()}
        assert inside <= sealed["files"].keys() | {"chunkft_manifest.json"}
        a, b = adapter(whole), adapter(torn)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_budget_chooses_the_size(sft):
    code, out, err, folder = sft("--method", "lora", "--trainable", "5%")
    assert code == 0, err
    found = json.loads((folder / "metrics.json").read_text())
    assert "lora (r=" in out
    assert 0.04 < found["parameters"] / 27_000 < 0.06
    config = PeftConfig.from_pretrained(str(folder))
    assert config.r == 1 or f"r={config.r}" in out


def test_an_evaluation_loses_no_gradient(wider_model):
    """bitsandbytes repacks 4-bit weights for a CPU in eval mode, and then has no backward."""
    found = []
    for look in (False, True):
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        base = AutoModelForCausalLM.from_pretrained(
            wider_model, dtype=torch.bfloat16, quantization_config=config
        )
        torch.manual_seed(0)
        model = attach(base, configure("lora", base, 4))
        ids = torch.arange(40)[None]
        if look:
            with torch.no_grad():
                model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == 28 and any(g.abs().max() > 0 for g in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_stays_as_it_is(sft, wider_model, quantize):
    """Resumed to the bit: TRL makes adapters bf16 here, PEFT fp32 again when it reads them."""
    sft = functools.partial(sft, model=wider_model)
    code, out, err, folder = sft("--method", "lora", "--quantize", quantize, "--save_steps", 4)
    assert code == 0, err
    found = json.loads((folder / "metrics.json").read_text())
    history = [row["loss"] for row in found["history"]]
    assert history[-1] < history[0]
    assert f"| frozen weights | {quantize} |" in (folder / "report.md").read_text()
    _, _, _, plain = sft("--method", "lora", out="plain")
    before = json.loads((plain / "metrics.json").read_text())["bytes_by_kind"]["weights"]
    assert found["bytes_by_kind"]["weights"] < before
    (folder / "checkpoint-8" / "chunkft_manifest.json").unlink()
    whole = adapter(folder)
    code, out, err, _ = sft(
        *("--method", "lora", "--quantize", quantize, "--save_steps", 4),
        "--resume_from_checkpoint",
    )
    assert code == 0 and "checkpoint-4" in out, err
    again = adapter(folder)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_trl_calls_lora_stays_trls(sft):
    code, _, err, folder = sft("--use_peft", "--lora_r", 4)
    assert code == 0, err
    config = PeftConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 32, 0.05)
    assert set(config.target_modules) == {"q_proj", "v_proj"}  # PEFT's for Llama
    kwargs = '{"init_lora_weights": "olora"}'
    code, _, err, folder = sft("--use_peft", "--adapter_kwargs", kwargs, out="kwargs")
    assert code == 0, err
    assert PeftConfig.from_pretrained(str(folder)).init_lora_weights == "olora"
    code, _, err, folder = sft("--method", "dora", "--lora_target_modules", "q_proj", out="dora")
    config = PeftConfig.from_pretrained(str(folder))
    assert config.use_dora and set(config.target_modules) == {"q_proj"}


REFUSED = {
    "virtual tokens in packed rows": (["prompt", "--packing"], "--packing with --method prompt"),
    "or padding-free ones": (["prefix", "--padding_free"], "--padding_free with --method prefix"),
    "a cache under checkpointing": (
        ["prefix", "--gradient_checkpointing", "true"],
        "--gradient_checkpointing with --method prefix",
    ),
    "streamed weights": (["lora", "--stream_weights"], "--stream_weights with --method lora"),
    "two sizes": (["lora", "--trainable", "1%", "--lora_r", "4"], "--trainable chooses"),
    "no size": (["ia3", "--trainable", "1%"], "ia3 always trains"),
    "a budget of all": (["chunk", "--trainable", "1%"], "--trainable 1% with --method chunk"),
    "frozen weights": (["exact", "--quantize", "nf4"], "--method exact has nothing to train"),
    "chunks of an adapter": (["chunk", "--use_peft"], "--use_peft with --method chunk"),
    "no JSON": (["lora", "--adapter_kwargs", "{r: 8}"], "--adapter_kwargs"),
    "a list": (["lora", "--adapter_kwargs", "[8]"], "must be an object"),
    "no such setting": (["lora", "--adapter_kwargs", '{"rank": 8}'], "no setting 'rank'"),
    "wider than a layer": (["miss", "--lora_r", "64"], "must be less than or equal to"),
    "no step for ranks": (
        ["adalora", "--adapter_kwargs", '{"tinit": 5, "tfinal": 5}'],
        "leave none of 8 steps",
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_go_together_is_refused(sft, words):
    given, told = REFUSED[words]
    code, _, err, folder = sft("--method", *given)
    assert code == 2
    assert told in err and "Traceback" not in err
    assert not list(folder.glob("*.safetensors"))


def test_what_has_no_effect_is_said(sft):
    code, out, _, _ = sft("--method", "lora", "--chunks", 4, "--layout", "stream")
    assert code == 0 and "warning: --chunks --layout without effect: --method lora" in out
    code, out, _, _ = sft("--lora_r", 4, out="chunk")
    assert code == 0 and "warning: --lora_r without effect: --method chunk" in out


@pytest.fixture
def merge(capsys):
    def call(*words):
        code = main(["merge", *map(str, words)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_it_is_one_plain_model(sft, merge, tmp_path, wider_model, dtype):
    words = ["--method", "lora", "--quantize", "nf4", "--learning_rate", 1e-2]
    _, _, _, folder = sft(*words, model=wider_model)
    code, out, err = merge(folder, tmp_path / "merged", "--dtype", dtype)
    assert code == 0, err
    assert "LORA" in out
    base = AutoModelForCausalLM.from_pretrained(wider_model, dtype=torch.float32)
    before = base.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    wanted = PeftModel.from_pretrained(base, str(folder))(torch.arange(9)[None]).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == getattr(torch, dtype) and merged.config.use_cache
    assert not torch.equal(merged.state_dict()["model.layers.0.mlp.up_proj.weight"], before)
    logits = merged(torch.arange(9)[None]).logits
    bound = 1e-5 if dtype == "float32" else 3e-2
    assert (logits - wanted).abs().max() <= bound * wanted.abs().max()
    code, _, err = merge(folder, tmp_path / "merged")
    assert code == 2 and "empty directory" in err


def test_what_cannot_merge_says_why(sft, merge, tmp_path, tiny_model):
    _, _, _, folder = sft("--method", "prompt")
    code, _, err = merge(folder, tmp_path / "merged")
    assert code == 2 and "virtual tokens" in err and "PeftModel" in err
    code, _, err = merge(tiny_model, tmp_path / "merged")
    assert code == 2 and "adapter_config.json" in err
    _, _, _, folder = sft("--method", "lora", out="lora")
    code, _, err = merge(folder, tmp_path / "merged", "--base", tmp_path / "nowhere")
    assert code == 2 and "--base" in err


@pytest.mark.parametrize("words", ["", "--quantize nf4", "--quantize int8"])
def test_memory_is_planned_for_what_trains(sft, words):
    code, out, err, folder = sft("--method", "lora", "--memory", "8GiB", *words.split())
    assert code == 0, err
    assert "plan for 8GiB" in out and "more than planned" not in out
    found = json.loads((folder / "metrics.json").read_text())
    for kind in ("weights", "gradient", "state"):
        assert found["planned"][kind] == found["measured"][kind]
