"""Losses at displaced weights → the projected gradient g_q of each direction.

An estimator says where to evaluate the loss (`probes`) and what follows from the losses (`estimate`). The steps are in
units of eps, so that parameter groups with different eps share one probe.
"""

# Q queries (directions), P probes.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Probe:
    """Evaluate the loss at θ + sign·eps·z_query; sign 0 is θ itself."""

    query: int
    sign: int


class Estimator(Protocol):
    @property
    def queries(self) -> int: ...

    @property
    def probes(self) -> tuple[Probe, ...]: ...

    def differences(self, losses_P: Sequence[float]) -> list[float]:
        """d_q, to be divided by a group's eps: g_q = d_q/eps. losses_P in the order of `probes`."""
        ...

    def centre(self, losses_P: Sequence[float]) -> float:
        """L(θ) as far as the probes tell it, for logging."""
        ...


@dataclass(frozen=True)
class TwoSided:
    """g_q = (L(θ + eps·z_q) − L(θ − eps·z_q)) / (2·eps).

    2Q forwards. Truncation error O(eps²), exact for a quadratic; rounding error about ulp(L)/eps.
    Source: Spall 1992; MeZO, arXiv 2305.17333.

    >>> TwoSided(queries=1).differences([3.0, 1.0])
    [1.0]
    """

    queries: int = 1

    @property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(Probe(q, sign) for q in range(self.queries) for sign in (+1, -1))

    def differences(self, losses_P: Sequence[float]) -> list[float]:
        return [(losses_P[2 * q] - losses_P[2 * q + 1]) / 2 for q in range(self.queries)]

    def centre(self, losses_P: Sequence[float]) -> float:
        return sum(losses_P) / len(losses_P)


@dataclass(frozen=True)
class OneSided:
    """g_q = (L(θ + eps·z_q) − L(θ)) / eps.

    Q + 1 forwards. Truncation error O(eps). Source: arXiv 2402.11592, section 3.

    >>> OneSided(queries=2).differences([1.0, 3.0, 0.5])
    [2.0, -0.5]
    """

    queries: int = 1

    @property
    def probes(self) -> tuple[Probe, ...]:
        return (Probe(0, 0), *(Probe(q, +1) for q in range(self.queries)))

    def differences(self, losses_P: Sequence[float]) -> list[float]:
        return [loss - losses_P[0] for loss in losses_P[1:]]

    def centre(self, losses_P: Sequence[float]) -> float:
        return losses_P[0]


@dataclass(frozen=True)
class Directional:
    """g_q = ∇L(θ)ᵀz_q, exact, by one Jacobian-vector product each: no eps, no truncation error.

    Q forwards of about twice the work and activations of one layer. The losses of its probes are L(θ); their derivatives
    come with them. Source: Baydin et al. 2022, arXiv 2202.08587; Forward-Grad in arXiv 2402.11592.
    """

    queries: int = 1

    @property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(Probe(q, 0) for q in range(self.queries))

    def differences(self, losses_P: Sequence[float]) -> list[float]:
        raise TypeError("a directional derivative is no difference of losses")

    def centre(self, losses_P: Sequence[float]) -> float:
        return sum(losses_P) / len(losses_P)


@dataclass(frozen=True)
class Exact:
    """∇L(θ) by back-propagation: no direction, one forward and one backward."""

    queries: int = 0

    @property
    def probes(self) -> tuple[Probe, ...]:
        return (Probe(0, 0),)

    def differences(self, losses_P: Sequence[float]) -> list[float]:
        return []

    def centre(self, losses_P: Sequence[float]) -> float:
        return losses_P[0]
