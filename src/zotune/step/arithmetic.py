"""What follows from a step's losses, once: projected gradients, whether they can be applied, coefficients.

Functions of small tensors. The host calls them with tensors on the CPU, a captured graph with tensors that it fills anew at each
replay, to the same bits: losses, eps and lr are float64, and nothing here is a number from the host that a graph could not read.
"""

# C copies of a batch, K directions over its rows, Q directions of a step (queries × pairs), G parameter groups.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.estimators import Estimator
from zotune.record.scalars import mean, total
from zotune.updates import Linear, Rule


@dataclass(frozen=True)
class Given:
    """What a step is given beside its losses.

    eps_G, lr_G: float64, by parameter group. weights_K: n_k·pairs/B of each direction over the rows, float64; None where all are 1.
    pairs: directions that a full batch's rows have. most: bound on |g|. room: what a coefficient must stay under.
    """

    eps_G: Tensor
    lr_G: Tensor
    weights_K: Tensor | None
    pairs: int
    most: float | None
    room: float


def weights_of(shares_K: Sequence[int], pairs: int, device: torch.device | str = "cpu") -> Tensor | None:
    """n_k·pairs/B, so that −lr·g/pairs is −lr·(n_k/B)·g_k; None where all are 1, one direction for all rows among them."""
    rows = sum(shares_K)
    weights_K = [share * pairs / rows for share in shares_K]
    if len(shares_K) == 1 and pairs == 1:
        return None
    return None if all(w == 1 for w in weights_K) else torch.tensor(weights_K, dtype=torch.float64, device=device)


def projected(estimator: Estimator, rule: Rule, losses_CK: Tensor, given: Given) -> Tensor:
    """(G, Q) float64: g of each direction, query by query; zeros for the directions that a short batch lacks."""
    d_QK = estimator.differences(losses_CK)
    if given.weights_K is not None and not rule.normalises:
        d_QK = d_QK * given.weights_K
    g_GQK = torch.stack([rule.project(d_QK, eps, losses_CK) for eps in given.eps_G.unbind()])
    if given.weights_K is not None and rule.normalises:
        g_GQK = g_GQK * given.weights_K
    lacking = given.pairs - g_GQK.shape[2]
    g_GQ = (torch.nn.functional.pad(g_GQK, (0, lacking)) if lacking else g_GQK).flatten(1)
    return clipped(g_GQ, given.most)


def clipped(g_GQ: Tensor, most: float | None) -> Tensor:
    """Each g brought into [−most, most]; NaN stays."""
    return g_GQ if most is None else g_GQ.clamp(-most, most)


def applicable(rule: Rule, losses: Tensor, g_GQ: Tensor, given: Given) -> Tensor:
    """0-d bool: whether losses and update are finite, the update in the weights' dtype too: 16 bits overflow where 32 do not."""
    goes = torch.isfinite(losses).all()
    for g_Q, lr in zip(g_GQ, given.lr_G, strict=True):
        goes = goes & (rule.reach(g_Q, lr).abs() < given.room).all()  # NaN compares false
    return goes


def coefficients(
    rule: Linear, g_GQ: Tensor, lr_G: Tensor, goes: Tensor, memories: Mapping[int, Tensor] | None = None
) -> list[Tensor]:
    """(Q,) float32 for each parameter group, from g and lr as they are recorded; zeros, and nothing remembered, unless goes (0-d).

    memories: what the rule remembers, by parameter group (`Linear.memories`), changed in place.
    """
    found, memories = [], memories or {}
    for group, (g_Q, lr) in enumerate(zip(g_GQ, lr_G, strict=True)):
        held_M = memories.get(group, g_Q.new_zeros(rule.memory))
        coefs_Q, after_M = rule.recalled(g_Q, lr, held_M)
        if rule.memory:
            held_M.copy_(torch.where(goes, after_M, held_M))
        found.append(torch.where(goes, coefs_Q, torch.zeros_like(coefs_Q)))
    return found


def near(estimator: Estimator | None, losses_CK: Tensor, shares_K: Tensor) -> Tensor:
    """0-d float64: L(θ) as far as the places tell it, the mean over the rows. shares_K: float64, rows of each direction."""
    centre_K = mean(losses_CK) if estimator is None else estimator.centre(losses_CK)
    return total(centre_K * shares_K) / total(shares_K)
