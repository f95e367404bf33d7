"""One forward over the doubled batch: the first half of the rows reads θ + εz, the second θ − εz.

Each weight is read once; both copies are made in scratch, a tile at a time, and multiplied at once. On the same
read the weight takes the update of the step before. Vectors and other small parameters are drawn in one launch before the forward.
"""

# n rows of a half, D inputs, O outputs.

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.following import FollowingEngine
from zotune.engines.parts import PartedReads, Parts
from zotune.engines.stacks import NARROW, NARROW_BYTES, SMALL_BYTES, Stacks
from zotune.engines.waiting import Waiting

ALIGNED = 128  # rows of a tile: products of odd widths take slow kernels
TILE_BYTES = 16 << 20  # of a copy

# A product of few rows by a tile leaves processors idle, unless its blocks of outputs come in whole rounds of what a GPU does at
# once: two of them, or one where a copy for two is over MOST_BYTES. Scratch is two copies.
BLOCK, PROCESSORS, ROUNDS = 128, 132, 2
MOST_BYTES = 96 << 20

# Numbers of a batch, tokens mostly, up to which one forward is worth it on a CPU. It saves a draw of each weight, whatever the
# batch; a doubled batch's activations leave the caches and are allocated anew, which grows with it (docs/performance.md).
WORTH_ON_CPU = 512

# A product adds a bias on its way out only where it is one half's, by a whole copy, since cuBLAS has no such end for batches of
# products nor for outputs with gaps. Else the bias is a pass over the outputs, 2·2n·O elements read and written. Two products in
# turn must each fill a GPU; that both copies are larger than a tile's costs nothing, since not even those stay in cache.
BIAS_IN_PRODUCT = True
FILLS_GPU = 1 << 22  # outputs of a product: two of 128 × 128 for each of 132 processors
WHOLE_BYTES = 64 << 20  # of a copy that is whole for its bias' sake


class DualEngine(FollowingEngine):
    """L(θ + displacement) and L(θ − displacement) of every row of a batch, for one direction.

    asked: updates given to `hold` are written on the next doubled forward's read of each weight. Whoever else reads the
    weights calls `settle` first. An engine that nobody named leaves the weights current, and takes long batches by separate
    forwards on a CPU.
    """

    name = "dual"

    def __init__(self, directions: Directions, asked: bool = False) -> None:
        super().__init__(directions, asked)
        self.may_hold = asked
        self.waiting = Waiting(directions)
        self.stacks = Stacks(directions, [p for p in directions.params if is_small(p)], parts=2)

    @property
    def holds(self) -> bool:  # type: ignore[override]
        return self.may_hold and self.usable

    def hold(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        self.settle()
        if self.holds:
            self.waiting.hold(by)
        else:
            self.apply(by, at_once)

    def apply(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        self.settle()
        super().apply(by, at_once)

    def apply_compensated(self, *args: Any, **kwargs: Any) -> None:
        self.settle()
        super().apply_compensated(*args, **kwargs)

    def apply_each(self, *args: Any, **kwargs: Any) -> None:
        self.settle()
        super().apply_each(*args, **kwargs)

    def settle(self) -> None:
        self.waiting.settle()

    def arm(self, count: int) -> None:
        self.waiting.arm(count)

    def drop(self) -> None:
        self.waiting.drop()

    def loss(self, closure: Callable[[], Any], at: Displacement | HeldDisplacement) -> Any:
        self.settle()
        return super().loss(closure, at)

    def _worth(self, batch: Mapping[str, Any]) -> bool:
        if self.asked or self.directions.params[0].device.type != "cpu":
            return True
        return max((t.numel() for t in batch.values() if isinstance(t, Tensor)), default=0) <= WORTH_ON_CPU

    def _doubled(
        self,
        loss: Callable[[Any], Any],
        batch: Mapping[str, Any],
        at: Displacement | HeldDisplacement,
        shares: tuple[int, ...] | None,
    ) -> tuple[Tensor, Tensor]:
        found = super()._doubled(loss, batch, at, shares)
        self.settle()  # tables of which only rows were read
        return found

    def _reads(self, at: Displacement | HeldDisplacement, shares: tuple[int, ...], copies: int) -> PartedReads:
        assert copies == 2
        assert len(at.seeds_Q) == 1
        self.waiting.take_small(self.stacks)
        self.stacks.draw(at, signs=(1, -1))
        return _DualReads(self, at, shares[0])


class _DualReads(PartedReads):
    def __init__(self, engine: DualEngine, at: Displacement | HeldDisplacement, rows: int) -> None:
        super().__init__(Parts((rows, rows)), engine.directions.params, engine.stacks.of)
        self.engine, self.at, self.waiting = engine, at, engine.waiting

    def copy(self, param: Any, part: int) -> Tensor:
        self.waiting.take(param)
        by = self.at if part == 0 else self.at.negated()
        return self.engine.directions.displaced(param, by, torch.empty_like(param))

    def product(self, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
        (outputs, width), scratch = weight.shape, self.engine.scratch
        halves = x.reshape(2, -1, width)
        out = x.new_empty(2, halves.shape[1], outputs)
        rows, with_bias = plan(weight, halves.shape[1], bias is not None)
        copies = scratch.take(weight.data[:rows].expand(2, rows, width))
        if not weight.is_contiguous() or self.waiting.row(weight):
            self.waiting.take(weight)
        for first in range(0, outputs, rows):
            last = min(first + rows, outputs)
            tiles = copies.view(-1)[: 2 * (last - first) * width].view(2, last - first, width)
            update = self.waiting.of(weight)
            self.engine.directions.displaced_both(weight, first, last, self.at, tiles[0], tiles[1], update)
            if update is not None:
                self.waiting.taken(weight, last)
            if with_bias:
                assert bias is not None
                for half in range(2):
                    own = bias if bias.dim() == 1 else bias[half]
                    torch.addmm(own, halves[half], tiles[half].t(), out=out[half])
            else:
                torch.bmm(halves, tiles.transpose(1, 2), out=out[:, :, first:last])
        scratch.give(copies)
        out = out.view(*x.shape[:-1], outputs)
        return out if bias is None or with_bias else self.plus_bias(out, bias)

    def rows(self, ids: Tensor, weight: Any) -> Any:
        """Where the weight lacks an update, these rows have it and the weight waits: a head may read it whole."""
        if self.waiting.row(weight):
            self.waiting.take(weight)
        halves, update = ids.reshape(2, -1), self.waiting.of(weight)
        out = torch.empty((2, halves.shape[1], *weight.shape[1:]), dtype=weight.dtype, device=weight.device)
        for half, by in enumerate((self.at, self.at.negated())):
            self.engine.directions.displaced_rows(weight, halves[half].long(), by, out[half], update)
        return out.view(*ids.shape, *weight.shape[1:])


def is_small(param: Tensor) -> bool:
    """Whether both copies of a parameter are drawn before the forward."""
    narrow = param.dim() == 2 and min(param.shape) <= NARROW
    return param.is_contiguous() and param.numel() * param.element_size() <= (NARROW_BYTES if narrow else SMALL_BYTES)


def plan(weight: Tensor, n: int, has_bias: bool, on_card: bool | None = None) -> tuple[int, bool]:
    """Rows of a weight that are copied and multiplied at once, and whether the product adds the bias.

    n: rows of a half, or tokens. on_card: as if the weight were on a GPU, whatever device it is on.
    """
    on_card = weight.is_cuda if on_card is None else on_card
    outputs, width = weight.shape
    size = weight.numel() * weight.element_size()
    rows = -(-outputs // -(-size // TILE_BYTES) // ALIGNED) * ALIGNED
    if on_card and n >= BLOCK:
        round_ = PROCESSORS // (2 * -(-n // BLOCK)) * BLOCK  # rows of a weight
        most = MOST_BYTES // (width * weight.element_size())
        rows = max(rows, round_ * min(ROUNDS, most // max(round_, 1)))
    rows = min(outputs, rows)
    within = has_bias and BIAS_IN_PRODUCT and on_card and n * outputs >= FILLS_GPU
    if within and size <= WHOLE_BYTES:
        rows = outputs
    return rows, within and rows == outputs
