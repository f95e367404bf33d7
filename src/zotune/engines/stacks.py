"""Small parameters of all parts, drawn before a forward in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Directions, Displacement, HeldDisplacement, PartsOf

SMALL_BYTES = 128 << 10  # parameters up to this are drawn so

# So are matrices with a side this short up to NARROW_BYTES: the two of an adapter, mostly. A product with one is bound by its x,
# which kernels then read once for all parts (`adapters`). They stay in memory, two copies of an adapter: little beside its base.
NARROW, NARROW_BYTES = 64, 4 << 20


class Stacks:
    """The parts' values of small parameters, (P, *shape) each, drawn together."""

    def __init__(self, directions: Directions, params: list[torch.nn.Parameter], parts: int) -> None:
        self.directions, self.params, self.parts = directions, params, parts
        self.of: dict[int, Tensor] = {}
        self._many: noise.Many | None = None
        self._moves: noise.Many | None = None
        self._where: list[int] = []

    def draw(self, at: Displacement | HeldDisplacement, parts: PartsOf) -> None:
        """Part p ← w + sign_p·(the term c·z of p's direction)."""
        if not self.params:
            return
        self._locate()
        assert self._many is not None
        self._many.draw(*at.on_parts(self.params[0].device, parts, self.directions.groups))

    def move(self, by: Displacement | HeldDisplacement) -> None:
        """The parameters themselves, which are contiguous: w ← w + Σ c·z."""
        if not self.params:
            return
        self._locate()
        assert self._moves is not None
        seeds_1Q, coefs_G1Q = by.together(self.params[0].device, self.directions.groups)
        self._moves.draw(seeds_1Q.contiguous(), coefs_G1Q.contiguous())

    def _locate(self) -> None:
        """The launches know addresses: anew where a parameter has moved in memory."""
        where = [p.data_ptr() for p in self.params]
        if self._many is not None and where == self._where:
            return
        self._where = where
        slots = self.directions.slots
        self.of = {id(p): p.data.new_empty(self.parts, *p.shape) for p in self.params}

        def many(outs: list[Tensor]) -> noise.Many:
            items = [
                noise.Item(out, p.data.contiguous(), slots[id(p)].id, slots[id(p)].group)
                for out, p in zip(outs, self.params, strict=True)
            ]
            return noise.Many(items, self.directions.distribution)

        self._many = many([self.of[id(p)] for p in self.params])
        self._moves = many([p.data for p in self.params])
