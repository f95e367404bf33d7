"""What a benchmark says in sentences: of each model and task what came out best, by how much, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

import pandas as pd

from zotune.bench.frame import label, percentage
from zotune.tasks.metrics import figure
from zotune.tasks.task import LOWER_IS_BETTER

# Student's 97.5 % quantiles by degrees of freedom, from 1; beyond them the normal's.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def findings(runs: pd.DataFrame, groups: pd.DataFrame) -> list[str]:
    """A sentence a model and task with at least two configurations that were trained whole, in the order of the tables."""
    scored = groups[(groups.kind == "train") & groups["mean"].notna() & ~groups.tried]
    return [
        said
        for (model, task), here in scored.groupby(["model", "task"], sort=False)
        for said in _of(str(model), str(task), here, runs)
    ]


def _of(model: str, task: str, here: pd.DataFrame, runs: pd.DataFrame) -> Iterator[str]:
    sign = -1 if here.metric.isin(LOWER_IS_BETTER).any() else 1
    rows = sorted(here.itertuples(), key=lambda row: -sign * row.mean)
    if len(rows) < 2:
        return
    first, second = rows[:2]
    by_key = runs.set_index("key")
    scores = [{row.seed: row.score for row in by_key.loc[one.chosen].itertuples()} for one in (first, second)]
    before = f", {figure(first.metric, first.before)} before" if first.before == first.before else ""
    yield (
        f"{model} on {task}: {_name(first)} is first of {len(rows)} with {_shown(first)}{before}; {_name(second)} follows with "
        f"{_shown(second)}. {_sure(scores[0], scores[1], first.metric)}"
    )


def _sure(one: dict[int, float], other: dict[int, float], metric: str) -> str:
    """How far apart two configurations are by the seeds that both have."""
    seeds = sorted(set(one) & set(other))
    unit = " points" if percentage(metric) else ""
    if len(seeds) < 2:
        return f"With {'one seed' if min(len(one), len(other)) == 1 else 'no seeds in common'} this order may be luck."
    moved = [one[seed] - other[seed] for seed in seeds]
    mean, half = fmean(moved), paired_half(moved)
    span = f"{mean:+.1f}{unit}, 95 % {mean - half:+.1f} to {mean + half:+.1f}, {len(seeds)} seeds in pairs"
    if mean - half > 0 or mean + half < 0:
        return f"That is more than chance explains ({span})."
    return f"These seeds cannot tell the two apart ({span})."


def paired_half(moved: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of paired differences, by Student's t. Raises ValueError for fewer than two.

    >>> round(paired_half([1.0, 2.0, 3.0]), 2)
    2.48
    """
    n = len(moved)
    if n < 2:
        raise ValueError("an interval needs two pairs at least")
    quantile = STUDENT[n - 2] if n - 2 < len(STUDENT) else NormalDist().inv_cdf(0.975)
    return quantile * stdev(moved) / math.sqrt(n)


def _name(row: Any) -> str:
    return f"{label(row)}, {row.scheme}" if row.scheme else label(row)


def _shown(row: Any) -> str:
    spread = f" ± {figure(row.metric, row.sd)}" if row.sd == row.sd else ""
    return f"{figure(row.metric, row.mean)}{spread}"
