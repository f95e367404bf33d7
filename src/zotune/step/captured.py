"""The steps of an optimizer that are taken as CUDA graphs, and those of them that the device is still at."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zotune.directions import Displacement
from zotune.record.steps import StepRecord
from zotune.step.choosing import spread
from zotune.step.graphs import Flight, Shape, StepGraphs
from zotune.step.turning import numbers_of
from zotune.updates import Linear
from zotune.updates.rule import passes_for, steps_of, table

if TYPE_CHECKING:
    from zotune.step.optimizer import ZeroOrderOptimizer


class CapturedSteps:
    """wanted: set it to False, and every step is taken by the host. graphs: those of the present settings, once there are any."""

    def __init__(self) -> None:
        self.wanted = True
        self.graphs: StepGraphs | None = None
        self._flying: deque[Flight] = deque()

    def step(
        self, of: ZeroOrderOptimizer, loss_of: Any, batches: Sequence[Any], shared: tuple[int, ...]
    ) -> Tensor | None:
        """The loss near θ where the step can be taken as a CUDA graph, else None. The device may still be at it, and at the
        step before: what the host has to do meets with what the device does.
        """
        groups, rule, more = of.param_groups, of.method.rule, of.enhancements
        if (
            not self.wanted
            or of.sharing.workers is not None  # the host meets the others between losses and update
            or of.shards  # and other processes within a forward
            or spread(of.engine.directions)
            or not rule.capturable
            or getattr(rule, "anchor", False)
            or of.method.first_order
            or (of.rate is not None and of.rate.unseen)  # a step that goes by what it found itself
            or more.blocks is not None
            or more.hybrid is not None
        ):
            return None
        if not all(_on_cuda(p) for g in groups for p in g["params"]) or not all(
            isinstance(b, Mapping) and b and all(map(_on_cuda, b.values())) for b in batches
        ):
            return None
        lr_G, decay_G, eps_G = of.settings()
        if rule.counts:
            self.land(of)  # how many steps were applied decides what Adam does next
        steps_G = steps_of(of.engine.directions, of.state) if rule.counts else [0] * len(groups)
        by_pass = of.method.subspace is None and (not rule.linear or any(decay_G))
        if steps_G is None or (by_pass and passes_for(of.engine.directions) is None):
            return None
        if self.graphs is None or self.graphs.eps_G != eps_G:
            applies = of.fold_every == 1
            self.graphs = StepGraphs(of.engine, of.method, eps_G, of.room(), more.g_clip, of.state, applies)
        seeds_Q = of.seeds(of.steps, 0)
        empty = StepRecord(of.steps, seeds_Q, (), (), lr_G, decay_G, shares=shared)
        shape = Shape(shared, of.pairs, any(decay_G), of.at_once(len(seeds_Q)), of.sharing.micro_batch)
        numbers = numbers_of if of.method.subspace is not None else rule.numbers_of
        flight = self.graphs.step(loss_of, batches, empty, table(numbers(lr_G, decay_G, steps_G)), shape)
        if flight is None:
            return None
        self._flying.append(flight)
        of.advance(len(batches))
        self.land(of, but=1)
        of.fold_at(empty.step)
        return flight.loss

    def land(self, of: ZeroOrderOptimizer, but: int = 0) -> None:
        """Wait for all steps that the device has been given, but so many, and see what they found."""
        while len(self._flying) > but:
            record, rule = self._flying.popleft().landed(), of.method.rule
            if not record.skipped and of.fold_every == 1:
                rule.count(of.engine.directions.params, of.state)
            elif not record.skipped:
                assert isinstance(rule, Linear)
                of.pending.append(rule.displacement(record))
            of.took(record)

    def fold(self, by: Displacement, at_once: int) -> bool:
        """Apply updates that waited as a graph; False where that has to be done without one."""
        return self.graphs is not None and self.graphs.fold(by, at_once)

    def forget(self) -> None:
        """Make the graphs anew: they hold tensors that are gone."""
        self.graphs = None

    def drop(self) -> None:
        """Wait for the steps under way, whose findings nobody wants any more."""
        while self._flying:
            self._flying.popleft().landed()


def _on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda
