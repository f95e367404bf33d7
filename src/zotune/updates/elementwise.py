"""Rules that read ĝ = (1/Q) Σ_q g_q·z_q element by element: it is drawn a tile at a time, whatever Q, and given up.

On CUDA they run as `zotune.updates.fused` has them, one pass a parameter.
"""

# Q directions, n elements of a tile.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zotune.record.scalars import float32, shrinkage
from zotune.updates.rule import TILE, Rule, State

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sign(Rule):
    """θ ← θ − lr·sign(ĝ), element by element; sign(0) = 0. Source: arXiv 1810.03737 (ZO-signSGD), 2402.11592."""

    kernel = "sign"
    capturable = True

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        return w_n - lr * g_n.sign()

    def reach(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return _with(g_Q, lr)


@dataclass(frozen=True)
class Momentum(Rule):
    """m ← β·m + ĝ, θ ← θ − lr·m; no dampening, so that the step grows to lr·ĝ/(1 − β). Source: arXiv 2402.11592, ZO-SGD-MMT."""

    beta: float = 0.9

    buffers = ("m",)
    kernel = "momentum"
    capturable = True
    state_copies = 1

    def numbers(self, lr: float, decay: float, steps: int) -> tuple[float, ...]:
        return *super().numbers(lr, decay, steps), self.beta

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        m_n = state["m"].mul_(self.beta).add_(g_n)
        return w_n - lr * m_n

    def reach(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return lr * g_Q


@dataclass(frozen=True)
class Adam(Rule):
    """m ← β₁m + (1 − β₁)ĝ, v ← β₂v + (1 − β₂)ĝ², θ ← θ − lr·m̂/(√v̂ + ε), m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ).

    Source: Kingma & Ba, arXiv 1412.6980; on ZO estimates arXiv 2402.11592, ZO-Adam.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    buffers = ("m", "v")
    kernel = "adam"
    counts = True
    capturable = True
    state_copies = 2

    def numbers(self, lr: float, decay: float, steps: int) -> tuple[float, ...]:
        shrink, lr = super().numbers(lr, decay, steps)
        by_beta1, by_beta2 = 1 - self.beta1**steps, 1 - self.beta2**steps
        return shrink, lr / by_beta1, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, by_beta2, self.epsilon

    def move(self, w_n: Tensor, g_n: Tensor, state: Mapping[str, Tensor], lr: float, steps: int) -> Tensor:
        m_n = state["m"].mul_(self.beta1).add_(g_n, alpha=1 - self.beta1)
        v_n = state["v"].mul_(self.beta2).addcmul_(g_n, g_n, value=1 - self.beta2)
        root_n = (v_n / (1 - self.beta2**steps)).sqrt_().add_(self.epsilon)
        return w_n - lr / (1 - self.beta1**steps) * (m_n / root_n)

    def _by_torch(self, param: Any, gradient: Any, state: State, lr: float, decay: float) -> bool:
        """Its fused AdamW wants one dtype for all: beside float32 moments narrow weights are widened, in tiles."""
        import torch
        from torch.optim.adamw import adamw

        lr, shrink = float32(lr), shrinkage(lr, decay)
        self.reserve([param], state)
        own, wide = state[param], torch.promote_types(param.dtype, torch.float32)
        m, v = (own[name].view(-1) for name in self.buffers)
        # at lr 0 not a bit of the weights may change
        if not lr or m.dtype != v.dtype or m.dtype not in (wide, param.dtype) or not param.data.is_contiguous():
            return False
        flat, slope = param.data.view(-1), gradient.reshape(-1).contiguous()  # the kernels know no strides
        size = flat.numel() if m.dtype == param.dtype else TILE
        for first in range(0, flat.numel(), max(size, 1)):
            at = slice(first, first + size)
            w_n = flat[at].to(m.dtype)
            before = torch.full((), own.get("steps", 0), dtype=torch.float32, device=param.device)
            adamw(
                [w_n], [slope[at].to(m.dtype)], [m[at]], [v[at]], [], [before], fused=True, amsgrad=False, maximize=False,
                beta1=self.beta1, beta2=self.beta2, eps=self.epsilon, lr=lr, weight_decay=(1 - shrink) / lr,
            )  # fmt: skip
            if m.dtype != param.dtype:
                flat[at] = w_n
        own["steps"] = own.get("steps", 0) + 1
        return True

    def reach(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        return _with(g_Q, lr)


def _with(g_Q: Tensor, lr: Tensor) -> Tensor:
    import torch

    return torch.cat([g_Q, lr.view(1)])
