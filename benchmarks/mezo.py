"""The reference that zotune is measured against: a MeZO step as the public codes take it, on the weights themselves.

Written from the description in arXiv 2305.17333, section 2: θ + εz, then − 2εz, then + εz, each time drawing every z anew as
a whole tensor from torch's generator, then the update, drawing it once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class InPlaceMeZO:
    """ZO-SGD in place. Four passes over the weights a step; in 16 bits they do not come back to where they were."""

    def __init__(self, model: nn.Module, lr: float, eps: float, seed: int = 0, direction: str = "gaussian") -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps, self.direction = lr, eps, direction
        self.seeds = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        seed = int(torch.randint(2**31, (1,), generator=self.seeds))
        self._move(seed, self.eps)
        plus = closure().mean()
        self._move(seed, -2 * self.eps)
        minus = closure().mean()
        self._move(seed, self.eps)
        g = float((plus - minus) / (2 * self.eps))
        self._move(seed, -self.lr * g)
        return float((plus + minus) / 2)

    def _move(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for param in self.params:
            z = torch.normal(0.0, 1.0, size=param.shape, device=param.device, dtype=param.dtype)
            if self.direction == "rademacher":
                z = z.sign()
            param.data = param.data + scale * z
