"""Losses at places → the projected gradient g_q of each direction.

An estimator says at which places it wants the loss (`probes`) and what follows from the losses (`differences`). The steps are in
units of eps, so that parameter groups with different eps share one probe. One of your own is a class with the four members of
`Estimator`; it gets and gives small tensors, on whatever device they are, so that it is part of a captured step.
"""

# Q queries, C probes (copies of a batch), K directions over the rows of a batch.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from zotune.errors import OptionError
from zotune.record.scalars import mean

if TYPE_CHECKING:
    from torch import Tensor


class Probe(NamedTuple):
    """Evaluate the loss at θ + sign·eps·z_query; sign 0 is θ itself."""

    query: int
    sign: int


class Estimator(Protocol):
    """What a method asks the loss for. Where a batch's rows have K directions, each column of the losses is of the same rows."""

    @property
    def queries(self) -> int:
        """Q: directions for the same rows."""
        ...

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The C places of the same rows."""
        ...

    def differences(self, losses_CK: Tensor) -> Tensor:
        """(Q, K) float64: d, to be divided by a group's eps: g = d/eps. losses_CK float64, in the order of `probes`.

        Plain functions of the tensor, without numbers from the host (`tolist`, `torch.tensor`): a graph may hold them.
        """
        ...

    def centre(self, losses_CK: Tensor) -> Tensor:
        """(K,): L(θ) as far as the probes tell it, for logging; linear in the losses."""
        ...


@dataclass(frozen=True)
class TwoSided:
    """g_q = (L(θ + eps·z_q) − L(θ − eps·z_q)) / (2·eps).

    2Q forwards. Truncation error O(eps²), exact for a quadratic; rounding error about ulp(L)/eps.
    Source: Spall 1992; MeZO, arXiv 2305.17333.

    >>> import torch
    >>> TwoSided(queries=1).differences(torch.tensor([[3.0], [1.0]])).tolist()
    [[1.0]]
    """

    queries: int = 1

    @property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(Probe(q, sign) for q in range(self.queries) for sign in (+1, -1))

    def differences(self, losses_CK: Tensor) -> Tensor:
        return (losses_CK[0::2] - losses_CK[1::2]) / 2

    def centre(self, losses_CK: Tensor) -> Tensor:
        return mean(losses_CK)


@dataclass(frozen=True)
class OneSided:
    """g_q = (L(θ + eps·z_q) − L(θ)) / eps.

    Q + 1 forwards. Truncation error O(eps). Source: arXiv 2402.11592, section 3.

    >>> import torch
    >>> OneSided(queries=2).differences(torch.tensor([[1.0], [3.0], [0.5]])).tolist()
    [[2.0], [-0.5]]
    """

    queries: int = 1

    @property
    def probes(self) -> tuple[Probe, ...]:
        return (Probe(0, 0), *(Probe(q, +1) for q in range(self.queries)))

    def differences(self, losses_CK: Tensor) -> Tensor:
        return losses_CK[1:] - losses_CK[0]

    def centre(self, losses_CK: Tensor) -> Tensor:
        return losses_CK[0]


@dataclass(frozen=True)
class LeaveOneOut:
    """g_q = Q/(Q − 1)·(L(θ + eps·z_q) − mean_i L(θ + eps·z_i)) / eps: each loss beside the mean of the others.

    Q forwards, Q ≥ 2: no place at θ itself. (1/Q) Σ g_q·z_q estimates the gradient without bias up to O(eps²), with less variance
    than differences to L(θ) as Q grows. Source: leave-one-out baselines, Kool et al. 2019; for zeroth order AIM-ZO.

    >>> import torch
    >>> LeaveOneOut(queries=2).differences(torch.tensor([[1.0], [3.0]])).tolist()
    [[-2.0], [2.0]]
    """

    queries: int = 2

    def __post_init__(self) -> None:
        if self.queries < 2:
            raise OptionError(
                "queries",
                f"queries={self.queries}: leave-one-out compares places of the same rows; give 2 or more",
            )

    @property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(Probe(q, +1) for q in range(self.queries))

    def differences(self, losses_CK: Tensor) -> Tensor:
        return (losses_CK - mean(losses_CK)) * (self.queries / (self.queries - 1))

    def centre(self, losses_CK: Tensor) -> Tensor:
        return mean(losses_CK)


ESTIMATORS: dict[str, type[TwoSided] | type[OneSided] | type[LeaveOneOut]] = {
    "two-sided": TwoSided,
    "one-sided": OneSided,
    "leave-one-out": LeaveOneOut,
}
