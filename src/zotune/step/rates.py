"""A learning rate that a run finds by itself: `lr="auto"`.

What limits a rate is how far noise carries the weights. A step moves each by Σ_q c_q·z_q, of mean square lr²·w with w = Σ_q c_q² at
lr 1 (of ZO-SGD w = v/n, v the mean of g² over its n directions). The steps of a run with rates lr·f_k add up to a walk of
lr·√(Σ_k f_k²·w_k). So

    lr_k = ρ·s·f_k / √(F·w̄),    F = Σ_k f_k²,

s the root mean square of what trains, f_k the schedule's factor (1 at most), w̄ the mean of w over the steps so far. ρ has no unit:
multiplying the loss, or the weights, by a number changes nothing. Source: docs/log.md, 2026-12-01, "Which rule finds the rate".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zotune.errors import OptionError
from zotune.record.scalars import float32
from zotune.record.steps import StepRecord
from zotune.step.choices import AUTO
from zotune.streaming.packed import is_packed, unpacked
from zotune.updates import Linear

if TYPE_CHECKING:
    from zotune.step.optimizer import ZeroOrderOptimizer

logger = logging.getLogger(__name__)

RHO = 0.09  # of blind directions: eight cells of tasks and directions, left out one by one 0.084 to 0.103
RHO_OWN = 0.18  # of directions from the rows' own inputs, which bear twice the rate
RHO_WRITING = 0.03  # of rewards of what is written, which noise spoils sooner than which of a few labels is likelier
SIGMA = 0.02  # of s: how far a member of a population on rewards is from the model, where nothing is said
OUTLIER = 4.0  # times the mean so far: what a step beyond counts as
RISEN = 1.5  # times the early mean: of runs at or below the best rate w never rose so far
SPREADS = 2.0  # of the two means beyond that, since few directions tell a mean roughly
FEW = 64  # squares that tell their mean to a fifth
CHANCE = -1.2816  # normal quantile of one in ten: how often w̄ may be taken for less than it is


class AutoRate:
    """The rate of each step, of what the steps before have found; a function of what a run records.

    steps: of the run. scale: s. Step k goes by what the steps up to k − 2 found, on every device: of a captured step the host does
    not know in time. The first that finds anything goes by its own w, which is known before its rate is fixed. A step that is
    skipped, or that tells nothing, counts for nothing. say: told of the rate, and of each halving.
    """

    KEPT = (  # in a checkpoint
        "scale", "seen", "told", "mean", "early", "since", "halved", "squares", "factors_squared",
    )  # fmt: skip

    def __init__(self, steps: int, scale: float, rho: float = RHO) -> None:
        self.scale, self.rho = scale, rho
        self.say: Callable[[str], None] = logger.info
        self.waiting: list[tuple[int, float, int]] = []  # (step, w, directions) that no rate goes by yet
        self.seen, self.told, self.mean = 0, 0, 0.0  # steps that told something, their directions, and w̄
        self.early, self.since = 0.0, 0  # the mean that w̄ is compared with, and the steps since it was begun
        self.halved = 0
        self.squares, self.factors_squared = 0.0, 0.0  # Σ lr_k² and Σ f_k², of the steps so far
        self.planned = False
        self._lay(steps, lambda step: max(0.0, 1 - step / steps))

    def plan(self, steps: int, factor: Callable[[int], float]) -> None:
        """The run's length and schedule, f of each step from 0. Without this it falls linearly to 0."""
        self.planned = True
        self._lay(steps, factor)

    def _lay(self, steps: int, factor: Callable[[int], float]) -> None:
        self.steps, self.factor = steps, factor
        self.total = math.fsum(factor(step) ** 2 for step in range(steps))

    @property
    def unseen(self) -> bool:
        """Whether the next step has to go by its own w."""
        return self.seen == 0 and not self.waiting

    @property
    def base(self) -> float:
        """The rate at factor 1, as known so far; 0 where nothing is."""
        return self._base(self.mean, self.told)

    @property
    def so_far(self) -> float:
        """The rate that would have carried the weights as far, with the same schedule: √(Σ lr_k² / Σ f_k²)."""
        return math.sqrt(self.squares / self.factors_squared) if self.factors_squared else 0.0

    def at(self, step: int) -> float:
        """lr of this step, of float32's values."""
        while self.waiting and (self.seen == 0 or self.waiting[0][0] <= step - 2):
            self._take(*self.waiting.pop(0))
        return float32(self.base * self.factor(step))

    def of_itself(self, step: int, w: float, directions: int) -> float:
        """lr of a step that goes by what it found itself: 0 where that is nothing."""
        return float32(self._base(w, directions) * self.factor(step))

    def see(self, step: int, w: float, directions: int, lr: float) -> None:
        """What a step found, and its rate; in order. w: 0 where it was skipped or told nothing."""
        self.squares += float32(lr) ** 2
        self.factors_squared += self.factor(step) ** 2
        if not w:
            return
        if self.unseen:
            by = f"the noise of its {directions} directions" if directions > 1 else "the noise of its direction"
            self.say(f"lr auto: {lr:.3g} at step {step + 1} of {self.steps}, by {by}")
        self.waiting.append((step, w, directions))

    def _base(self, w: float, directions: int) -> float:
        if not (w > 0 and self.total > 0):
            return 0.0
        return self.rho * self.scale / math.sqrt(self.total * w * _least(directions)) / 2.0**self.halved

    def _take(self, step: int, w: float, directions: int) -> None:
        enough = -(-FEW // directions)
        memory, early = max(16, self.steps // 20, enough), max(8, self.steps // 25, enough)
        if self.told >= FEW:
            w = min(w, OUTLIER * self.mean)
        self.seen, self.since, self.told = self.seen + 1, self.since + 1, self.told + directions
        self.mean += (w - self.mean) / min(self.seen, memory)
        if self.since <= early:
            self.early = self.mean
        elif (
            self.mean > RISEN * (1 + SPREADS * math.sqrt(2 / directions / early + 2 / directions / memory)) * self.early
        ):
            self.halved += 1
            self.say(
                f"lr auto: halved after step {step + 1}: g² has risen to {self.mean / self.early:.2g} times what it was, which "
                "tells a rate that is too large"
            )
            self.early, self.since = self.mean, 0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.KEPT} | {"waiting": [list(one) for one in self.waiting]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.KEPT:
            setattr(self, name, state[name])
        self.waiting = [(int(step), float(w), int(directions)) for step, w, directions in state["waiting"]]


def auto_rate(of: ZeroOrderOptimizer, total_steps: int | None, model: nn.Module | None) -> AutoRate | None:
    """The rate of an optimizer that was given "auto"; its parameter groups then have lr 1. None where all have numbers.

    Groups of a rate of their own keep it. s is of the weights as they are now. model: what they are of, where that is known.
    """
    mine = [group for group in of.param_groups if group["lr"] == AUTO]
    if not mine:
        return None
    if of.choices.lr != AUTO:
        raise OptionError(
            "lr", "lr='auto' of one parameter group: give it to the optimizer, and the others their numbers"
        )
    if total_steps is None or not (total_steps >= 1 and total_steps == int(total_steps)):
        raise OptionError("total_steps", f"total_steps={total_steps!r}: lr='auto' needs the number of steps of the run")
    for group in mine:
        group["lr"], group["auto"] = 1.0, True
    scale = scale_of([param for group in mine for param in group["params"]], model)
    if not scale:
        raise OptionError("lr", "lr='auto': all weights that train are 0, which tells no scale; give a number")
    return AutoRate(int(total_steps), scale, RHO_OWN if of.method.own_inputs else RHO)


def rates(of: ZeroOrderOptimizer, lr: float) -> tuple[float, ...]:
    """lr by parameter group: the one found where that is what the group has."""
    assert of.rate is not None
    if not of.rate.planned and "initial_lr" in of.param_groups[0]:
        raise OptionError("lr", "lr='auto' falls linearly to 0 by itself, over total_steps; leave the scheduler out")
    return tuple(lr if group.get("auto") else float(group["lr"]) for group in of.param_groups)


def see(of: ZeroOrderOptimizer, record: StepRecord) -> None:
    """A step that was taken, or applied from a record: it tells the rates of those behind it."""
    if of.rate is None:
        return
    lr = next(lr for lr, group in zip(record.lr_G, of.param_groups, strict=True) if group.get("auto"))
    of.rate.see(record.step, 0.0 if record.skipped else walk(of, record.g_GQ[0]), len(record.g_GQ[0]), lr)


def walk(of: ZeroOrderOptimizer, g_Q: Sequence[float], block: int | None = None) -> float:
    """w = Σ_q c_q² at lr 1, the square by which a step's update displaces a weight on average; 0 where nothing is told.

    g_Q: block by block of a step that descends so, each block's share of the weights; or of one block, as if it were all.
    """
    rule, blocks = of.method.rule, of.blocks if block is None else [of.blocks[block]]
    assert isinstance(rule, Linear)
    if not all(map(math.isfinite, g_Q)) and len(blocks) == 1:
        return 0.0
    sizes, each = [sum(p.numel() for p in engine.directions.params) for engine in blocks], len(g_Q) // len(blocks)
    total = 0.0
    for first, size in enumerate(sizes):
        own_Q = torch.tensor(g_Q[first * each : (first + 1) * each], dtype=torch.float64)
        c_Q = rule.rounded_coefficients(own_Q, torch.ones((), dtype=torch.float64)).double()
        if bool(torch.isfinite(c_Q).all()):  # else the block was not moved
            total += size / sum(sizes) * math.fsum(c * c for c in c_Q.tolist())
    return total * (1 - (of.enhancements.sparsity or 0.0))


def sigma_of(trained: Sequence[nn.Parameter], model: nn.Module | None = None) -> float:
    """σ of a population on rewards where none is given: 0.02·s, to three digits. Raises OptionError where there is no scale."""
    scale = scale_of(trained, model)
    if not scale:
        raise OptionError("sigma", "sigma: all weights that train are 0, which tells no scale; give a number")
    return float(f"{SIGMA * scale:.3g}")


def _least(directions: int) -> float:
    """What a mean of so many squares is multiplied with so that it is too small once in ten: m/χ²(m), by Wilson and Hilferty."""
    a = 2 / (9 * max(1, directions))
    return (1 - a + CHANCE * math.sqrt(a)) ** -3


def scale_of(trained: Sequence[nn.Parameter], model: nn.Module | None = None) -> float:
    """s: the root mean square of what trains, of all elements but those of tensors that are zeros throughout; to four digits.

    A matrix that begins at zero is a factor of what is added to a model's weights (LoRA's B), and the other factor's size does not
    tell what noise in it does to them: then s is of all the model's weights, of packed ones by the values that they stand for.
    """
    stays = [param for param in trained if not hasattr(param, "streamed")]  # a factor is small
    factor = any(param.dim() > 1 and not param.detach().any() for param in stays)
    if factor and model is not None:
        trained = [param for param in model.parameters() if type(param.data) is Tensor or is_packed(param)]
    total, count = 0.0, 0
    for param in trained:
        if (block := getattr(param, "streamed", None)) is not None:
            block.arrive()
        values = unpacked(param).detach()
        if values.is_floating_point() and (
            squares := float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
        ):
            total, count = total + squares, count + values.numel()
    return float(f"{math.sqrt(total / count):.4g}") if count else 0.0
