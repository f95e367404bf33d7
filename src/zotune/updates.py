"""Projected gradients → the coefficient of each direction. Pure functions of scalars: no tensor is seen here."""

# Q queries.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zotune.trajectory import coefficient

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sgd:
    """c_q = −lr·g_q / Q, so that Σ c_q·z_q = −lr·ĝ with ĝ the mean of the Q estimates.

    lr and g are rounded to float32 first, and so is c: what a run records is exactly what it applied.
    Source: MeZO, arXiv 2305.17333; ZO-SGD in arXiv 2402.11592.
    """

    def coefficients(self, g_Q: Sequence[float], lr: float) -> list[float]:
        return [coefficient(lr, g, 1 / len(g_Q)) for g in g_Q]

    def coefficients_on_device(self, g_Q: Tensor, lr: Tensor) -> Tensor:
        """The same numbers to the bit, (Q,) float32, from (Q,) and 0-d float64 tensors."""
        return (-(lr.float().double() * g_Q.float().double()) * (1 / g_Q.numel())).float()
