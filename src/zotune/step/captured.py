"""The steps of an optimizer that are taken as CUDA graphs, and those of them that the device is still at."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zotune.directions import Displacement
from zotune.record.steps import StepRecord
from zotune.step.choosing import spread
from zotune.step.descent import DescentGraphs, captured_by
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
        self.graphs: StepGraphs | DescentGraphs | None = None
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
            or (of.rate is not None and of.rate.unseen)  # a step that goes by what it found itself
            or more.blocks is not None
            or more.hybrid is not None
        ):
            return None
        if not all(_on_cuda(p) for g in groups for p in g["params"]) or not all(
            isinstance(b, Mapping) and b and all(map(_on_cuda, b.values())) for b in batches
        ):
            return None
        if rule.counts:
            self.land(of)  # how many steps were applied decides what Adam does next
        descends = of.method.first_order
        flight = self._descend(of, loss_of, batches) if descends else self._probe(of, loss_of, batches, shared)
        if flight is None:
            return None
        self._flying.append(flight)
        step = of.steps
        of.advance(len(batches))
        self.land(of, but=1)
        of.fold_at(step)
        return flight.loss

    def _probe(
        self, of: ZeroOrderOptimizer, loss_of: Any, batches: Sequence[Any], shared: tuple[int, ...]
    ) -> Flight | None:
        rule = of.method.rule
        lr_G, decay_G, eps_G = of.settings()
        steps_G = steps_of(of.engine.directions, of.state) if rule.counts else [0] * len(lr_G)
        by_pass = of.method.subspace is None and (not rule.linear or any(decay_G))
        if steps_G is None or (by_pass and passes_for(of.engine.directions) is None):
            return None
        graphs = self.graphs
        if not isinstance(graphs, StepGraphs) or graphs.eps_G != eps_G:
            most, applies = of.enhancements.g_clip, of.fold_every == 1
            self.graphs = graphs = StepGraphs(of.engine, of.method, eps_G, of.room(), most, of.state, applies)
        seeds_Q = of.seeds(of.steps, 0)
        empty = StepRecord(of.steps, seeds_Q, (), (), lr_G, decay_G, shares=shared)
        shape = Shape(shared, of.pairs, any(decay_G), of.at_once(len(seeds_Q)), of.sharing.micro_batch)
        numbers = numbers_of if of.method.subspace is not None else rule.numbers_of
        return graphs.step(loss_of, batches, empty, table(numbers(lr_G, decay_G, steps_G)), shape)

    def _descend(self, of: ZeroOrderOptimizer, loss_of: Any, batches: Sequence[Any]) -> Flight | None:
        params_G = [group["params"] for group in of.param_groups]
        if not captured_by(of.method.rule, {p.device for params in params_G for p in params}):
            return None
        graphs = self.graphs
        if not isinstance(graphs, DescentGraphs):
            self.graphs = graphs = DescentGraphs(of.method.rule, params_G, of.state)
        lr_G, decay_G, _ = of.settings()
        return graphs.step(loss_of, batches, StepRecord(of.steps, (), (), (), lr_G, decay_G))

    def land(self, of: ZeroOrderOptimizer, but: int = 0) -> None:
        """Wait for all steps that the device has been given, but so many, and see what they found."""
        while len(self._flying) > but:
            flight, rule = self._flying.popleft(), of.method.rule
            record = flight.landed()
            if not record.skipped and of.fold_every == 1:
                rule.count(flight.counted, of.state)
            elif not record.skipped:
                assert isinstance(rule, Linear)
                of.pending.append(rule.displacement(record))
            of.took(record)

    def fold(self, by: Displacement, at_once: int) -> bool:
        """Apply updates that waited as a graph; False where that has to be done without one."""
        return isinstance(self.graphs, StepGraphs) and self.graphs.fold(by, at_once)

    def forget(self) -> None:
        """Make the graphs anew: they hold tensors that are gone."""
        self.graphs = None

    def drop(self) -> None:
        """Wait for the steps under way, whose findings nobody wants any more."""
        while self._flying:
            self._flying.popleft().landed()


def _on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda
