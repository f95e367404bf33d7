"""A member as a model of its own: copies of the displaced weights in the place of the model's, for as long as it decodes.

The weights are not written to: a parameter's `data` is the copy for a while, then its own tensor again, whatever happens.
"""

# Q directions, O and D the two sides of a parameter, R rank.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from zotune.directions import Directions, Displacement
from zotune.engines.lowrank import LowRankEngine


class Population:
    """Where members are: θ + sign·ε_g·z(seed), for the parameter groups g.

    rank: of low-rank directions, z = U·Vᵀ/√r of every matrix and dense of what has no factors; None: dense.
    """

    def __init__(self, directions: Directions, eps: float | Sequence[float], rank: int | None) -> None:
        self.directions, self.rank = directions, rank
        self.eps_G = (float(eps),) * directions.groups if isinstance(eps, (int, float)) else tuple(map(float, eps))
        if len(self.eps_G) != directions.groups:
            raise ValueError(f"eps has {len(self.eps_G)} numbers for {directions.groups} parameter groups")
        self.engine = None if rank is None else LowRankEngine(directions, rank)

    def at(self, members: Sequence[tuple[int, int]]) -> Displacement:
        """A direction a member, with its sign."""
        signs = tuple(sign for _, sign in members)
        if any(sign not in (-1, 1) for sign in signs):
            raise ValueError("a member's sign has to be -1 or 1")
        return Displacement(
            tuple(seed for seed, _ in members), tuple(tuple(eps * sign for sign in signs) for eps in self.eps_G)
        )

    @contextmanager
    def standing_in(self, at: Displacement, copies: dict[int, Tensor]) -> Iterator[None]:
        """The model at a displacement of one direction, meanwhile. copies: their memory, by parameter, that the next may use."""
        own: list[tuple[torch.nn.Parameter, Tensor]] = []
        try:
            for param in self.directions.params:
                data = param.data
                if id(param) not in copies:
                    copies[id(param)] = torch.empty_like(data)
                self._displace(param, at, copies[id(param)])
                own.append((param, data))
                param.data = copies[id(param)]
            yield
        finally:
            for param, data in own:
                param.data = data

    def _displace(self, param: torch.nn.Parameter, at: Displacement, out: Tensor) -> None:
        factored = None if self.engine is None else self.engine.factored
        if factored is None or all(param is not p for p in factored.params):
            self.directions.displaced(param, at, out)
            return
        _, coefs_Q = at.on(self.directions.slots[id(param)].group, param.device)
        u_QOR, v_QDR = factored.drawn(at).of[id(param)]
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        scaled_OR = u_QOR[0].to(wide) * (coefs_Q[0].to(wide) / math.sqrt(factored.rank))
        w_OD = param.data.view(len(scaled_OR), -1)
        out.view(w_OD.shape).copy_(torch.addmm(w_OD.to(wide), scaled_OR, v_QDR[0].to(wide).t()))
