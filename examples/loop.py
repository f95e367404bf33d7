"""A plain loop on an objective that has no gradient: how many digits of a text the model's best guess gets wrong.

    python examples/loop.py --steps 300

The model is a toy that learns to count up: given a digit it says the next. Its objective is the share of wrong answers
itself, no loss that stands in for it, so back-propagation has nothing to propagate.
"""

import argparse

import torch
from torch import nn

from zotune import ZeroOrderOptimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10)).eval()
    digits = torch.arange(10).repeat(20)
    following = (digits + 1) % 10

    def wrong() -> torch.Tensor:
        return (model(digits).argmax(-1) != following).float().mean()

    optimizer = ZeroOrderOptimizer(model, method="zo-sgd", lr=3e-2, eps=1e-1, queries=8, seed=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, options.steps)
    print(f"before: {wrong():.2f} wrong")
    for _ in range(options.steps):
        optimizer.step(wrong)  # no backward(), no zero_grad()
        schedule.step()
    print(f"after:  {wrong():.2f} wrong, {optimizer.forward_passes} forward passes")


if __name__ == "__main__":
    main()
