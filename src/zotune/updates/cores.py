"""Rules that read ĝ as a whole matrix, or go along with it when its coordinates change: of directions in a subspace.

Vectors, and what else has no core, are given to the same rules as they are.
"""

# n elements; a and b the two sides of a core.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zotune.updates.rule import Rule

if TYPE_CHECKING:
    from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Muon: steep at 0, so that singular values end within 0.7 to 1.2


@dataclass(frozen=True)
class Average(Rule):
    """m ← β·m + (1 − β)·ĝ, at the first step m ← ĝ; θ ← θ − lr·m.

    Where a subspace is drawn anew, m goes along: N ← N·(QᵀQ′)/D for W = … N·Qᵀ of D columns (`carries`).
    Source: LOZO-M, arXiv 2410.07698 and its code.
    """

    beta: float = 0.9

    buffers = ("m",)
    counts = True
    capturable = True
    state_copies = 1
    carries = ("m",)

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        beta = self.beta * (1 - 0.0 ** (steps - 1))  # 0 at the first step, of a number as of a graph's tensor
        m_n = state["m"].mul_(beta).add_(g_n * (1 - beta))
        return w_n - lr * m_n

    def reach(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return lr * g_Q


@dataclass(frozen=True)
class Orthogonalised(Rule):
    """θ ← θ − lr·msign(ĝ) of a matrix, msign(UΣVᵀ) = UVᵀ by five Newton–Schulz steps; of a vector θ ← θ − vectors·lr·ĝ.

    A ĝ of zeros moves nothing. Source: ZO-Muon, arXiv 2602.17155; the iteration's coefficients are those of Muon's public code.
    """

    vectors: float = 1e-5

    capturable = True

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        return w_n - lr * (self.vectors * g_n if g_n.dim() < 2 else msign(g_n))

    def reach(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        import torch

        return torch.cat([g_Q, lr.view(1)])


def msign(g_ab: Tensor) -> Tensor:
    """About UVᵀ of g = UΣVᵀ: x ← a·x + (b·A + c·A²)·x with A = x·xᵀ, five times, from g/‖g‖."""
    wide = g_ab.shape[0] > g_ab.shape[1]
    x = g_ab.mT if wide else g_ab
    x = x / (x.norm() + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if wide else x
