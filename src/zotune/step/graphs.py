"""A whole step as one CUDA graph: probes, estimate, update, without the host in between.

A graph is captured for each shape of batch and replayed with new numbers in the same places: the batch, the step's seeds, the
learning rates and what a rule makes of them. What a step computes is what the host would: the same kernels, and scalars in the same
precision. Whether it is skipped, and a conservative step's choice, are decided on the device.
"""

# Q queries (directions), P probes, G parameter groups, N numbers of a rule.

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.directions import Displacement, HeldDisplacement, signed
from zotune.engines.forward_mode import ForwardModeEngine
from zotune.engines.scratch import Scratch
from zotune.engines.sequential import SequentialEngine, Through
from zotune.estimators import Estimator
from zotune.step.probing import centre, loss_at, probe, spread_on_device, whole
from zotune.updates import DECAY, NUMBERS, Conservative, Linear, Rule, passes_for

logger = logging.getLogger(__name__)

MOST_GRAPHS = 24  # shapes of batch; further ones run without
_ONE_AT_A_TIME = threading.Lock()  # captures: runs may share a process, each on a thread and a stream of its own


class Taken(NamedTuple):
    """What a captured step found. derivatives_Q: by forward mode, else none. choice: a conservative step's."""

    losses_P: list[float]
    derivatives_Q: list[float]
    choice: int


class Flight:
    """A captured step that the device has been given: its numbers come to the host when it has taken it.

    found: losses, derivatives and choice in a row, so many losses. loss: the loss near θ, a 0-d float32 tensor on the device.
    """

    def __init__(self, found: Tensor, losses: int, loss: Tensor) -> None:
        self.loss, self._losses = loss, losses
        self._numbers = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
        self._numbers.copy_(found, non_blocking=True)
        self._done = torch.cuda.Event() if found.is_cuda else None
        if self._done is not None:
            self._done.record()

    def taken(self) -> Taken:
        """Waits for the step, not for what the device was given after it."""
        if self._done is not None:
            self._done.synchronize()
        *numbers, choice = self._numbers.tolist()
        return Taken(numbers[: self._losses], numbers[self._losses :], int(choice))


def projected(
    estimator: Estimator, losses_P: Tensor, eps_G: Tensor, shares: Sequence[int], pairs: int, most: float | None
) -> Tensor:
    """The projected gradients (G, Q) as the host has them, to the bit; float64, as losses and eps are. most: bound on |g|."""
    d_Q = spread_on_device(estimator, losses_P, shares, pairs)
    g_GQ = d_Q / eps_G[:, None]  # by a tensor: CUDA multiplies with the reciprocal of a number
    return g_GQ if most is None else g_GQ.clamp(-most, most)


def applicable(rule: Rule, losses_P: Tensor, g_GQ: Tensor, lr_G: Tensor, room: float) -> Tensor:
    """0-d bool: whether losses and update are finite, the update in the weights' own dtype too."""
    goes = torch.isfinite(losses_P).all()
    for g_Q, lr in zip(g_GQ, lr_G, strict=True):
        goes = goes & (rule.reach_on_device(g_Q, lr).abs() < room).all()  # NaN compares false
    return goes


class StepGraphs:
    """The captured steps of one optimizer.

    loss: batch → the loss, a function of the batch's tensors and the model's weights that needs no host.
    room: coefficients at or over it are not applied (see `ZeroOrderOptimizer`). most: bound on |g|. Where the engine holds updates
    back, a step begins by those of the one before, whichever graph that was: all read the same places on the device.
    state: the optimizer's; graphs hold its tensors. applies: whether a step ends with its update, or updates wait for `fold`.
    """

    def __init__(
        self,
        engine: SequentialEngine,
        estimator: Estimator,
        rule: Rule,
        eps_G: Sequence[float],
        room: float,
        most: float | None,
        state: Any,
        applies: bool = True,
    ) -> None:
        self.engine, self.estimator, self.rule, self.eps_G, self.room = engine, estimator, rule, tuple(eps_G), room
        self.most, self.state, self.applies = most, state, applies
        self.forward_mode = isinstance(engine, ForwardModeEngine)
        self.usable = True
        self._graphs: dict[Any, Any] = {}
        self._pool: Any = None
        self._updates: dict[str, Any] = {}
        # One for all: graphs run one after the other, and none reads what another has left.
        self._scratch = Scratch(keeps=True)

    def step(
        self,
        loss: Callable[[Any], Tensor],
        batches: Sequence[Mapping[str, Tensor]],
        seeds_Q: Sequence[int],
        lr_G: Sequence[float],
        numbers_GN: Tensor,
        decays: bool = False,
        shares: tuple[int, ...] = (1,),
        pairs: int = 1,
    ) -> Flight | None:
        """A step that the device takes (but for its update, where those wait), or None where it has to be taken without a
        graph. numbers_GN: as `Rule.table` has them. decays: whether any group has weight decay.
        """
        if not self.usable:
            return None
        shapes = (tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(batch.items())) for batch in batches)
        key = (loss, pairs, decays, *shapes)
        captured = self._graphs.get(key)
        if captured is None:
            if len(self._graphs) >= MOST_GRAPHS:
                return None
            captured = _Captured(self, loss, batches, shares, pairs, decays)
            if not self._capture(captured):
                return None
            self._graphs[key] = captured
        if captured.holds:
            self.engine.arm(len(seeds_Q))
        else:
            self.engine.settle()
        captured.load(batches, seeds_Q, lr_G, numbers_GN)
        captured.graph.replay()
        self.engine.replayed()
        return Flight(captured.found, captured.probes, captured.loss_near.clone())

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
        self.rule.displace(Through(self.engine, at_once, hold), by, self.state, factors)

    def fold(self, by: Displacement, pairs: int) -> bool:
        """Updates that waited, applied together; False where they have to be without a graph. pairs: directions of a step."""
        if not self.usable:
            return False
        key = ("fold", len(by.seeds_Q))
        held = self._graphs.get(key)
        if held is None:
            held = _CapturedFold(self, by, pairs)
            if not self._captured(held, held.device):
                return False
            self._graphs[key] = held
        held.load(by)
        held.graph.replay()
        self.engine.replayed()
        return True

    def _capture(self, captured: _Captured) -> bool:
        self.engine.settle()  # what a first use applies is zeros
        if captured.holds:
            self.engine.arm(len(captured.seeds_Q))
        done = self._captured(captured, captured.device)
        if not done:
            self.engine.drop()  # zeros
        captured.holds = captured.holds and self.engine.holds
        return done

    def _captured(self, captured: _Captured | _CapturedFold, device: torch.device) -> bool:
        forwards = self.engine.forwards
        with _ONE_AT_A_TIME, self.own_scratch():
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                draws = torch.cuda.get_rng_state(device)
                # Every kernel once; nothing is armed yet, so that no weight changes. On the stream at hand: there is no backward
                # pass to keep apart, and cuBLAS keeps a workspace of 32 MiB for each stream that it ever ran on.
                captured.run()
                if not torch.equal(draws, torch.cuda.get_rng_state(device)):
                    torch.cuda.set_rng_state(draws, device)
                    raise RuntimeError("the loss draws from torch's generator (dropout?)")
                torch.cuda.synchronize(device)
                captured.graph = torch.cuda.CUDAGraph()
                with (
                    _uncollected(),
                    torch.cuda.graph(captured.graph, pool=self._pool, capture_error_mode="thread_local"),
                ):
                    captured.run()
            except Exception as error:  # anything a model does may be what a graph cannot hold
                self.usable = False
                first = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning("steps are not captured as CUDA graphs (%s); they run one kernel at a time", first)
                return False
            finally:
                self.engine.forwards = forwards
        return True

    @contextmanager
    def own_scratch(self) -> Iterator[None]:
        """The engine takes from the graphs' scratch, of which nothing is ever freed."""
        outer, self.engine.scratch = self.engine.scratch, self._scratch
        try:
            yield
        finally:
            self.engine.scratch = outer


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
        self,
        graphs: StepGraphs,
        loss: Callable[[Any], Tensor],
        batches: Sequence[Mapping[str, Tensor]],
        shares: tuple[int, ...],
        pairs: int,
        decays: bool,
    ) -> None:
        self.graphs, self.loss, self.shares, self.pairs, self.decays = graphs, loss, shares, pairs, decays
        self.graph: Any = None
        self.batches = [{name: t.clone() for name, t in batch.items()} for batch in batches]
        self.device = device = next(iter(self.batches[0].values())).device
        groups, queries = len(graphs.eps_G), graphs.estimator.queries * pairs
        self.seeds_Q = torch.arange(queries, dtype=torch.int64, device=device)
        self.queries = torch.tensor(float(queries), dtype=torch.float64, device=device)
        self.eps_G = torch.tensor(graphs.eps_G, dtype=torch.float64, device=device)
        # whether its update is left to the next step: only a plain list of coefficients can be
        plain = graphs.rule.linear and graphs.rule.rounding == "nearest" and not isinstance(graphs.rule, Conservative)
        self.holds = graphs.engine.holds and graphs.applies and plain and not decays
        self.eps_GQ = [torch.full((pairs,), eps, dtype=torch.float32, device=device) for eps in graphs.eps_G]
        # one copy to the device a step: the rule's numbers, lr, and whether anything may change yet
        self.given = torch.zeros(groups * NUMBERS + groups + 1, dtype=torch.float64, device=device)
        self.numbers_GN = self.given[: groups * NUMBERS].view(groups, NUMBERS)
        self.lr_G, self.armed = self.given[groups * NUMBERS : -1], self.given[-1]
        self.probes = len(graphs.estimator.probes) * len(shares)
        derivatives = queries if graphs.forward_mode else 0
        self.found = torch.zeros(self.probes + derivatives + 1, dtype=torch.float64, device=device)  # last, a choice
        # the loss near θ is linear in those of the probes
        one_each = torch.eye(self.probes, dtype=torch.float64).tolist()
        weights = [centre(graphs.estimator, losses_P, shares) for losses_P in one_each]
        self.weights_P = torch.tensor(weights, dtype=torch.float64, device=device)
        self.loss_near = torch.zeros((), dtype=torch.float32, device=device)
        # state and tables, which other graphs use too, are no part of this one's memory
        graphs.rule.reserve(graphs.engine.directions.params, graphs.state)
        if graphs.applies and not graphs.rule.linear:
            graphs.update(graphs.rule.kernel)
        elif decays and graphs.rule.rounding == "nearest":
            graphs.update(DECAY)

    def load(
        self,
        batches: Sequence[Mapping[str, Tensor]],
        seeds_Q: Sequence[int],
        lr_G: Sequence[float],
        numbers_GN: Tensor,
    ) -> None:
        for mine, batch in zip(self.batches, batches, strict=True):
            for name, tensor in batch.items():
                mine[name].copy_(tensor, non_blocking=True)
        self.seeds_Q.copy_(torch.tensor([signed(seed) for seed in seeds_Q]), non_blocking=True)
        given = torch.cat([numbers_GN.view(-1), torch.tensor([*lr_G, 1.0], dtype=torch.float64)])
        self.given.copy_(given, non_blocking=True)

    @torch.no_grad()
    def run(self) -> None:
        graphs = self.graphs

        def at(query: int, sign: int) -> HeldDisplacement | Displacement:
            if sign == 0:
                return Displacement()
            own = HeldDisplacement(self.seeds_Q[query * self.pairs : (query + 1) * self.pairs], self.eps_GQ)
            return own if sign > 0 else own.negated()

        if graphs.forward_mode:
            losses_P, g_GQ = self._derivatives()
        else:
            losses_P = torch.stack(probe(graphs.engine, graphs.estimator, self.loss, self.batches, at, self.shares))
            g_GQ = projected(graphs.estimator, losses_P, self.eps_G, self.shares, self.pairs, graphs.most)
        self.found[: self.probes].copy_(losses_P)
        self.loss_near.copy_((self.weights_P * losses_P).sum())
        if not graphs.applies:
            return
        goes = applicable(graphs.rule, losses_P, g_GQ, self.lr_G, graphs.room) & (self.armed != 0)
        if isinstance(graphs.rule, Linear):
            self._displace(graphs.rule, losses_P, g_GQ, goes)
        else:
            mean_GQ = (g_GQ.float().double() / self.queries).float()
            graphs.update(graphs.rule.kernel).run(self.seeds_Q, mean_GQ, self.numbers_GN, goes.int())

    def _derivatives(self) -> tuple[Tensor, Tensor]:
        """L(θ) of each query's forward, and its derivative along the query's z, clipped: (Q,) and (G, Q)."""
        graphs, engine = self.graphs, self.graphs.engine
        ones_G = [torch.ones_like(self.eps_GQ[0][:1])] * len(self.eps_GQ)
        assert isinstance(engine, ForwardModeEngine)
        found = []
        for query in range(len(self.seeds_Q)):
            along = HeldDisplacement(self.seeds_Q[query : query + 1], ones_G)
            found.append(engine.derivative(lambda: whole(self.loss, self.batches), along))
        losses_Q, g_Q = (torch.stack(numbers).double() for numbers in zip(*found, strict=True))
        self.found[self.probes : -1].copy_(g_Q)
        g_GQ = g_Q.expand(len(ones_G), -1)
        return losses_Q, g_GQ if graphs.most is None else g_GQ.clamp(-graphs.most, graphs.most)

    def _displace(self, rule: Linear, losses_P: Tensor, g_GQ: Tensor, goes: Tensor) -> None:
        """The update of a rule that is a list of coefficients, zeros where it does not go."""
        graphs = self.graphs
        coefs_GQ = [rule.coefficients_on_device(g_Q, lr) for g_Q, lr in zip(g_GQ, self.lr_G, strict=True)]
        coefs_GQ = [torch.where(goes, coefs_Q, torch.zeros_like(coefs_Q)) for coefs_Q in coefs_GQ]
        by = HeldDisplacement(self.seeds_Q, coefs_GQ)
        if isinstance(rule, Conservative):
            choice = goes * self._choice(rule, losses_P, by)
            self.found[-1].copy_(choice)
            sign = (choice == 1).float() - (choice == 2).float()
            by = HeldDisplacement(self.seeds_Q, [sign * coefs_Q for coefs_Q in coefs_GQ])
        shrink_G = self.numbers_GN[:, 0]
        factor_G = torch.where(goes, shrink_G, torch.ones_like(shrink_G)).float() if self.decays else ()
        if self.decays and rule.rounding == "nearest":
            graphs.update(DECAY).run(self.seeds_Q[:0], g_GQ[:, :0].float(), self.numbers_GN, goes.int())
        graphs.apply(by, self.pairs, list(factor_G), hold=self.holds)

    def _choice(self, rule: Conservative, losses_P: Tensor, by: HeldDisplacement) -> Tensor:
        """Which of θ and its two neighbours has the least loss on the step's batches."""
        probes = self.graphs.estimator.probes
        here = [loss for loss, asked in zip(losses_P, probes, strict=True) if asked.sign == 0][:1]
        places: list[Displacement | HeldDisplacement] = [Displacement(), by, by.negated()]
        found = [loss_at(self.graphs.engine, self.loss, self.batches, place) for place in places[len(here) :]]
        return rule.choose_on_device(torch.stack([*here, *found]))


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
