"""Methods of somebody's own, as a researcher would write them: no line of zotune is touched."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zotune import Method
from zotune.estimators import Probe
from zotune.updates import Linear, Rule


@dataclass(frozen=True)
class Forward:
    """g = (L(θ + 2·eps·z) − L(θ))/(2·eps): the step of two places in one direction."""

    queries: int = 1

    @property
    def probes(self):
        return tuple(probe for q in range(self.queries) for probe in (Probe(q, 0), Probe(q, 1)))

    def differences(self, losses_CK):
        return losses_CK[1::2] - losses_CK[0::2]

    def centre(self, losses_CK):
        return losses_CK[0]


@dataclass(frozen=True)
class Tanh(Linear):
    """c = −lr·tanh(g)/Q, with the losses' own spread mixed in before it is recorded."""

    def project(self, d_QK, eps, losses_CK):
        return d_QK / eps * (1 + losses_CK.std(0, correction=0))

    def coefficients(self, g_Q, lr):
        return (-lr * torch.tanh(g_Q) / g_Q.numel()).float()


@dataclass(frozen=True)
class Cubed(Rule):
    """θ ← θ − lr·m³, m ← ½m + ĝ: element by element, with state."""

    buffers = ("m",)
    state_copies = 1

    def move(self, w_n, g_n, state, lr, steps):
        m_n = state["m"].mul_(0.5).add_(g_n)
        return w_n - lr * m_n**3

    def reach(self, g_Q, lr):
        return lr * g_Q


TANH = Method(Forward(2), Tanh(), direction="rademacher", lr=3e-3, eps=2e-2)


def cubed(queries: int = 1) -> Method:
    """θ ← θ − lr·m³."""
    return Method(Forward(queries), Cubed(), lr=1e-3)
