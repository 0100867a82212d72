"""docs/method.md section 6, run: full-batch, float64, the optimizer as it is.

The constants are measured, not derived: the theorem's are far smaller. What is asserted is its
form, that a cycle without momentum lowers H by a multiple of lr * ||grad H||^2, and that with
momentum n * min ||grad H||^2 stays bounded over n cycles.
"""

import itertools

import pytest
import torch
from torch import nn

from chunkft import ChunkedOptimizer

EPS = 0.1  # a bounded preconditioner needs eps well above 0


class Problem:
    """Loss of a model on one fixed batch; `curved` makes it non-convex."""

    def __init__(self, curved: bool):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 12, generator=generator, dtype=torch.float64)
        self.y = (self.x[:, 0] * self.x[:, 1] > 0).long()
        torch.manual_seed(0)
        layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2)] if curved else [nn.Linear(12, 2)]
        self.model = nn.Sequential(*layers).double()

    def loss(self) -> torch.Tensor:
        # the quadratic term bounds the level sets, so that gradients stay within some G
        weights = sum(p.square().sum() for p in self.model.parameters())
        return nn.functional.cross_entropy(self.model(self.x), self.y) + 1e-3 * weights

    def squared_gradient(self) -> float:
        gradients = torch.autograd.grad(self.loss(), list(self.model.parameters()))
        return sum(float(g.square().sum()) for g in gradients)


def cycles(curved, layout, chunks, interval, lr, beta1, count):
    """(H, ||grad H||^2) where each cycle begins."""
    problem = Problem(curved)
    optimizer = ChunkedOptimizer(
        problem.model,
        torch.optim.AdamW,
        lr=lr,
        betas=(beta1, 0.999),
        eps=EPS,
        weight_decay=0.0,
        chunks=chunks,
        interval=interval,
        layout=layout,
    )
    seen = []
    for _ in range(count):
        with optimizer.detached():
            seen.append((problem.loss().item(), problem.squared_gradient()))
        for _ in range(chunks * interval):
            problem.loss().backward()
            optimizer.step()
    return seen


@pytest.mark.parametrize("curved", [False, True], ids=["convex", "tanh"])
@pytest.mark.parametrize(("layout", "chunks", "interval"), [("stream", 2, 3), ("spread", 2, 1)])
def test_without_momentum_every_cycle_descends(curved, layout, chunks, interval):
    lr = 0.01
    seen = cycles(curved, layout, chunks, interval, lr, 0.0, 60)
    for (here, gradient), (following, _) in itertools.pairwise(seen):
        assert following <= here - 0.5 * lr * interval * gradient


@pytest.mark.parametrize("curved", [False, True], ids=["convex", "tanh"])
@pytest.mark.parametrize(("layout", "chunks", "interval"), [("stream", 2, 5), ("spread", 2, 2)])
def test_with_momentum_the_gradient_falls_as_one_over_cycles(curved, layout, chunks, interval):
    lr, count = 0.02, 250
    seen = cycles(curved, layout, chunks, interval, lr, 0.9, count)
    best, bound = float("inf"), seen[0][0] / (lr * interval)
    for n, (_, gradient) in enumerate(seen, start=1):
        best = min(best, gradient)
        assert n * best <= bound
    assert best < 0.05 * seen[0][1]
