"""Directions that stay in a subspace: z = P·u·Qᵀ of a matrix W (O × D), u drawn anew each step, P and Q kept for many steps.

What a step estimates, and a rule remembers, is then of u's shape, the core: small beside W. P (O × r) and Q (D × r) follow from
the run's seed, or from what the linear maps were given; where one of the two is left out it is the identity.
"""

# O and D the two sides of a matrix, r the rank, n rows of inputs.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zotune import noise

BASES = 0xFFFFFFFF  # the query of the seeds that bases are drawn by: no step has so many

Basis = Literal["orthonormal", "normal"]


@dataclass(frozen=True)
class Subspace:
    """left, right: P and Q: "orthonormal" (QR factor of a normal matrix), "normal" (the matrix itself), None for the identity.
    inputs: instead of both, the basis of a linear map's inputs alone, orthonormal, taken at the first step from its rows.
    every: steps until P and Q are drawn anew; None: never. step: W ← W + step·P·Δ·Qᵀ where the rule moves the core by Δ; None: 1/r.

    >>> Subspace(right="normal", every=50, step=None)
    Subspace(left=None, right='normal', inputs=False, every=50, step=None)
    """

    left: Basis | None = None
    right: Basis | None = None
    inputs: bool = False
    every: int | None = None
    step: float | None = 1.0

    def __post_init__(self) -> None:
        if self.inputs == (self.left is not None or self.right is not None):
            raise ValueError("a subspace: give left, right or both, or inputs alone")

    def turn(self, step: int) -> int:
        """Which bases a step has: the number of those before."""
        return step // self.every if self.every else 0


def drawn(kind: Basis, side: int, rank: int, seed: int, turn: int, pid: int, device: torch.device) -> Tensor:
    """(side, rank) float32: a basis of a run's seed, as `Subspace` names it.

    Orthonormal: Q of a QR in float64, with the signs that make R's diagonal positive, so that it is one matrix whatever the
    library. The same bits on one device with as many threads; elsewhere within the 1e-6 that its normals may differ by.
    """
    normal = torch.empty(side * rank, device=device)
    noise.fill(normal, noise.step_seed(seed, turn, BASES), pid, "gaussian")
    return normal.view(side, rank) if kind == "normal" else orthonormal(normal.view(side, rank))


def orthonormal(columns: Tensor) -> Tensor:
    """(D, r) float32: the QR factor of the columns, D ≥ r, R's diagonal positive."""
    q, r = torch.linalg.qr(columns.double())
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).float()


def principal(inputs_nD: Tensor, rank: int) -> Tensor:
    """(D, rank) float32: the right singular vectors of the largest singular values, each with its largest element positive.

    Of fewer rows than rank the rest are zeros, so that nothing moves along them.
    """
    _, _, vt = torch.linalg.svd(inputs_nD.double(), full_matrices=False)
    v_Dr = vt[:rank].t()
    v_Dr = v_Dr * v_Dr.gather(0, v_Dr.abs().argmax(0, keepdim=True)).sign()
    return torch.nn.functional.pad(v_Dr, (0, rank - v_Dr.shape[1])).float()
