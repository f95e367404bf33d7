"""Test accuracy of each method under each scheme: mean over seeds, the bar is one standard deviation."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures.drawing import COLOURS, MARKERS, legend, place, rows_of, spread
from zotune.bench.frame import label, metric_of, unit

NAME, TITLE = "accuracy", "Accuracy by method and scheme"
ABOUT = "Test accuracy, mean over seeds; bars are one standard deviation. The dotted line is the model before training."


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    scored = groups[groups["mean"].notna()]
    if not len(scored):
        return None
    schemes = list(dict.fromkeys(scored.scheme))
    places = list(scored.groupby(["model", "task"], sort=False))
    counts = [len({label(row) for row in group.itertuples()}) for _, group in places]
    columns = min(len(places), 2)
    figure, grid = rows_of([max(counts[i : i + columns]) for i in range(0, len(counts), columns)], columns, each=0.36)
    axes = [axis for row in grid for axis in row]
    for axis in axes[len(places) :]:
        axis.set_visible(False)
    axes = axes[: len(places)]
    for axis, ((model, task), group) in zip(axes, places, strict=True):
        here = list(dict.fromkeys(label(row) for row in group.itertuples()))
        for i, scheme in enumerate(schemes):
            rows = group[group.scheme == scheme]
            if not len(rows):
                continue
            shift = (i - (len(schemes) - 1) / 2) * 0.6 / len(schemes)
            heights = [here.index(label(row)) + shift for row in rows.itertuples()]
            axis.errorbar(
                rows["mean"], heights, xerr=spread(rows), label=scheme, linestyle="none", capsize=3,
                color=COLOURS[i % 8], marker=MARKERS[i % 8], markersize=6,
            )  # fmt: skip
        axis.axvline(group.before.mean(), color=COLOURS[7], linestyle=":", linewidth=1)
        axis.set_yticks(range(len(here)), here)
        axis.set_ylim(len(here) - 0.5, -0.5)
        axis.set_xlabel(f"test {unit(metric_of(group))}")
        axis.set_title(place(model, task))
    legend(figure, axes)
    return figure
