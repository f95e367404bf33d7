"""An update that is written when the weights are next read.

θ ← θ + Σ c·z takes a pass over the weights of its own. The next probe reads them anyway, so an engine may hold the update back
until then. Each parameter is known by the first of its rows that lacks the update: a forward that raises half-way loses nothing and
doubles nothing, and what is not read takes its update by `settle`.
"""

from __future__ import annotations

from typing import Any

import torch

from zotune.directions import Directions, Displacement, HeldDisplacement
from zotune.engines.stacks import Stacks
from zotune.engines.writing import Writer


class Waiting:
    """The update of one step, of Q directions, and which rows of which parameters lack it."""

    def __init__(self, directions: Directions) -> None:
        self.directions = directions
        self.by: Displacement | HeldDisplacement = Displacement()
        self._lacking: dict[int, int] = {}  # id of a parameter → its first row without the update
        self._places: HeldDisplacement | None = None  # on the device, where every captured step leaves its update

    def hold(self, by: Displacement | HeldDisplacement) -> None:
        """All parameters lack this update from now on. Numbers that are on the device are copied to their place there."""
        assert not self._lacking
        if isinstance(by, HeldDisplacement):
            assert self._places is not None
            self._places.seeds_Q.copy_(by.seeds_Q)
            for mine, coefs_Q in zip(self._places.coefs_GQ, by.coefs_GQ, strict=True):
                mine.copy_(coefs_Q)
            by = self._places
        self.by = by
        self._lacking = {id(p): 0 for p in self.directions.params if not by.is_zero(self.directions.slots[id(p)].group)}

    def arm(self, count: int) -> None:
        """Before a captured step, which takes `count` pairs from their places for all parameters: what waits, or zeros."""
        if self._places is None or len(self._places.seeds_Q) != count:
            self.settle()
            device = self.directions.params[0].device
            seeds_Q = torch.zeros(count, dtype=torch.int64, device=device)
            coefs_GQ = [torch.zeros(count, device=device) for _ in range(self.directions.groups)]
            self._places = HeldDisplacement(seeds_Q, coefs_GQ)
        if self.by is self._places and self.whole:
            return
        if self.whole and len(self.by.seeds_Q) == count:
            held, self._lacking = self.by, {}
            pairs = [held.on(group, self._places.seeds_Q.device) for group in range(self.directions.groups)]
            self.hold(HeldDisplacement(pairs[0][0], [coefs_Q for _, coefs_Q in pairs]))
            return
        self.settle()
        for coefs_Q in self._places.coefs_GQ:
            coefs_Q.zero_()
        self.hold(self._places)

    def drop(self) -> None:
        """Nothing waits any more."""
        self._lacking = {}

    @property
    def whole(self) -> bool:
        """Whether no parameter has taken any of the update."""
        return len(self._lacking) == len(self.directions.params) and not any(self._lacking.values())

    def of(self, param: Any) -> Displacement | HeldDisplacement | None:
        """The update that the parameter lacks, as a whole or in part."""
        return self.by if id(param) in self._lacking else None

    def row(self, param: Any) -> int:
        """How many of its rows have the update while others lack it: not 0 only after a forward that raised."""
        return self._lacking.get(id(param), 0)

    def taken(self, param: Any, rows: int) -> None:
        """The first `rows` rows have the update."""
        if rows < param.shape[0]:
            self._lacking[id(param)] = rows
        else:
            del self._lacking[id(param)]

    def take(self, param: Any) -> None:
        """The parameter's update now, where it lacks one, by a pass of its own."""
        first = self._lacking.get(id(param))
        if first is None:
            return
        if first == 0:
            self.directions.displaced(param, self.by, param.data)
        else:
            self.directions.displaced_span(param, first, param.shape[0], self.by, param.data[first:])
        del self._lacking[id(param)]

    def take_small(self, stacks: Stacks) -> None:
        """The parameters that are drawn as stacks, in one launch."""
        lacking = [p for p in stacks.params if id(p) in self._lacking]
        if len(lacking) == len(stacks.params):
            stacks.move(self.by)
            for param in lacking:
                del self._lacking[id(param)]
            return
        for param in lacking:
            self.take(param)

    def settle(self) -> None:
        """The update of every parameter that lacks it."""
        if self.whole:
            self.directions.apply(self.by)
            self._lacking = {}
            return
        for param in self.directions.params:
            self.take(param)


class WaitingWriter(Writer):
    """Leaves an update to the next forward, while it may, and writes it before anything else is written."""

    def __init__(self, waiting: Waiting, may: bool) -> None:
        super().__init__(waiting.directions)
        self.waiting, self.may = waiting, may

    @property
    def holds(self) -> bool:
        return self.may

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
