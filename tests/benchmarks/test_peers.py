"""What the comparison of methods prints, on made-up results."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.meter import KINDS
from benchmarks.peer_methods import ENTRIES
from benchmarks.quality import Results, halving

OPTIONS = argparse.Namespace(task="reverse", steps=100, seeds=1, rounds=3, turns=None, tune=True)


def row(step: float, size: int, loss: float = 0.5, rare: float = 0.0) -> dict[str, Any]:
    bytes_ = dict.fromkeys(KINDS, 0) | {"gradient": size // 4, "state": size - size // 4}
    return {
        "ratios": [step, step - 0.1, step + 0.2],
        "rare": rare,
        "bytes": bytes_,
        "held": size,
    } | {
        "resting": 0,
        "private": 1000,
        "lr": 1e-4,
        "losses": [loss],
        "fitting": 100,
        "in_time": [loss],
        "commit": "abc1234",
    }


def rows() -> dict[str, Any]:
    return {
        "dense": row(1.0, 1600),
        "lora": row(0.8, 80),
        "galore": row(0.9, 400, rare=20.0),
        "lomo": {"error": "RuntimeError: no | luck", "commit": "def5678"},
        "stream-K16": row(0.55, 100),
        "stream-K64": row(0.5, 25),
        "spread-K16": row(0.9, 100),
        "exact-K16": row(1.4, 100),
    }


def test_table_tells_ratios_and_failures() -> None:
    lines = peers.table(rows()).splitlines()
    assert len({line.count("|") for line in lines if "failed" not in line}) == 1
    assert "| LoRA r=16, all linear | 0.800 (0.700 to 1.000) | 1.000 | 0.050 | 0.013 |" in lines[3]
    assert "0.900" not in lines[4] and "1.000 (0.800 to 1.100)" in lines[4]  # 20 / 200 on top
    assert "failed: RuntimeError: no / luck" in lines[5]


def test_goals() -> None:
    found = peers.goals(rows())
    assert "stream K=16 / dense: 0.550, at most 0.6: met" in found
    assert "spread K=16 / dense: 0.900, at most 0.75: MISSED" in found
    assert "least peer (LoRA r=16, all linear): 0.312, at most 1: met" in found
    assert "its seconds: 1.40 of dense): 0.000, at most 0: met" in found
    assert "BAdam at equal" not in found  # it did not run


def test_notes_tell_whose_rate_and_which_commit() -> None:
    lines = peers.notes(rows()).splitlines()
    assert lines[0].endswith("as in benchmarks/quality.py; at abc1234.")
    assert lines[3].endswith("no clipping; at def5678.")
    assert lines[-1] == "- chunk exact, K=16: the lr of dense AdamW, fp32 master; at abc1234."


def test_a_summary_counts_for_its_own_settings_and_a_success_for_more_than_an_error(
    tmp_path: Path,
) -> None:
    results = Results(tmp_path / "peers.jsonl")
    key = peers.summary_key("lora", OPTIONS)
    results.add({"kind": "done", **key, **row(0.8, 80)})
    results.add({"kind": "error", **key, "error": "later"})
    results.add({"kind": "done", **key, **row(0.1, 80), "budget": 5})
    assert peers.latest(results, OPTIONS)["lora"]["ratios"][0] == 0.8
    peers.forget(["lora"], results.path)
    assert not peers.latest(Results(results.path), OPTIONS)


def test_plot(tmp_path: Path) -> None:
    peers.plot(rows(), tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 0


def test_chunks_of_a_layer_have_a_row() -> None:
    """BAdam's block: the same bytes as a chunk of K=38."""
    assert round(134_515_008 / 3_540_096) == ENTRIES["stream-K38"].settings["chunks"]


def test_halving_finds_the_edge() -> None:
    tried: list[tuple[float, float]] = []

    def loss(lr: float, share: float) -> float:
        tried.append((lr, share))
        return abs(lr - 8.0)

    assert halving(2.0, loss) == 8.0
    assert len(set(tried)) == 5 + 2
