"""One forward over the copies of a batch, each of which reads weights of its own: θ + εz, θ − εz, θ.

Both signs of a direction are made at one read of a weight, in scratch, a tile at a time, and multiplied at once. On the same
read the weight takes the update of the step before. Vectors and other small parameters are drawn in one launch before the forward.
"""

# P parts, n rows of one, D inputs, O outputs.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.following import WORTH_ON_CPU, FollowingEngine
from zotune.engines.parts import PartedReads, Parts
from zotune.engines.places import Places, tokens_in
from zotune.engines.stacks import NARROW, NARROW_BYTES, SMALL_BYTES, Stacks
from zotune.engines.waiting import Waiting, WaitingWriter

ALIGNED = 128  # rows of a tile: products of odd widths take slow kernels
TILE_BYTES = 16 << 20  # of a copy

# A product of few rows by a tile leaves processors idle, unless its blocks of outputs come in whole rounds of what a GPU does at
# once: two of them, or one where a copy for two is over MOST_BYTES. Scratch is two copies.
BLOCK, PROCESSORS, ROUNDS = 128, 132, 2
MOST_BYTES = 96 << 20

# A product adds a bias on its way out only where it is one half's, by a whole copy, since cuBLAS has no such end for batches of
# products nor for outputs with gaps. Else the bias is a pass over the outputs, 2·2n·O elements read and written. Two products in
# turn must each fill a GPU; that both copies are larger than a tile's costs nothing, since not even those stay in cache.
BIAS_IN_PRODUCT = True
FILLS_GPU = 1 << 22  # outputs of a product: two of 128 × 128 for each of 132 processors
WHOLE_BYTES = 64 << 20  # of a copy that is whole for its bias' sake


class DualEngine(FollowingEngine):
    """The losses at places of dense directions: each part of a forward has weights of its own, made a tile at a time.

    asked: updates given to its writer's `hold` are written on the next forward's read of each weight. Whoever else reads the
    weights calls `settle` first. An engine that nobody named leaves the weights current, and takes long batches by separate
    forwards on a CPU.
    """

    name = "dual"

    def __init__(self, directions: Directions, asked: bool = False, forward_tokens: int | None = None) -> None:
        super().__init__(directions, asked, forward_tokens)
        self.small = [p for p in directions.params if is_small(p)]
        self.waiting = Waiting(directions)
        self.writer: WaitingWriter = WaitingWriter(self.waiting, may=asked)
        self._stacks: dict[int, Stacks] = {}  # by the number of parts

    def _worth(self, batch: Mapping[str, Any]) -> bool:
        if self.asked or self.directions.params[0].device.type != "cpu":
            return True
        return tokens_in(batch) <= WORTH_ON_CPU

    def _step_aside(self, why: str) -> None:
        self.writer.may = False
        super()._step_aside(why)

    def _together(self, loss: Callable[[Any], Any], batch: Mapping[str, Any], places: Places) -> Tensor:
        found = super()._together(loss, batch, places)
        self.writer.ready()  # tables of which only rows were read
        return found

    def _reads(self, at: Displacement | HeldDisplacement, parts: Parts) -> PartedReads:
        if len(parts) not in self._stacks:
            self._stacks[len(parts)] = Stacks(self.directions, self.small, len(parts))
        stacks = self._stacks[len(parts)]
        self.waiting.take_small(stacks)
        stacks.draw(at, parts)
        return _DualReads(self, at, parts, stacks)


class _Run(NamedTuple):
    """Parts side by side that one read of a weight serves: one, or the two signs of one direction, + before −."""

    first: int
    last: int
    by: Displacement | HeldDisplacement  # the direction's term, with the sign of the first


class _DualReads(PartedReads):
    def __init__(self, engine: DualEngine, at: Displacement | HeldDisplacement, parts: Parts, stacks: Stacks) -> None:
        super().__init__(parts, engine.directions.params, stacks.of)
        self.engine, self.waiting = engine, engine.waiting
        self.runs = list(_runs(at, parts))
        self.by: list[Displacement | HeldDisplacement | None] = []  # of each part; None: θ itself
        for run in self.runs:
            sign = parts.sign_P[run.first]
            self.by += [run.by if sign else None] if run.last == run.first + 1 else [run.by, run.by.negated()]

    def copy(self, param: Any, part: int) -> Tensor:
        self.waiting.take(param)
        by = self.by[part]
        return param.data if by is None else self.engine.directions.displaced(param, by, torch.empty_like(param))

    def product(self, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
        (outputs, width), scratch, directions = weight.shape, self.engine.scratch, self.engine.directions
        flat = x.reshape(-1, width)
        spans = self.parts.slices(len(flat))
        out = x.new_empty(len(flat), outputs)
        rows, with_bias = plan(weight, max(s.stop - s.start for s in spans), bias is not None)
        copies = scratch.take(weight.data[:rows].expand(2, rows, width))
        if not weight.is_contiguous() or self.waiting.row(weight):
            self.waiting.take(weight)
        for first in range(0, outputs, rows):
            last = min(first + rows, outputs)
            tiles = copies.view(-1)[: 2 * (last - first) * width].view(2, last - first, width)
            update = self.waiting.of(weight)  # the first to read these rows writes it
            for run in self.runs:
                own = tiles
                if run.last - run.first == 2:
                    directions.displaced_both(weight, first, last, run.by, tiles[0], tiles[1], update)
                    if update is not None:
                        self.waiting.taken(weight, last)
                        update = None
                else:
                    if update is not None:  # a single part's draw takes none on its way
                        self.waiting.take(weight)
                        update = None
                    own = weight.data[None, first:last]
                    if self.by[run.first] is not None:
                        own = directions.displaced_span(weight, first, last, run.by, tiles[0])[None]
                if with_bias:
                    assert bias is not None
                    for part, tile in zip(range(run.first, run.last), own, strict=False):
                        add = bias if bias.dim() == 1 else bias[part]
                        torch.addmm(add, flat[spans[part]], tile.t(), out=out[spans[part]])
                    continue
                span = slice(spans[run.first].start, spans[run.last - 1].stop)
                count = run.last - run.first
                some, into = (t[span].view(count, -1, t.shape[1]) for t in (flat, out))
                torch.bmm(some, own[:count].transpose(1, 2), out=into[:, :, first:last])
        scratch.give(copies)
        out = out.view(*x.shape[:-1], outputs)
        return out if bias is None or with_bias else self.plus_bias(out, bias)

    def rows(self, ids: Tensor, weight: Any) -> Any:
        """Where the weight lacks an update, these rows have it and the weight waits: a head may read it whole."""
        if self.waiting.row(weight):
            self.waiting.take(weight)
        update, directions = self.waiting.of(weight), self.engine.directions
        out = torch.empty((*ids.shape, *weight.shape[1:]), dtype=weight.dtype, device=weight.device)
        for by, span in zip(self.by, self.parts.slices(len(ids)), strict=True):
            some, into = ids[span].reshape(-1), out[span]
            if by is None:
                self.waiting.take(weight)
                update = None
                into.copy_(weight.data[some].view(into.shape))
            else:
                directions.displaced_rows(weight, some.long(), by, into.view(len(some), *weight.shape[1:]), update)
        return out


def _runs(at: Displacement | HeldDisplacement, parts: Parts) -> Iterator[_Run]:
    alike = list(zip(parts.rows_P, parts.direction_P, parts.sign_P, strict=True))
    part = 0
    while part < len(alike):
        rows, direction, sign = alike[part]
        own = at.some(direction, direction + 1)
        both = sign > 0 and alike[part + 1 : part + 2] == [(rows, direction, -1)]
        yield _Run(part, part + 1 + both, own if sign >= 0 else own.negated())
        part += 1 + both


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
