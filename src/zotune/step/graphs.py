"""A whole step as one CUDA graph: probes, estimate, update, without the host in between.

A graph is captured for each shape of batch and replayed with new numbers in the same places: the batch, the step's seeds, the
learning rates and what a rule makes of them. It holds all forwards of the step, however many its places are cut into. What a step
computes is what the host would: the same functions, by the same kernels. Whether it is skipped, and a conservative step's choice,
are decided on the device.
"""

# C copies of a batch, K directions over its rows, Q directions of a step, G parameter groups, N numbers of a rule.

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.directions import Displacement, HeldDisplacement, signed
from zotune.engines import Engine
from zotune.engines.causal import as_without_capture
from zotune.engines.scratch import Scratch
from zotune.engines.writing import Through
from zotune.methods import Method
from zotune.record.steps import StepRecord
from zotune.step.arithmetic import Given, applicable, coefficients, near, weights_of
from zotune.step.pieces import Sharing
from zotune.step.probing import best_of_three, look
from zotune.updates import Conservative, Linear
from zotune.updates.rule import DECAY, NUMBERS, passes_for

logger = logging.getLogger(__name__)

MOST_GRAPHS = 24  # shapes of batch; further ones run without
_ONE_AT_A_TIME = threading.RLock()  # captures: runs may share a process, each on a thread and a stream of its own


class Flight:
    """A captured step that the device has been given: its numbers come to the host when it has taken it.

    found: losses, projected gradients, whether it was applied, and a choice, in a row. record: all of the step but these.
    loss: the loss near θ, a 0-d float32 tensor on the device. counted: the parameters whose updates the step's rule counts.
    """

    def __init__(
        self, found: Tensor, record: StepRecord, places: int, loss: Tensor, counted: Sequence[Any] = ()
    ) -> None:
        self.loss, self._record, self._places, self.counted = loss, record, places, counted
        self._numbers = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
        self._numbers.copy_(found, non_blocking=True)
        self._done = torch.cuda.Event() if found.is_cuda else None
        if self._done is not None:
            self._done.record()

    def landed(self) -> StepRecord:
        """What the step was. Waits for it, not for what the device was given after it."""
        if self._done is not None:
            self._done.synchronize()
        *numbers, goes, choice = self._numbers.tolist()
        losses_P, g = tuple(numbers[: self._places]), numbers[self._places :]
        each = len(g) // len(self._record.lr_G)
        g_GQ = tuple(tuple(g[first : first + each]) for first in range(0, len(g), each))
        return replace(self._record, losses_P=losses_P, g_GQ=g_GQ, skipped=not goes, choice=int(choice))


class Graphs:
    """Captured steps of one optimizer, by what they are of: made when first wanted, until one cannot be.

    Of each `run` is what the graph holds, plain functions of tensors that stay where they are, and which must change nothing that
    lasts before it is armed.
    """

    def __init__(self) -> None:
        self.usable = True
        self._graphs: dict[Any, Any] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        """How many there are."""
        return len(self._graphs)

    def of(self, key: Any, make: Callable[[], Any], capture: Callable[[Any], bool], most: int | None = None) -> Any:
        """What is captured under the key; made now where there is none; None where it cannot be, or there are `most` already."""
        if not self.usable:
            return None
        if (held := self._graphs.get(key)) is not None or (most is not None and len(self._graphs) >= most):
            return held
        held = make()
        if not capture(held):
            return None
        self._graphs[key] = held
        return held

    def _captured(self, held: Any, device: torch.device) -> bool:
        """Run once and captured; False where it cannot be, which is said, and no further graph is made."""
        with _ONE_AT_A_TIME, as_without_capture():
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                draws = torch.cuda.get_rng_state(device)
                self._first(held, device)
                if not torch.equal(draws, torch.cuda.get_rng_state(device)):
                    torch.cuda.set_rng_state(draws, device)
                    raise RuntimeError("the loss draws from torch's generator (dropout?)")
                torch.cuda.synchronize(device)
                held.graph = capture(held.run, self._pool)
            except Exception as error:  # anything a model does may be what a graph cannot hold
                self.usable = False
                first = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning("steps are not captured as CUDA graphs (%s); they run one kernel at a time", first)
                return False
        return True

    def _first(self, held: Any, device: torch.device) -> None:
        """Every kernel once; nothing is armed yet, so that no weight changes. On the stream at hand: there is no backward pass to
        keep apart, and cuBLAS keeps a workspace of 32 MiB for each stream that it ever ran on.
        """
        held.run()


def key_of(loss: Any, batches: Sequence[Mapping[str, Tensor]]) -> tuple[Any, ...]:
    """By which a graph is found again: the loss, and the shapes of its batches."""
    return (loss, *(tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(b.items())) for b in batches))


def fill(held: Sequence[Mapping[str, Tensor]], batches: Sequence[Mapping[str, Tensor]]) -> None:
    """A graph's own batches with the values of others."""
    for mine, batch in zip(held, batches, strict=True):
        for name, tensor in batch.items():
            mine[name].copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class Shape:
    """What a graph is of, besides its batches' shapes.

    shares: rows of each direction. pairs: directions of a full batch. decays: whether any group has weight decay. at_once: how many
    low-rank directions of the update are summed before they are rounded. micro_batch: rows that are evaluated together; None: all.
    """

    shares: tuple[int, ...]
    pairs: int
    decays: bool
    at_once: int
    micro_batch: int | None = None


class StepGraphs(Graphs):
    """The captured steps of one optimizer.

    room: coefficients at or over it are not applied (see `ZeroOrderOptimizer`). most: bound on |g|. Where the engine's writer holds
    updates back, a step begins by those of the one before, whichever graph that was: all read the same places on the device.
    state: the optimizer's; graphs hold its tensors. applies: whether a step ends with its update, or updates wait for `fold`.
    """

    def __init__(
        self,
        engine: Engine,
        method: Method,
        eps_G: Sequence[float],
        room: float,
        most: float | None,
        state: Any,
        applies: bool = True,
    ) -> None:
        super().__init__()
        self.engine, self.method, self.rule, self.eps_G, self.room = engine, method, method.rule, tuple(eps_G), room
        self.most, self.state, self.applies = most, state, applies
        self._updates: dict[str, Any] = {}
        # One for all: graphs run one after the other, and none reads what another has left.
        self._scratch = Scratch(keeps=True)

    def step(
        self,
        loss: Callable[[Any], Tensor],
        batches: Sequence[Mapping[str, Tensor]],
        record: StepRecord,
        numbers_GN: Tensor,
        shape: Shape,
    ) -> Flight | None:
        """A step that the device takes (but for its update, where those wait), or None where it has to be taken without a
        graph. record: seeds and rates; what it finds is filled in. numbers_GN: as `Rule.table` has them. loss: batch → the loss, a
        function of the batch's tensors and the model's weights that needs no host; a graph is found again by it.
        """
        key = (shape, *key_of(loss, batches))
        captured = self.of(key, lambda: _Captured(self, loss, batches, shape), self._capture, MOST_GRAPHS)
        if captured is None:
            return None
        if captured.holds:
            self.engine.writer.arm(len(record.seeds_Q))
        else:
            self.engine.writer.settle()
        captured.load(batches, record, numbers_GN)
        captured.graph.replay()
        self.engine.replayed()
        counted = () if self.rule.linear else self.engine.directions.params
        return Flight(captured.found, record, captured.places, captured.loss_near.clone(), counted)

    def update(self, kernel: str) -> Any:
        """The rule's pass over the weights, or that of decay: made once, since graphs hold where it finds things."""
        if kernel not in self._updates:
            directions, names = self.engine.directions, () if kernel == DECAY else self.rule.kept_names
            self._updates[kernel] = passes_for(directions).Update(kernel, directions, self.state, names)
        return self._updates[kernel]

    def apply(
        self, by: Displacement | HeldDisplacement, at_once: int, factors: Sequence[Tensor] = (), hold: bool = False
    ) -> None:
        """Through the engine, which may have a way of its own; rounded as the rule rounds. factors: if that is compensated.

        hold: it may wait for the next read of the weights.
        """
        assert isinstance(self.rule, Linear)
        self.rule.displace(Through(self.engine.writer, at_once, hold), by, self.state, factors)

    def fold(self, by: Displacement, at_once: int) -> bool:
        """Updates that waited, applied together; False where they have to be without a graph."""
        key = ("fold", len(by.seeds_Q), at_once)
        held = self.of(key, lambda: _CapturedFold(self, by, at_once), lambda made: self._captured(made, made.device))
        if held is None:
            return False
        held.load(by)
        held.graph.replay()
        self.engine.replayed()
        return True

    def _capture(self, captured: _Captured) -> bool:
        writer = self.engine.writer
        writer.settle()  # what a first use applies is zeros
        if captured.holds:
            writer.arm(len(captured.seeds_Q))
        done = self._captured(captured, captured.device)
        if not done:
            writer.drop()  # zeros
        captured.holds = captured.holds and writer.holds
        return done

    def _captured(self, held: Any, device: torch.device) -> bool:
        forwards = self.engine.forwards
        try:
            with self.own_scratch():
                return super()._captured(held, device)
        finally:
            self.engine.forwards = forwards

    @contextmanager
    def own_scratch(self) -> Iterator[None]:
        """The engine takes from the graphs' scratch, of which nothing is ever freed."""
        outer, self.engine.scratch = self.engine.scratch, self._scratch
        try:
            yield
        finally:
            self.engine.scratch = outer


def capture(run: Callable[[], Any], pool: Any = None) -> Any:
    """A CUDA graph of what `run` does, whose kernels have all run before. Raises what a model does that a graph cannot hold."""
    graph = torch.cuda.CUDAGraph()
    with (
        _ONE_AT_A_TIME,
        _uncollected(),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        run()
    return graph


@contextmanager
def _uncollected() -> Iterator[None]:
    """A graph of an optimizer that is gone may wait for Python's collector, and to free it ends whatever capture is under way."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Captured:
    """A step on batches of certain shapes: `run` is what the graph holds, plain functions of the tensors that `load` fills."""

    def __init__(
        self, graphs: StepGraphs, loss: Callable[[Any], Tensor], batches: Sequence[Mapping[str, Tensor]], shape: Shape
    ) -> None:
        self.graphs, self.loss, self.shape = graphs, loss, shape
        self.graph: Any = None
        self.sharing = Sharing(shape.micro_batch)
        self.batches = [{name: t.clone() for name, t in batch.items()} for batch in batches]
        self.device = device = next(iter(self.batches[0].values())).device
        groups, method = len(graphs.eps_G), graphs.method
        queries = method.queries * shape.pairs
        self.seeds_Q = torch.arange(queries, dtype=torch.int64, device=device)
        self.queries = torch.tensor(float(queries), dtype=torch.float64, device=device)
        # whether its update is left to the next step: only a plain list of coefficients can be
        plain = graphs.rule.linear and graphs.rule.rounding == "nearest" and not isinstance(graphs.rule, Conservative)
        self.holds = graphs.engine.writer.holds and graphs.applies and plain and not shape.decays
        each_G = graphs.eps_G if method.estimator is not None else (1.0,) * groups
        full = partial(torch.full, (queries,), dtype=torch.float32, device=device)
        self.at = HeldDisplacement(self.seeds_Q, [full(fill_value=each) for each in each_G])
        # one copy to the device a step: the rule's numbers, lr, and whether anything may change yet
        self.sent = torch.zeros(groups * NUMBERS + groups + 1, dtype=torch.float64, device=device)
        self.numbers_GN = self.sent[: groups * NUMBERS].view(groups, NUMBERS)
        self.armed = self.sent[-1]
        self.given = Given(
            torch.tensor(graphs.eps_G, dtype=torch.float64, device=device), self.sent[groups * NUMBERS : -1],
            weights_of(shape.shares, shape.pairs, device), shape.pairs, graphs.most, graphs.room,
        )  # fmt: skip
        self.places = len(method.signs) * len(shape.shares)
        # losses, g, whether it goes, a choice
        self.found = torch.zeros(self.places + groups * queries + 2, dtype=torch.float64, device=device)
        self.shares_K = torch.tensor(shape.shares, dtype=torch.float64, device=device)
        self.loss_near = torch.zeros((), dtype=torch.float32, device=device)
        # state and tables, which other graphs use too, are no part of this one's memory
        if graphs.method.subspace is not None:
            writer: Any = graphs.engine.writer
            writer.reserve(graphs.rule, graphs.state)
            return
        graphs.rule.reserve(graphs.engine.directions.params, graphs.state)
        if isinstance(graphs.rule, Linear):
            graphs.rule.memories(graphs.engine.directions, graphs.state)
        if graphs.applies and not graphs.rule.linear:
            graphs.update(graphs.rule.kernel)
        elif shape.decays and graphs.rule.rounding == "nearest":
            graphs.update(DECAY)

    def load(self, batches: Sequence[Mapping[str, Tensor]], record: StepRecord, numbers_GN: Tensor) -> None:
        fill(self.batches, batches)
        self.seeds_Q.copy_(torch.tensor([signed(seed) for seed in record.seeds_Q]), non_blocking=True)
        sent = torch.cat([numbers_GN.view(-1), torch.tensor([*record.lr_G, 1.0], dtype=torch.float64)])
        self.sent.copy_(sent, non_blocking=True)

    @torch.no_grad()
    def run(self) -> None:
        graphs, rule, given, shares = self.graphs, self.graphs.rule, self.given, self.shape.shares
        losses_CK, g_GQ = look(
            graphs.engine, graphs.method, self.loss, self.batches, self.at, given, shares, self.sharing
        )
        goes = applicable(rule, losses_CK, g_GQ, given)
        self.found[:-1].copy_(torch.cat([losses_CK.flatten(), g_GQ.flatten(), goes.view(1)]))
        self.loss_near.copy_(near(graphs.method.estimator, losses_CK, self.shares_K))
        if not graphs.applies:
            return
        goes = goes & (self.armed != 0)
        mean_GQ = (g_GQ.float().double() / self.queries).float()
        if graphs.method.subspace is not None:
            writer: Any = graphs.engine.writer
            writer.move(rule, self.seeds_Q, mean_GQ, self.numbers_GN[:, :3], graphs.state, goes)
        elif isinstance(rule, Linear):
            self._displace(rule, losses_CK, g_GQ, goes)
        else:
            graphs.update(rule.kernel).run(self.seeds_Q, mean_GQ, self.numbers_GN, goes.int())

    def _displace(self, rule: Linear, losses_CK: Tensor, g_GQ: Tensor, goes: Tensor) -> None:
        """The update of a rule that is a list of coefficients, zeros where it does not go."""
        graphs = self.graphs
        memories = rule.memories(graphs.engine.directions, graphs.state)
        coefs_GQ = coefficients(rule, g_GQ, self.given.lr_G, goes, memories)
        by = HeldDisplacement(self.seeds_Q, coefs_GQ)
        if isinstance(rule, Conservative):
            signs = graphs.method.signs
            choice = goes * best_of_three(
                graphs.engine, rule, self.loss, self.batches, losses_CK, signs, by, self.sharing
            )
            self.found[-1].copy_(choice)
            sign = (choice == 1).float() - (choice == 2).float()
            by = HeldDisplacement(self.seeds_Q, [sign * coefs_Q for coefs_Q in coefs_GQ])
        decays, shrink_G = self.shape.decays, self.numbers_GN[:, 0]
        factor_G = torch.where(goes, shrink_G, torch.ones_like(shrink_G)).float() if decays else ()
        if decays and rule.rounding == "nearest":
            graphs.update(DECAY).run(self.seeds_Q[:0], g_GQ[:, :0].float(), self.numbers_GN, goes.int())
        graphs.apply(by, self.shape.at_once, list(factor_G), hold=self.holds)


class _CapturedFold:
    """A displacement of so many directions, applied."""

    def __init__(self, graphs: StepGraphs, by: Displacement, at_once: int) -> None:
        self.graphs, self.at_once = graphs, at_once
        self.graph: Any = None
        self.device = graphs.engine.directions.params[0].device
        self.seeds_Q = torch.zeros(len(by.seeds_Q), dtype=torch.int64, device=self.device)
        self.coefs_GQ = [torch.zeros(len(by.seeds_Q), device=self.device) for _ in by.coefs_GQ]

    def load(self, by: Displacement) -> None:
        self.seeds_Q.copy_(torch.tensor([signed(seed) for seed in by.seeds_Q]), non_blocking=True)
        for mine, coefs_Q in zip(self.coefs_GQ, by.coefs_GQ, strict=True):
            mine.copy_(torch.tensor(coefs_Q, dtype=torch.float32), non_blocking=True)

    @torch.no_grad()
    def run(self) -> None:
        self.graphs.apply(HeldDisplacement(self.seeds_Q, self.coefs_GQ), self.at_once)
