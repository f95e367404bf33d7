"""A step that the host takes: block after block, with back-propagation for what it trains, and what a graph cannot hold."""

# Q directions of a step, G parameter groups.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zotune.directions import Displacement
from zotune.engines.reads import same_draws
from zotune.record.steps import StepRecord, in_blocks
from zotune.step.arithmetic import applicable, near
from zotune.step.descent import finite, slopes
from zotune.step.probing import best_of_three, look
from zotune.step.rates import AutoRate, rates, walk
from zotune.updates import Conservative

if TYPE_CHECKING:
    from zotune.step.optimizer import ZeroOrderOptimizer


class HostStep:
    """One step of an optimizer, from its losses to moved weights. tensors: whether the loss came as a tensor."""

    def __init__(self, of: ZeroOrderOptimizer, loss: Callable[[Any], Any], batches: Sequence[Any], hold: bool) -> None:
        self.of, self.batches, self.hold = of, batches, hold
        # a worker without a piece of this step has it as those that have one: as in the first, which all evaluate
        self.tensors = of.sharing.tensors and of.sharing.workers is not None
        self._loss = loss
        self._own_rate: float | None = None  # of a first step with lr auto: by what its first block found

    def loss(self, batch: Any) -> Any:
        found = self._loss(batch)
        self.tensors = self.of.sharing.tensors = self.tensors or isinstance(found, Tensor)
        return found

    def take(self, shares: tuple[int, ...]) -> tuple[StepRecord, float]:
        """What it saw and applied, and the loss near θ."""
        of, first, gradients = self.of, None, list[Any]()
        if any(group.get("first_order") for group in of.param_groups):
            first, gradients = self._backward()
        if of.method.first_order:
            assert first is not None
            record, loss = self._first_order(first), first
        else:
            record, loss = self._blocks(shares, first)
        of.fold_at(record.step)
        if gradients and not record.skipped:
            self._descend(gradients)
        return record, loss

    def _blocks(self, shares: tuple[int, ...], first: float | None) -> tuple[StepRecord, float]:
        """first: a loss by back-propagation, which has to be finite too."""
        of, late, records, near_B = self.of, [], [], []
        for block, engine in enumerate(of.blocks):
            record, loss = self._estimate(engine, of.seeds(of.steps, block), shares, first)
            if not record.skipped:
                late.append((engine, record))
            if of.enhancements.block_update != "jacobi":
                of.apply_now(late, self.hold)
            records.append(record)
            near_B.append(loss)
        of.apply_now(late, self.hold)
        return in_blocks(records), sum(near_B) / len(near_B)

    def _estimate(
        self, engine: Any, seeds_Q: tuple[int, ...], shares: tuple[int, ...], first: float | None
    ) -> tuple[StepRecord, float]:
        of, method = self.of, self.of.method
        lr_G, decay_G, eps_G = of.settings()
        given = of.given(shares, lr_G, eps_G)
        each_G = eps_G if method.estimator is not None else (1.0,) * len(eps_G)
        at = Displacement(seeds_Q, tuple((each,) * len(seeds_Q) for each in each_G))
        losses_CK, g_GQ = look(engine, method, self.loss, self.batches, at, given, shares, of.sharing)
        if of.rate is not None and of.rate.unseen:
            lr_G = self._rates_of_itself(of.rate, engine, g_GQ[0].tolist())
            given = of.given(shares, lr_G, eps_G)
        finite = losses_CK if first is None else torch.cat([losses_CK.flatten(), torch.tensor([first]).double()])
        skipped = not bool(applicable(method.rule, finite, g_GQ, given))
        losses_P = tuple(losses_CK.flatten().tolist())
        record = StepRecord(
            of.steps, seeds_Q, losses_P, tuple(map(tuple, g_GQ.tolist())), lr_G, decay_G, skipped, 0, shares
        )
        if not skipped and isinstance(method.rule, Conservative):
            move = method.rule.displacement(replace(record, choice=1))
            signs = method.signs
            choice = best_of_three(engine, method.rule, self.loss, self.batches, losses_CK, signs, move, of.sharing)
            record = replace(record, choice=int(choice))
        return record, float(near(method.estimator, losses_CK, torch.tensor(shares).double()))

    def _rates_of_itself(self, rate: AutoRate, engine: Any, g_Q: Sequence[float]) -> tuple[float, ...]:
        of = self.of
        if self._own_rate is None:
            self._own_rate = rate.of_itself(of.steps, walk(of, g_Q, of.blocks.index(engine)), len(g_Q))
        return rates(of, self._own_rate)

    def _first_order(self, loss: float) -> StepRecord:
        lr_G, decay_G, _ = self.of.settings()
        none_GQ = ((0.0,),) * len(lr_G)
        return StepRecord(self.of.steps, (), (loss,), none_GQ, lr_G, decay_G, not math.isfinite(loss))

    def _backward(self) -> tuple[float, list[Any]]:
        """The loss, NaN where a gradient is not finite, and the gradients of the first-order groups, in order.

        Nothing of the layers before them is kept.
        """
        groups = self.of.param_groups
        others = [p for g in groups if not g.get("first_order") for p in g["params"] if p.requires_grad]
        params = [p for g in groups if g.get("first_order") for p in g["params"]]
        redraw = same_draws(params)
        try:
            for param in others:
                param.requires_grad_(False)
            loss, gradients = slopes(self.loss, self.batches, params)
        finally:
            for param in others:
                param.requires_grad_(True)
        redraw()  # the probes see the same dropout
        # 16 bits may hold the loss and not its gradient
        return (float(loss) if finite(gradients) else math.nan), gradients

    def _descend(self, gradients: list[Any]) -> None:
        of = self.of
        for group in of.param_groups:
            if group.get("first_order"):
                own = [gradients.pop(0) for _ in group["params"]]
                lr, decay = float(group["lr"]), float(group["weight_decay"])
                of.method.rule.descend(group["params"], own, lr, decay, of.state)
