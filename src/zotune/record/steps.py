"""What one step saw and applied, as the optimizer, its watchers and a replay have it. Loads no torch."""

# C copies of a batch, K directions over its rows, P = C·K places, Q directions of the step, G parameter groups.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StepRecord:
    """All that it takes to apply a step again.

    seeds_Q: of its directions. losses_P: mean losses of the places, copy by copy; within a copy direction by direction. g_GQ: the
    projected gradients as the rule has them; lr_G and decay_G as used. skipped: something was not finite, and nothing is applied.
    choice: of a conservative step, 0 to stay, 1 or 2. shares: rows of each direction over the batch; of one number: all rows.
    A block-wise step has losses, seeds and g block by block; g is NaN where a block was not moved.
    """

    step: int
    seeds_Q: tuple[int, ...]
    losses_P: tuple[float, ...]
    g_GQ: tuple[tuple[float, ...], ...]
    lr_G: tuple[float, ...]
    decay_G: tuple[float, ...]
    skipped: bool = False
    choice: int = 0
    shares: tuple[int, ...] = (1,)

    @property
    def loss(self) -> float:
        return sum(self.losses_P) / len(self.losses_P)

    @property
    def told_nothing(self) -> bool:
        """Whether all places had losses alike, so that the step moved nothing though all was finite."""
        return not self.skipped and not any(g for g_Q in self.g_GQ for g in g_Q)


def in_blocks(records: Sequence[StepRecord]) -> StepRecord:
    """One record of the blocks that a step moved one after the other."""
    if len(records) == 1:
        return records[0]
    groups = range(len(records[0].g_GQ))
    g_GQ = tuple(tuple(math.nan if one.skipped else g for one in records for g in one.g_GQ[group]) for group in groups)
    return replace(
        records[0],
        seeds_Q=tuple(seed for one in records for seed in one.seeds_Q),
        losses_P=tuple(loss for one in records for loss in one.losses_P),
        g_GQ=g_GQ,
        skipped=all(one.skipped for one in records),
        choice=records[-1].choice,
    )
