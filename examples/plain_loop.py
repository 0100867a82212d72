"""ChunkedOptimizer in a plain loop, on any nn.Module: `python examples/plain_loop.py`."""

import torch
from torch import nn

from chunkft import ChunkedOptimizer


def main(steps: int = 200) -> float:
    """Fit sin(x); returns the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    optimizer = ChunkedOptimizer(
        model, torch.optim.AdamW, lr=1e-2, chunks=4, interval=5, layout="spread"
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        x = torch.rand(128, 1) * 6 - 3
        loss = nn.functional.mse_loss(model(x), x.sin())
        loss.backward()  # gradients of the active chunk only
        optimizer.step()  # update, advance the schedule, attach the next chunk
        scheduler.step()
    print(f"loss {loss.item():.4f}, {optimizer.audit().cycles} cycles")
    optimizer.detach()  # the model is stock again
    return loss.item()


if __name__ == "__main__":
    main()
