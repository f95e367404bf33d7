"""Which member sits in which slot, and the reads by which a forward's rows see their members' weights.

They are the engine `lowrank`'s: each row is a part, with factors of its own beside one shared product; small parameters are drawn
once a member. What depends on who sits where is in tensors that stay in their places, where a captured step finds the next ones.
"""

# S seats, M members, G parameter groups.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.decode.members import Population
from zotune.directions import Displacement, PartsOf
from zotune.engines.factors import Factors
from zotune.engines.lowrank import LowRankReads
from zotune.engines.parts import Parts
from zotune.engines.stacks import Stacks


class MemberWeights:
    """What the members' weights are made of: factors of the matrices, small parameters whole (the unperturbed last).

    Drawn by `draw`, into memory that the next as many members will have.
    """

    at: Displacement
    factors: Factors

    def __init__(self, population: Population, count: int) -> None:
        assert population.engine is not None
        self.population, self.engine, self.count = population, population.engine, count
        self._stacks = Stacks(population.directions, self.engine.factored.dense, count + 1)
        self._parts = PartsOf([*range(count), 0], [1] * count + [0])

    def draw(self, members: Sequence[tuple[int, int]]) -> None:
        self.at = self.population.at(members)
        self.factors = self.engine.factored.drawn(self.at)
        self._stacks.draw(self.at, self._parts)

    @property
    def small(self) -> dict[int, Tensor]:
        """(M + 1, …) of each small parameter."""
        return self._stacks.of

    def reads(self, members: Sequence[int]) -> SeatReads:
        """The mode for a row of each of these, −1 for the unperturbed model."""
        reads = SeatReads(self, len(members))
        reads.deal(members)
        return reads


class SeatReads(LowRankReads):
    """The mode of so many rows, whose members may be dealt anew between forwards."""

    def __init__(self, weights: MemberWeights, seats: int) -> None:
        ones = (1,) * seats
        small = {key: stack.new_empty(seats, *stack.shape[1:]) for key, stack in weights.small.items()}
        super().__init__(weights.engine, weights.at, Parts(ones, ones, ones), small, weights.factors)
        self.weights = weights
        device = weights.engine.directions.params[0].device
        self._seated_S, self._displaced_S = self.parts.tables(device)

    def deal(self, members: Sequence[int]) -> None:
        """The member of each seat. Its sign is in the displacement; a part's is whether it is displaced at all."""
        self.at = self.weights.at
        self.parts.direction_P = tuple(max(member, 0) for member in members)
        self.parts.sign_P = tuple(int(member >= 0) for member in members)
        self._seated_S.copy_(torch.tensor(self.parts.direction_P, dtype=torch.int32))
        self._displaced_S.copy_(torch.tensor(self.parts.sign_P, dtype=torch.float32))
        for (group, dtype), scale_S in self._scales.items():
            scale_S.copy_(self._scales_of(group, dtype))
        last = len(self.at.seeds_Q)
        rows_S = torch.tensor([member if member >= 0 else last for member in members], device=self._seated_S.device)
        for key, stack in self.stacks.items():
            torch.index_select(self.weights.small[key], 0, rows_S, out=stack)

    def _scale(self, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if (group, dtype) not in self._scales:
            self._scales[group, dtype] = self._scales_of(group, dtype)
        return self._scales[group, dtype]

    def _scales_of(self, group: int, dtype: torch.dtype) -> Tensor:
        """(S,): ±ε/√r of each seat's member, 0 where it is not displaced."""
        _, coefs_M = self.at.on(group, self._seated_S.device)
        return (coefs_M[self._seated_S] * self._displaced_S / math.sqrt(self.rank)).to(dtype)
