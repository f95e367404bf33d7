"""Steps in a subspace, or along a basis that is kept: what is brought up to date before one, and how one moves the weights."""

# Q directions of a step, G parameter groups.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zotune.directions import Displacement
from zotune.record.scalars import float32, shrinkage
from zotune.record.steps import StepRecord
from zotune.updates.rule import steps_of

if TYPE_CHECKING:
    from zotune.step.optimizer import ZeroOrderOptimizer


def turned(of: ZeroOrderOptimizer, loss: Any = None, batches: Sequence[Any] = ()) -> int:
    """The subspace or the basis of the step that comes next. Without a loss: of a recorded step.

    Returns the forward passes that it took, beside those that the method counts for each step.
    """
    method, seed = of.method, of.param_groups[0]["seed"]
    if method.tracked_inputs:
        of.engine.factored.turn(of.steps, seed, of.state, loss, batches)
    if method.subspace is None:
        return 0
    passes: int = of.engine.factored.look(of.state, loss, batches) if method.subspace.inputs else 0
    of.engine.factored.turn(of.steps, seed, of.state, method.rule.carries)
    return passes


def move_cores(of: ZeroOrderOptimizer, engine: Any, by: StepRecord) -> None:
    """A step's update by the rule's move of each core: weights and state change, nothing else."""
    rule, directions = of.method.rule, engine.directions
    mean_GQ = tuple(tuple(float32(float32(g) / len(g_Q)) for g in g_Q) for g_Q in by.g_GQ)
    mean, device = Displacement(by.seeds_Q, mean_GQ), directions.params[0].device
    coefs_GQ = [mean.on(group, device)[1] for group in range(len(mean_GQ))]
    steps_G = steps_of(directions, of.state)
    assert steps_G is not None
    engine.writer.move(rule, mean.on(0, device)[0], coefs_GQ, numbers_of(by.lr_G, by.decay_G, steps_G), of.state)
    rule.count(() if rule.linear else directions.params, of.state)


def numbers_of(
    lr_G: Sequence[float], decay_G: Sequence[float], steps_G: Sequence[int]
) -> list[tuple[float, float, int]]:
    """What decay multiplies with, lr, and the number of the update from 1, by parameter group. steps_G: of those before."""
    given = zip(lr_G, decay_G, steps_G, strict=True)
    return [(shrinkage(lr, decay), float32(lr), steps + 1) for lr, decay, steps in given]
