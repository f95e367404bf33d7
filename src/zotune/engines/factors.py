"""The factors of low-rank directions: z = U·Vᵀ/√r of every matrix, and a dense z of what has none.

The factors of a parameter NAME of shape (O, …) with D elements a row are noise of the parameters `NAME.U` (O·r elements) and
`NAME.V` (D·r), rounded to the weights' dtype.
"""

# Q directions, R rank, O and D the two sides of a parameter.

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zotune import noise
from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.following import capturing


class Factored:
    """Which parameters have factors, and those that were last drawn for so many directions.

    rank: r. Vectors, and whatever has a side no longer than r, take a dense z of the directions' distribution.
    params: these alone have factors, and the others nothing; the list may still grow.
    """

    def __init__(self, directions: Directions, rank: int, params: list[torch.nn.Parameter] | None = None) -> None:
        self.directions, self.rank = directions, rank
        large = [p for p in directions.params if p.dim() > 1 and rank < min(self.whole_sides(p))]
        self.params = large if params is None else params
        chosen = {id(p) for p in self.params}
        self.dense = [p for p in directions.params if id(p) not in chosen] if params is None else []
        names = {directions.slots[id(p)].name for p in directions.params}
        matrices = [p for p in directions.params if p.dim() > 1]
        matrices = matrices if params is None else [*directions.params]
        own = [f"{directions.slots[id(p)].name}.{side}" for p in matrices for side in "UV"]
        self._ids = noise.parameter_ids([*names, *own])
        self.distribution = directions.distribution
        self.blocks: dict[int, int] = {}  # which block a parameter that streams is of; others are in none
        self._drawn: dict[int, Factors] = {}  # by the number of directions
        self._alone: dict[int, list[Factors]] = {}

    def drawn(self, at: Displacement | HeldDisplacement) -> Factors:
        """The factors of all parameters for these directions, in buffers that the next as many will have."""
        count = len(at.seeds_Q)
        if count not in self._drawn:
            self._drawn[count] = FactorsByBlock(self, count) if self.blocks else self.made(count)
        self._drawn[count].draw(at)
        return self._drawn[count]

    def one_by_one(self, count: int) -> list[Factors]:
        """Of so many directions, one a factored parameter, in memory that all share: each is drawn when its turn comes."""
        if count not in self._alone:
            largest = max((sum(side for side, _ in self.sides_of(p)) for p in self.params), default=0)
            room = {p.dtype: p.data.new_empty(count * largest * self.rank) for p in self.params}
            self._alone[count] = [self.made(count, [p], room[p.dtype]) for p in self.params]
        return self._alone[count]

    def in_turn(self, by: Displacement | HeldDisplacement) -> Iterator[tuple[torch.nn.Parameter, Factors]]:
        """Each parameter that the displacement moves, and its factors: of one parameter at a time where that is more than a
        forward's, so that no more buffers are made."""
        count = len(by.seeds_Q)
        held = self.drawn(by) if self.has_room_for(count) else None
        alone = self.one_by_one(count) if held is None else []
        for i, param in enumerate(self.params):
            if by.is_zero(self.directions.slots[id(param)].group):
                continue
            if held is None:
                alone[i].draw(by, again=True)
            yield param, alone[i] if held is None else held

    def made(self, count: int, params: list[torch.nn.Parameter] | None = None, memory: Tensor | None = None) -> Factors:
        """Factors of these parameters, of all where none are named."""
        return Factors(self, count, params, memory)

    def has_room_for(self, count: int) -> bool:
        """Whether there are buffers for so many directions, or none at all yet."""
        return count in self._drawn or not self._drawn

    def forget(self) -> None:
        """A graph has drawn into the buffers: what they hold is not what the host drew."""
        for factors in self._drawn.values():
            factors.forget()

    def sides_of(self, param: torch.nn.Parameter) -> tuple[tuple[int, int], ...]:
        """Length and noise id of each factor that is drawn."""
        return tuple(zip(self.whole_sides(param), self.ids_of(param), strict=True))

    def whole_sides(self, param: torch.nn.Parameter) -> tuple[int, int]:
        """Of the parameter, of which `param` may be a part."""
        shape = self.directions.whole_shape(param)
        return shape[0], math.prod(shape[1:])

    def ids_of(self, param: torch.nn.Parameter) -> tuple[int, int]:
        name = self.directions.slots[id(param)].name
        return self._ids[f"{name}.U"], self._ids[f"{name}.V"]


class Factors:
    """What is drawn of every factored parameter, U (Q, O, R) and V (Q, D, R), for Q directions, in buffers that are used again.

    Where this process holds a block of a parameter, `of` has the factors of that block, and `whole` those of all of it.
    """

    def __init__(
        self,
        of: Factored,
        count: int,
        params: list[torch.nn.Parameter] | None = None,
        memory: Tensor | None = None,
    ) -> None:
        """params: of these alone; in the memory given, which others may use between a draw and the next."""
        self.of: Any = {}  # id of a parameter → its factors
        self.whole: dict[int, tuple[Tensor, ...]] = {}
        self._blocks: list[tuple[Tensor, Tensor]] = []  # rows of a whole factor, and their place in the block's
        items, first = [], 0
        self._device = of.directions.params[0].device
        for param in of.params if params is None else params:
            pair = []
            for side, pid in of.sides_of(param):
                size = count * side * of.rank
                out = param.data.new_empty(size) if memory is None else memory[first : first + size]
                first += size
                items.append(noise.Item(out.view(count, -1), None, pid))
                pair.append(out.view(count, side, of.rank))
            self.of[id(param)] = self.whole[id(param)] = tuple(pair)
            if (block := of.directions.held_sides(param)) is not None:
                rows = [whole[:, side] for whole, side in zip(pair, block, strict=True)]
                self.of[id(param)] = tuple(
                    torch.empty_like(some, memory_format=torch.contiguous_format) for some in rows
                )
                self._blocks += zip(rows, self.of[id(param)], strict=True)
        self._many = noise.Many(items, of.distribution)
        self._held: Any = None
        self._in_graph: tuple[int, int] | None = None

    def draw(self, at: Displacement | HeldDisplacement, again: bool = False) -> None:
        """Nothing where the last draw was of the same seeds, unless again: the update wants what the probes had."""
        if isinstance(at, Displacement) and self._held == at.seeds_Q and not capturing() and not again:
            return
        seeds_Q, _ = at.on(0, self._device)
        # A graph's seeds lie in memory of its own, so what lies there is the same at both places of one graph. It is captured
        # behind a run of the same without, which leaves nothing here: each graph draws once.
        where = (seeds_Q.data_ptr(), len(seeds_Q)) if capturing() else None
        if where is not None and where == self._in_graph and not again:
            return
        ones = torch.ones(1, len(seeds_Q), 1, device=self._device)
        self._many.draw(seeds_Q[:, None].contiguous(), ones)
        for some, own in self._blocks:
            own.copy_(some)
        self._held, self._in_graph = at.seeds_Q if isinstance(at, Displacement) else None, where

    def forget(self) -> None:
        """What is in the buffers is no longer what was last drawn."""
        self._held = None


class FactorsByBlock(Factors):
    """The same of weights that stream: the factors of one block at a time, drawn when one of its weights is first read."""

    def __init__(self, factored: Factored, count: int) -> None:
        self._block_of = factored.blocks
        params: dict[int, list[torch.nn.Parameter]] = {}
        for param in factored.params:
            params.setdefault(self._block_of.get(id(param), -1), []).append(param)
        self._rest = Factors(factored, count, params.pop(-1, []))

        def size(some: list[torch.nn.Parameter]) -> int:
            return count * factored.rank * sum(sum(sides(p)) * p.element_size() for p in some)

        one = next(iter(params.values()))[0]
        room = torch.empty(max(map(size, params.values())), dtype=torch.uint8, device=one.device)
        self._of_blocks: dict[int, Factors] = {}
        for block, some in params.items():
            alike = len({p.dtype for p in some}) == 1
            memory = room[: size(some)].view(some[0].dtype) if alike else None
            self._of_blocks[block] = Factors(factored, count, some, memory)
        self._at: Displacement | HeldDisplacement = Displacement()
        self._now = -1  # the block whose factors are in the room
        self.of, self.whole = self, {}

    def draw(self, at: Displacement | HeldDisplacement, again: bool = False) -> None:
        self._rest.draw(at, again)
        self._at, self._now = at, -1

    def forget(self) -> None:
        self._rest.forget()
        self._now = -1

    def __contains__(self, key: int) -> bool:
        return key in self._rest.of or key in self._block_of

    def __getitem__(self, key: int) -> tuple[Tensor, ...]:
        block = self._block_of.get(key, -1)
        if block < 0:
            return self._rest.of[key]
        if self._now != block:
            with torch._C.DisableTorchFunction():
                self._of_blocks[block].draw(self._at, again=True)
            self._now = block
        return self._of_blocks[block].of[key]


def sides(param: Tensor) -> tuple[int, int]:
    return param.shape[0], param.numel() // max(1, param.shape[0])
