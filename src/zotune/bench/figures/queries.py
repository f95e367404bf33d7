"""Accuracy against queries a step, at equal forward passes."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures.drawing import COLOURS, MARKERS, legend, panels, percent, place, spread
from zotune.bench.frame import metric_of, unit

NAME, TITLE = "queries", "Accuracy against queries a step"
ABOUT = "Test accuracy at equal forward passes; bars are one standard deviation over seeds."


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    rows = groups[groups["mean"].notna() & groups.labels.map(lambda given: set(given) <= {"queries"})].copy()
    rows["line"] = rows.method + " · " + rows.scheme
    rows = rows[rows.groupby(["model", "task", "line"]).queries.transform("nunique") > 1]
    if not len(rows):
        return None
    names = list(dict.fromkeys(rows.line))
    places = list(rows.groupby(["model", "task"], sort=False))
    figure, axes = panels(len(places))
    for axis, ((model, task), group) in zip(axes, places, strict=True):
        for i, name in enumerate(names):
            line = group[group.line == name].sort_values("queries")
            axis.errorbar(
                line.queries, line["mean"], yerr=spread(line), label=name, color=COLOURS[i % 8],
                marker=MARKERS[i % 8], capsize=3,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        ticks = sorted(set(group.queries))
        axis.set_xticks(ticks, [str(q) for q in ticks])
        axis.set_xlabel("queries a step")
        axis.set_ylabel(f"test {unit(metric_of(group))}")
        percent(axis, group)
        axis.set_title(place(model, task))
    legend(figure, axes)
    return figure
