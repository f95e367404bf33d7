"""Accuracy against a cost, with the configurations that no other beats in both: what two figures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from zotune.bench.figures.drawing import COLOURS, INK, MARKERS, legend, panels, percent, place
from zotune.bench.frame import label, metric_of, unit
from zotune.tasks.task import LOWER_IS_BETTER


def front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats (lower cost, higher value), by cost.

    >>> front([1.0, 2.0, 3.0, 2.5], [50.0, 70.0, 65.0, 80.0])
    [0, 1, 3]
    """
    best, kept = float("-inf"), []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if values[i] > best:
            best = values[i]
            kept.append(i)
    return kept


def pareto(groups: pd.DataFrame, column: str, scale: float, cost_unit: str) -> Any:
    rows = groups[groups["mean"].notna() & groups[column].notna()]
    if len(rows) < 2:
        return None
    names = list(dict.fromkeys(label(row) for row in rows.itertuples()))
    schemes = list(dict.fromkeys(rows.scheme))
    places = list(rows.groupby(["model", "task"], sort=False))
    figure, axes = panels(len(places))
    for axis, ((model, task), group) in zip(axes, places, strict=True):
        costs, values = list(group[column] / scale), list(group["mean"])
        lower = metric_of(group) in LOWER_IS_BETTER
        edge = front(costs, [-value for value in values] if lower else values)
        axis.step([costs[i] for i in edge], [values[i] for i in edge], where="post", color=COLOURS[7], linewidth=1)
        for cost, value, row in zip(costs, values, group.itertuples(), strict=True):
            i, j = names.index(label(row)), schemes.index(row.scheme)
            axis.plot(
                cost, value, MARKERS[j % 8], color=COLOURS[i % 8], markersize=7, fillstyle="full" if i < 8 else "none"
            )
        for i, name in enumerate(names):  # colours are methods, markers schemes
            axis.plot(
                [], [], "o", color=COLOURS[i % 8], markersize=9, fillstyle="full" if i < 8 else "none", label=name
            )
        for j, scheme in enumerate(schemes):
            axis.plot([], [], MARKERS[j % 8], color=INK, label=scheme)
        axis.set_xlabel(cost_unit)
        axis.set_ylabel(f"test {unit(metric_of(group))}")
        percent(axis, group)
        axis.set_title(place(model, task))
        axis.margins(0.08)
        axis.locator_params(axis="x", nbins=5)
    legend(figure, axes)
    return figure
