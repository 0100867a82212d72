"""`--memory` on a pretended card: the plan's choices reach the run, which holds them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import Mock, patch

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chunkft.cli import main
from chunkft.memory.budget import Device
from chunkft.recipes.fitting import must_stream
from chunkft.recipes.job import Job
from chunkft.train.config import ChunkArguments

CARD = Device(2**30, 1e12, 1e12, 1e10)


@pytest.fixture
def _card() -> Iterator[None]:
    """Tensors are on the CPU all the same: no room for cuBLAS, no page-locked memory."""
    with (
        patch("chunkft.recipes.fitting.this_computer", lambda: CARD),
        patch("chunkft.recipes.loading.this_computer", lambda: CARD),
        patch("chunkft.memory.plan.LIBRARY", 0),
        patch("transformers.modeling_utils.save_on_cpu", lambda **_: save_on_cpu()),
    ):
        yield


@pytest.fixture(scope="session")
def deep_model(tiny_model, tmp_path_factory):
    """Path of the tiny model with eight layers."""
    folder = tmp_path_factory.mktemp("deep-model")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=8)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture
def sft(deep_model, records, tmp_path, capsys):
    def call(memory, *more):
        out = tmp_path / memory
        words = ["sft", "--model_name_or_path", str(deep_model), "--dataset_name", str(records)]
        words += ["--output_dir", str(out), "--max_steps", "20", "--disable_tqdm", "true"]
        words += ["--per_device_train_batch_size", "4", "--chunks", "8", "--memory", memory]
        code = main([*words, *map(str, more)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, out

    return call


CHOSEN = [
    ("2MiB", "checkpointing off, weights on the device\n"),
    ("432KiB", "checkpointing offloaded, weights streamed but for 2 layers, state in blocks\n"),
    ("680KiB", "checkpointing on, weights on the device\n"),
    ("632KiB", "checkpointing offloaded, weights on the device\n"),
    ("540KiB", "checkpointing offloaded, weights on the device, state in blocks\n"),
    ("390KiB", "checkpointing offloaded, weights streamed, state in blocks\n"),
]


@pytest.mark.usefixtures("_card")
@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_less_memory_same_weights(count, sft):
    """To the bit, with what the plan chooses."""
    first = None
    for memory, told in CHOSEN[:count]:
        code, printed, _, out = sft(memory)
        assert code == 0 and told in printed
        assert ("units of" in printed) == ("streamed" in told)
        found = json.loads((out / "metrics.json").read_text())
        for kind in ("weights", "gradient", "master"):
            assert found["measured"][kind] == pytest.approx(found["planned"][kind], rel=0.03)
        # inputs that wait on the host are in the same memory here
        away = {"activations"} if "offloaded" in told else set()
        for kind in {"state", "activations", "workspace"} - away:
            assert found["measured"][kind] <= 1.03 * found["planned"][kind], kind
        weights = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
        first = first or weights
        assert all(torch.equal(weights[name], first[name]) for name in first)


@pytest.mark.usefixtures("_card")
def test_streaming_is_offered_where_it_was_refused(sft):
    code, _, error, _ = sft("432KiB", "--stream_weights", "false")
    assert code == 2 and "or --stream-weights (" in error


@pytest.mark.slow
@pytest.mark.usefixtures("_card")
def test_what_was_given_stays(sft):
    code, _, error, _ = sft("432KiB", "--gradient_checkpointing", "false")
    assert code == 2 and "leaving checkpointing open" in error
    code, _, error, _ = sft("540KiB", "--state_block", "9999999", "--stream_weights", "false")
    assert code == 0, error
    code, printed, _, _ = sft("2MiB", "--stream_weights")
    assert code == 0 and "checkpointing off, weights streamed" in printed


def test_weights_without_room_never_go_to_the_card():
    model = torch.nn.Linear(1024, 1024, bias=False).bfloat16()  # 2 MiB
    job = Job(Mock(), Mock(), Mock(use_peft=False), None, ChunkArguments(memory="1MiB"))
    assert must_stream(job, model, CARD)
    assert not must_stream(job, model, replace(CARD, bus=0.0))
    assert not must_stream(replace(job, given={"stream_weights"}), model, CARD)
    assert not must_stream(replace(job, chunk=ChunkArguments(memory="3MiB")), model, CARD)
    assert not must_stream(replace(job, chunk=ChunkArguments()), model, CARD)
