"""Small parameters of all parts, drawn before a forward in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Directions, Displacement, HeldDisplacement

SMALL_BYTES = 128 << 10  # parameters up to this are drawn so


class Stacks:
    """The parts' values of small parameters, (P, *shape) each, drawn together."""

    def __init__(self, directions: Directions, params: list[torch.nn.Parameter], parts: int) -> None:
        self.directions, self.params, self.parts = directions, params, parts
        self.of: dict[int, Tensor] = {}
        self._many: noise.Many | None = None
        self._where: list[int] = []

    def draw(self, at: Displacement | HeldDisplacement, signs: tuple[int, ...]) -> None:
        """Part p ← w + signs[p // G]·Σ c·z of the p % G-th direction, G = P/len(signs) directions."""
        if not self.params:
            return
        where = [p.data_ptr() for p in self.params]
        if self._many is None or where != self._where:
            self._where = where
            slots = self.directions.slots
            self.of = {id(p): p.data.new_empty(self.parts, *p.shape) for p in self.params}
            items = [
                noise.Item(self.of[id(p)], p.data.contiguous(), slots[id(p)].id, slots[id(p)].group)
                for p in self.params
            ]
            self._many = noise.Many(items, self.directions.distribution)
        seeds_PQ, coefs_GPQ = at.by_part(self.params[0].device, signs, self.directions.groups)
        self._many.draw(seeds_PQ, coefs_GPQ)
