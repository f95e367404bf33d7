"""Updates of weights that stream: what stays on the device takes them at once, each block when it next arrives there.

So a step crosses the bus once: a block comes for the next step's places, takes the update of the step before, and goes back behind
the next block's places. An update of no step (a fold that has not come yet) writes nothing back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.dual import DualEngine, is_small
from zotune.engines.factors import Factored, Factors, sides
from zotune.engines.folding import FoldingWriter
from zotune.engines.lowrank import LowRankEngine
from zotune.engines.sequential import SequentialEngine
from zotune.engines.writing import Writer
from zotune.streaming import Block, Plan, StreamedWeights, plan, streamed

SERVED: tuple[type, ...] = (SequentialEngine, DualEngine, LowRankEngine)


def plan_of(model: nn.Module) -> Plan:
    """What of a model streams: matrices of its blocks that no engine draws for a whole forward at once, and packed ones."""
    return plan(model, lambda param: param.dim() < 2 or (param.is_floating_point() and is_small(param)))


class _Room:
    """Memory for the factors of one block's update, which all blocks use in turn."""

    def __init__(self) -> None:
        self.all: list[Factored] = []
        self._held: dict[tuple[int, torch.dtype], Tensor] = {}

    def add(self, directions: Directions, rank: int) -> Factored:
        self.all.append(_FactoredInTurn(self, directions, rank))
        return self.all[-1]

    def of(self, count: int, like: nn.Parameter) -> Tensor:
        key = (count, like.dtype)
        if key not in self._held:
            most = max(sum(sum(sides(p)) for p in one.params) * one.rank for one in self.all)
            self._held[key] = like.data.new_empty(count * most)
        return self._held[key]


class _FactoredInTurn(Factored):
    """One block's factors, in memory that others write into between two of its draws."""

    def __init__(self, room: _Room, directions: Directions, rank: int) -> None:
        super().__init__(directions, rank)
        self.room = room

    def drawn(self, at: Displacement | HeldDisplacement) -> Factors:
        count = len(at.seeds_Q)
        if count not in self._drawn:
            alike = len({p.dtype for p in self.params}) == 1
            self._drawn[count] = self.made(count, None, self.room.of(count, self.params[0]) if alike else None)
        self._drawn[count].draw(at, again=True)
        return self._drawn[count]

    def has_room_for(self, count: int) -> bool:
        return True


class StreamedWriter(Writer):
    """An engine's writer, block by block: the same numbers, since every parameter's update is a function of its own name."""

    def __init__(self, engine: Any, weights: StreamedWeights) -> None:
        super().__init__(engine.directions)
        self.weights = weights
        of, slots = engine.directions, engine.directions.slots
        rank = engine.factored.rank if isinstance(engine, LowRankEngine) else 0

        def some(params: Sequence[nn.Parameter]) -> Directions:
            groups: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(of.groups)]
            for param in params:
                groups[slots[id(param)].group].append((slots[id(param)].name, param))
            return Directions(groups, of.distribution)

        stay = some([p for p in of.params if not hasattr(p, "streamed")])
        self.rest = FoldingWriter(Factored(stay, rank)) if rank else Writer(stay)
        room = _Room()
        self.of_block: list[tuple[Block, Writer]] = []
        for block in weights.blocks:
            if own := [p for p in block.params if id(p) in slots]:
                writer = FoldingWriter(room.add(some(own), rank)) if rank else Writer(some(own))
                self.of_block.append((block, writer))

    def apply(self, by: Displacement | HeldDisplacement, at_once: int = 1) -> None:
        if all(by.is_zero(group) for group in range(self.directions.groups)):
            return
        self._leave(lambda writer: writer.apply(by, at_once))

    def apply_each(self, moves: Sequence[Displacement], at_once: int = 1) -> None:
        self._leave(lambda writer: writer.apply_each(moves, at_once))

    def apply_compensated(
        self,
        by: Displacement | HeldDisplacement,
        residuals: Sequence[Tensor],
        factors: Sequence[float | Tensor] = (),
        at_once: int = 1,
    ) -> None:
        raise ValueError("rounding='compensated': keeps a number beside each weight, which does not stream")

    def _leave(self, write: Callable[[Writer], None]) -> None:
        write(self.rest)
        for block, writer in self.of_block:
            block.waiting.append(partial(write, writer))

    def settle(self) -> None:
        if any(block.waiting for block, _ in self.of_block):
            self.weights.settle()

    def ready(self) -> None:
        """Nothing: a block has all updates when its forward begins."""

    def drop(self) -> None:
        for block, _ in self.of_block:
            block.waiting.clear()


def follow(engine: Any) -> StreamedWeights | None:
    """Let an engine's updates reach weights that stream, where any of its own do: those weights, else None."""
    weights = streamed(engine.directions.params)
    if weights is not None and any(hasattr(p, "streamed") for p in engine.directions.params):
        engine.writer = StreamedWriter(engine, weights)
        if isinstance(engine, LowRankEngine):
            factored = {id(p) for p in engine.factored.params}
            engine.factored.blocks = {
                id(p): i for i, block in enumerate(weights.blocks) for p in block.params if id(p) in factored
            }
    return weights


def serves(engine: Any) -> bool:
    return type(engine) in SERVED
