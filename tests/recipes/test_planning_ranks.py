"""What is planned for several devices is what ranks take."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chunkft.cli import main
from chunkft.core.optimizer import ChunkedOptimizer
from chunkft.core.ranks import held
from chunkft.memory.dry_run import Traffic
from chunkft.memory.meter import Meter
from chunkft.memory.plan import Choice
from chunkft.models.losses import install_head
from chunkft.recipes.trial import Workload, checkpoint_layers, trial_of
from chunkft.train import sharding
from tests.ranks import on_ranks

CONFIG: dict[str, Any] = {"vocab_size": 4000, "hidden_size": 128, "intermediate_size": 320}
CONFIG |= {"num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": False}
DEEP: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 12}
DEEP |= {"intermediate_size": 640}
SEQ, CHUNKS, RANKS = 64, 4, 2


def measured(rank: int, shard: bool, settings: dict[str, Any]) -> tuple[int, int, int, int]:
    """Bytes at the peak of a real rank's step, of its weights, gathered and averaged in a step."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16).train()
    if shard:
        sharding.shard(model, torch.device("cpu"))
    checkpoint_layers(model)
    optimizer = ChunkedOptimizer(model, torch.optim.AdamW, lr=1e-5, max_grad_norm=1.0, **settings)
    install_head(model)
    ids = torch.zeros(1, SEQ, dtype=torch.long)
    peak, traffic = 0, Traffic()
    for step in range(3 * CHUNKS):
        meter = Meter(model, optimizer, CONFIG["vocab_size"])
        traffic.begin()
        with traffic, meter:
            model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
            optimizer.step()
        if step >= CHUNKS:
            peak = max(peak, meter.measured().peak.total)
    share = sum(held(p).numel() * p.element_size() for p in model.parameters())
    return peak, share, traffic.gathered, traffic.averaged


@pytest.mark.parametrize("method", ["stream", "spread", "exact"])
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_a_planned_rank_takes_what_a_real_one_takes(shard: bool, method: str) -> None:
    layout = "stream" if method == "exact" else method
    choice = Choice(
        "exact" if method == "exact" else "chunk",
        *(CHUNKS, 1, layout, "host", True),
        ranks=RANKS,
        shard=shard,
    )
    found = trial_of(LlamaConfig(**CONFIG), Workload(SEQ), on_host=True)(choice)
    settings = {"chunks": CHUNKS, "interval": 1, "layout": layout}
    if method == "exact":
        settings = {"chunks": CHUNKS, "exact": True}
    copied = 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]  # gloo copies what it reduces
    for peak, share, gathered, averaged in on_ranks(RANKS, measured, shard, settings):
        assert found.peak.peak.bytes["weights"] >= share
        assert found.peak.peak.total <= 1.01 * peak
        assert peak <= 1.01 * (found.peak.peak.total + copied)
        assert gathered == found.gathered
        assert averaged == pytest.approx(found.averaged, rel=0.02)  # of the chunks that were tried
        assert (gathered > 0) is shard


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    LlamaConfig(**CONFIG | DEEP).save_pretrained(tmp_path)

    def call(*words: str, code: int = 0) -> Any:
        assert main(["plan", str(tmp_path), "--seq", str(SEQ), *words]) == code
        told = capsys.readouterr()
        return told.err if code else told.out

    return call


# cuBLAS's workspace alone takes 32 MiB
@pytest.mark.parametrize(
    ("memory", "words", "shard", "layout"),
    [
        ("1GiB", [], False, "spread"),  # all weights fit
        ("68MiB", [], True, "stream"),  # half of them do
        ("1GiB", ["--shard", "fsdp", "--method", "exact"], True, "spread"),
    ],
)
def test_weights_are_shared_where_they_do_not_fit(
    memory: str, words: list[str], shard: bool, layout: str, planned: Any
) -> None:
    words = ["--gpus", "2xh800", "--chunks", "8", "--memory", memory, *words]
    told = json.loads(planned("--json", *words))
    assert told["choice"]["ranks"] == 2
    assert (told["choice"]["shard"], told["choice"]["layout"]) == (shard, layout)
    assert (told["gathered"] > 0) is shard
    assert told["averaged"] > 0
    assert told["seconds"]["link"] == (told["gathered"] + told["averaged"]) / 200e9
    assert told["total"] + told["pools"] == told["needed"] <= told["memory"]


def test_a_plan_of_several_devices_says_how_to_start_it(planned: Any) -> None:
    told = planned("--gpus", "2xh800", "--shard", "fsdp")
    assert "on each of 2 devices" in told
    assert "weights that they share" in told
    assert "torchrun --nproc-per-node 2 -m chunkft sft --shard fsdp --method chunk" in told


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--gpus", "h800", "--shard", "fsdp"], "does not go with one device"),
        (["--gpus", "2xh800", "--shard", "fsdp", "--stream-weights"], "with --stream-weights"),
        (["--gpus", "2xh800", "--recipe", "rlhf-24gb"], "plans one device, not 2xh800"),
    ],
)
def test_what_cannot_be_planned(words: list[str], error: str, planned: Any) -> None:
    assert error in planned(*words, code=2)
