"""One forward over the doubled batch: the first half of the rows reads θ + εz, the second θ − εz.

Each weight is read once; both copies are made in scratch, small enough to stay in cache, and multiplied at once. Vectors and
other small parameters are drawn in one launch before the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.following import FollowingEngine
from zotune.engines.parts import PartedReads, Parts
from zotune.engines.stacks import SMALL_BYTES, Stacks

ALIGNED = 128  # rows of a tile: products of odd widths take slow kernels
TILE_BYTES = 16 << 20  # of a copy: both stay in a GPU's second cache


class DualEngine(FollowingEngine):
    """L(θ + displacement) and L(θ − displacement) of every row of a batch, for one direction."""

    name = "dual"

    def __init__(self, directions: Directions) -> None:
        super().__init__(directions)
        small = [p for p in directions.params if p.numel() * p.element_size() <= SMALL_BYTES]
        self.stacks = Stacks(directions, small, parts=2)

    def _reads(self, at: Displacement | HeldDisplacement, shares: tuple[int, ...], copies: int) -> PartedReads:
        assert copies == 2
        assert len(at.seeds_Q) == 1
        self.stacks.draw(at, signs=(1, -1))
        return _DualReads(self, at, shares[0])


class _DualReads(PartedReads):
    def __init__(self, engine: DualEngine, at: Displacement | HeldDisplacement, rows: int) -> None:
        super().__init__(Parts((rows, rows)), engine.directions.params, engine.stacks.of)
        self.engine, self.at = engine, at

    def copy(self, param: Any, part: int) -> Tensor:
        by = self.at if part == 0 else self.at.negated()
        return self.engine.directions.displaced(param, by, torch.empty_like(param))

    def product(self, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
        width, scratch = weight.shape[1], self.engine.scratch
        halves = x.reshape(2, -1, width)
        out = x.new_empty(2, halves.shape[1], weight.shape[0])
        size = weight.numel() * weight.element_size()
        rows = min(weight.shape[0], -(-weight.shape[0] // -(-size // TILE_BYTES) // ALIGNED) * ALIGNED)
        copies = scratch.take(weight.data[:rows].expand(2, rows, width))
        for first in range(0, weight.shape[0], rows):
            last = min(first + rows, weight.shape[0])
            tiles = copies.view(-1)[: 2 * (last - first) * width].view(2, last - first, width)
            self.engine.directions.displaced_both(weight, first, last, self.at, tiles[0], tiles[1])
            torch.bmm(halves, tiles.transpose(1, 2), out=out[:, :, first:last])
        scratch.give(copies)
        out = out.view(*x.shape[:-1], weight.shape[0])
        return out if bias is None else self.plus_bias(out, bias)

    def rows(self, ids: Tensor, weight: Any) -> Any:
        halves = ids.reshape(2, -1)
        out = torch.empty((2, halves.shape[1], *weight.shape[1:]), dtype=weight.dtype, device=weight.device)
        for half, by in enumerate((self.at, self.at.negated())):
            self.engine.directions.displaced_rows(weight, halves[half].long(), by, out[half])
        return out.view(*ids.shape, *weight.shape[1:])
