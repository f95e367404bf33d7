"""A whole step as one CUDA graph: probes, estimate, update, without the host in between.

A graph is captured for each shape of batch and replayed with new numbers in the same places: the batch, the step's seeds, the
learning rates. What a step computes is what the host would: the same kernels, and scalars in the same precision.
"""

# Q queries (directions), P probes, G parameter groups.

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.directions import Displacement, HeldDisplacement, signed
from zotune.engines.probing import probe, spread
from zotune.engines.scratch import Scratch
from zotune.engines.sequential import SequentialEngine
from zotune.estimators import Estimator
from zotune.updates import ScalarSign, Sgd

logger = logging.getLogger(__name__)

MOST_GRAPHS = 24  # shapes of batch; further ones run without
_ONE_AT_A_TIME = threading.Lock()  # captures: runs may share a process, each on a thread and a stream of its own


class StepGraphs:
    """The captured steps of one optimizer.

    loss: batch → the loss, a function of the batch's tensors and the model's weights that needs no host.
    room: coefficients at or over it are not applied (see `ZeroOrderOptimizer`). Where the engine holds updates back, a step begins
    by those of the one before, whichever graph that was: all read the same places on the device, which the engine owns.
    state: the optimizer's. applies: whether a step ends with its update, or updates wait for `fold`.
    """

    def __init__(
        self,
        engine: SequentialEngine,
        estimator: Estimator,
        rule: Sgd | ScalarSign,
        eps_G: Sequence[float],
        room: float,
        state: Any,
        applies: bool = True,
    ) -> None:
        self.engine, self.estimator, self.rule, self.eps_G, self.room = engine, estimator, rule, tuple(eps_G), room
        self.state, self.applies = state, applies
        self.usable = True
        self._graphs: dict[Any, Any] = {}
        self._pool: Any = None

    def step(
        self,
        loss: Callable[[Any], Tensor],
        batch: Mapping[str, Tensor],
        seeds_Q: Sequence[int],
        lr_G: Sequence[float],
        shares: tuple[int, ...] = (1,),
        pairs: int = 1,
    ) -> list[float] | None:
        """The probes' losses of a step that has been taken (but for its update, where those wait), or None where it has to be
        taken without a graph.
        """
        if not self.usable:
            return None
        key = (loss, pairs, *((name, tuple(t.shape), t.dtype) for name, t in sorted(batch.items())))
        captured = self._graphs.get(key)
        if captured is None:
            if len(self._graphs) >= MOST_GRAPHS:
                return None
            captured = self._capture(loss, batch, shares, pairs)
            if captured is None:
                return None
            self._graphs[key] = captured
        if captured.holds:
            self.engine.arm(len(seeds_Q))
        else:
            self.engine.settle()
        captured.load(batch, seeds_Q, lr_G)
        captured.graph.replay()
        return captured.losses_P.tolist()

    def apply(self, by: Displacement | HeldDisplacement, at_once: int, hold: bool = False) -> None:
        """Through the engine, which may have a way of its own; rounded as the rule rounds. hold: it may wait."""
        if self.rule.rounding == "nearest":
            (self.engine.hold if hold else self.engine.apply)(by, at_once)
        else:
            self.rule.displace(self.engine.directions, by, self.state)

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
        return True

    def _capture(
        self, loss: Callable[[Any], Tensor], batch: Mapping[str, Tensor], shares: tuple[int, ...], pairs: int
    ) -> _Captured | None:
        device = next(iter(batch.values())).device
        captured = _Captured(self, loss, batch, device, shares, pairs)
        self.engine.settle()  # what a first use applies is zeros
        if self.engine.holds and self.applies:
            self.engine.arm(len(captured.seeds_Q))
        done = self._captured(captured, device)
        captured.holds = done and self.engine.holds and self.applies
        if not done:
            self.engine.drop()  # zeros
        return captured if done else None

    def _captured(self, captured: _Captured | _CapturedFold, device: torch.device) -> bool:
        own, forwards = self.engine.scratch, self.engine.forwards
        with _ONE_AT_A_TIME:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self.engine.scratch = captured.scratch = Scratch()  # its buffers live as long as the graph
            try:
                draws = torch.cuda.get_rng_state(device)
                side = torch.cuda.Stream(device)
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):  # every kernel once; coefficients are 0 still, so that no weight changes
                    captured.run()
                torch.cuda.current_stream(device).wait_stream(side)
                if not torch.equal(draws, torch.cuda.get_rng_state(device)):
                    torch.cuda.set_rng_state(draws, device)
                    raise RuntimeError("the loss draws from torch's generator (dropout?)")
                torch.cuda.synchronize(device)
                with torch.cuda.graph(captured.graph, pool=self._pool, capture_error_mode="thread_local"):
                    captured.run()
            except Exception as error:  # anything a model does may be what a graph cannot hold
                self.usable = False
                first = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning("steps are not captured as CUDA graphs (%s); they run one kernel at a time", first)
                return False
            finally:
                self.engine.scratch, self.engine.forwards = own, forwards
        return True


class _Captured:
    def __init__(
        self,
        graphs: StepGraphs,
        loss: Callable[[Any], Tensor],
        batch: Mapping[str, Tensor],
        device: torch.device,
        shares: tuple[int, ...],
        pairs: int,
    ) -> None:
        self.graphs, self.loss, self.shares, self.pairs = graphs, loss, shares, pairs
        self.graph = torch.cuda.CUDAGraph()
        self.scratch: Scratch | None = None
        self.holds = False  # its update is left to the next step
        self.batch = {name: t.clone() for name, t in batch.items()}
        self.seeds_Q = torch.arange(graphs.estimator.queries * pairs, dtype=torch.int64, device=device)
        self.lr_G = torch.zeros(len(graphs.eps_G), dtype=torch.float64, device=device)
        self.eps_GQ = [torch.full((pairs,), eps, dtype=torch.float32, device=device) for eps in graphs.eps_G]
        probes = len(graphs.estimator.probes) * len(shares)
        self.losses_P = torch.zeros(probes, dtype=torch.float64, device=device)

    def load(self, batch: Mapping[str, Tensor], seeds_Q: Sequence[int], lr_G: Sequence[float]) -> None:
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor, non_blocking=True)
        self.seeds_Q.copy_(torch.tensor([signed(seed) for seed in seeds_Q]), non_blocking=True)
        self.lr_G.copy_(torch.tensor(lr_G, dtype=torch.float64), non_blocking=True)

    @torch.no_grad()
    def run(self) -> None:
        engine, estimator = self.graphs.engine, self.graphs.estimator

        def at(query: int, sign: int) -> HeldDisplacement | Displacement:
            if sign == 0:
                return Displacement()
            own = self.seeds_Q[query * self.pairs : (query + 1) * self.pairs]
            return HeldDisplacement(own, self.eps_GQ)

        losses = probe(engine, estimator, self.loss, [self.batch], at, self.shares)
        self.losses_P.copy_(torch.stack(losses))
        if not self.graphs.applies:
            return
        differences_Q = torch.stack(spread(estimator, list(self.losses_P), self.shares, self.pairs))
        coefs_GQ = []
        for lr, eps in zip(self.lr_G, self.graphs.eps_G, strict=True):
            coefs_GQ.append(self.graphs.rule.coefficients_on_device(differences_Q / eps, lr))
        finite = torch.isfinite(self.losses_P).all()
        for coefs_Q in coefs_GQ:
            finite = finite & (coefs_Q.abs() < self.graphs.room).all()
        applied = [torch.where(finite, coefs_Q, torch.zeros_like(coefs_Q)) for coefs_Q in coefs_GQ]
        self.graphs.apply(HeldDisplacement(self.seeds_Q, applied), self.pairs, hold=True)


class _CapturedFold:
    """A displacement of so many directions, applied."""

    def __init__(self, graphs: StepGraphs, by: Displacement, at_once: int) -> None:
        self.graphs, self.at_once = graphs, at_once
        self.graph = torch.cuda.CUDAGraph()
        self.scratch: Scratch | None = None
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
