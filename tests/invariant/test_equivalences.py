"""Settings that must follow one trajectory: to the bit, or to rounding where sums are regrouped.

fp32, a tiny Llama, K=3 and T=3 over twelve steps: three switches and a second visit of chunk 0.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from chunkft import ChunkedOptimizer
from tests.conftest import assert_close, loss_of, tiny, weights

STEPS = 12
layouts = pytest.mark.parametrize("layout", ["stream", "spread"])
rules = pytest.mark.parametrize("rule", ["sgd", "adamw"])
RULES: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 1e-2}),
    # Where a true gradient is zero, a small eps would turn rounding into whole steps.
    "adamw": (optim.AdamW, {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.1}),
}
Batch = dict[str, Tensor]


def examples(count: int) -> list[Batch]:
    """Rows of 24 tokens, all labels learned, so that all micro-batches weigh alike."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(96, (count, 24), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def batches(size: int) -> list[Batch]:
    """STEPS times eight rows, as batches of `size`."""
    rows = examples(8 * STEPS)
    return [
        {key: torch.stack([row[key] for row in rows[i : i + size]]) for key in rows[0]}
        for i in range(0, len(rows), size)
    ]


def build(rule: str, **settings: Any) -> tuple[nn.Module, ChunkedOptimizer]:
    model, _ = tiny("llama")
    kind, own = RULES[rule]
    settings = {"chunks": 3, "interval": 3, "max_grad_norm": None} | own | settings
    return model, ChunkedOptimizer(model, kind, **settings)


class Course:
    """What a run went through: losses and gradients of each step, and the weights it ended at."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[list[Tensor]] = []
        self.active: list[int] = []
        self.weights: dict[str, Tensor] = {}


def run(rule: str, micro_batches: int = 1, checkpointing: bool = False, **settings: Any) -> Course:
    """The hand loop."""
    model, optimizer = build(rule, **settings)
    if checkpointing:
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    course, parts = Course(), iter(batches(8 // micro_batches))
    for _ in range(STEPS):
        losses = [loss_of(model, next(parts)) / micro_batches for _ in range(micro_batches)]
        for loss in losses:
            loss.backward()
        course.losses.append(sum(float(loss.detach()) for loss in losses))
        leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
        course.gradients.append([leaf.grad.clone() for leaf in leaves])
        course.active.append(optimizer.active)
        optimizer.step()
        optimizer.zero_grad()
    course.weights = weights(model)
    return course


def assert_alike(one: Course, two: Course, bound: float, weight_bound: float) -> None:
    assert one.active == two.active == [k for k in (0, 1, 2, 0) for _ in range(3)]
    assert two.losses == pytest.approx(one.losses, rel=bound, abs=0)
    for a, b in zip(one.gradients, two.gradients, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_close(y, x, bound)
    for name, value in one.weights.items():
        assert_close(two.weights[name], value, weight_bound)
    start = weights(tiny("llama")[0])
    assert all(not torch.equal(value, start[name]) for name, value in one.weights.items())


# -- to the bit ---------------------------------------------------------------------------------


@layouts
@rules
def test_stores_agree_to_the_bit(rule: str, layout: str, tmp_path: Path) -> None:
    first = run(rule, layout=layout, store="device", max_grad_norm=1.0)
    for store in ("host", tmp_path):
        assert_alike(first, run(rule, layout=layout, store=store, max_grad_norm=1.0), 0, 0)


class Rows(torch.utils.data.Dataset[Batch]):
    def __init__(self) -> None:
        self.rows = examples(8 * STEPS)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.rows[index]


def under_trainer(model: Any, optimizer: Any, accumulate: int, folder: Path) -> list[float]:
    """Trainer for STEPS steps, its own scheduler and clipping off; the logged losses."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), optimizers=(optimizer, None))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model: Any, optimizer: Any, accumulate: int) -> list[float]:
    """The same with nothing but a loop: losses are sums over all labels of a step, as Trainer's."""
    from transformers import get_scheduler

    scheduler = get_scheduler("linear", optimizer, 2, STEPS)
    parts, losses = iter(batches(8 // accumulate)), []
    for _ in range(STEPS):
        micro = [next(parts) for _ in range(accumulate)]
        count = torch.stack([batch["labels"][:, 1:].ne(-100).sum() for batch in micro]).sum()
        total = 0.0
        for batch in micro:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        scheduler.step()
        losses.append(total)
    return losses


@layouts
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("limit", [None, 0.3])
def test_trainer_is_the_hand_loop_to_the_bit(
    limit: float | None, accumulate: int, layout: str, tmp_path: Path
) -> None:
    settings = {"layout": layout, "max_grad_norm": limit}
    model, optimizer = build("adamw", **settings)
    losses = under_trainer(model, optimizer, accumulate, tmp_path)
    other, second = build("adamw", **settings)
    assert losses == pytest.approx(by_hand(other, second, accumulate), abs=1e-3)  # Trainer rounds
    expected = weights(other)
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())
    assert optimizer.param_groups[0]["lr"] == second.param_groups[0]["lr"] == 0.0
    assert optimizer.steps == STEPS
    assert optimizer.grad_norm == second.grad_norm
    if limit is not None:
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm > limit  # it did clip
    audit = optimizer.audit()
    assert (audit.cycles, audit.waiting, audit.without_gradient) == (1, 0, ())


# -- to rounding --------------------------------------------------------------------------------


@layouts
@rules
@pytest.mark.parametrize("limit", [None, 0.3])
def test_a_batch_of_eight_is_two_of_four(limit: float | None, rule: str, layout: str) -> None:
    whole = run(rule, layout=layout, max_grad_norm=limit)
    halves = run(rule, micro_batches=2, layout=layout, max_grad_norm=limit)
    assert_alike(whole, halves, 1e-5, 1e-6)


@layouts
@rules
def test_checkpointing_changes_nothing(rule: str, layout: str) -> None:
    assert_alike(run(rule, layout=layout), run(rule, checkpointing=True, layout=layout), 1e-5, 1e-6)
