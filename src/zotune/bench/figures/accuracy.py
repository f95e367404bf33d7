"""Test accuracy of each method under each scheme: mean over seeds, the bar is one standard deviation."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures import COLOURS, MARKERS, legend, panels, place
from zotune.bench.frame import label

NAME, TITLE = "accuracy", "Accuracy by method and scheme"
ABOUT = "Test accuracy, mean over seeds; bars are one standard deviation. The dotted line is the model before training."


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    scored = groups[groups["mean"].notna()]
    if not len(scored):
        return None
    methods = list(dict.fromkeys(label(row) for row in scored.itertuples()))
    schemes = list(dict.fromkeys(scored.scheme))
    places = list(scored.groupby(["model", "task"], sort=False))
    figure, axes = panels(len(places), height=1.2 + 0.36 * len(methods))
    for axis, ((model, task), group) in zip(axes, places, strict=True):
        here = list(dict.fromkeys(label(row) for row in group.itertuples()))
        for i, scheme in enumerate(schemes):
            rows = group[group.scheme == scheme]
            if not len(rows):
                continue
            shift = (i - (len(schemes) - 1) / 2) * 0.6 / len(schemes)
            heights = [here.index(label(row)) + shift for row in rows.itertuples()]
            axis.errorbar(
                rows["mean"], heights, xerr=rows.sd.fillna(0), label=scheme, linestyle="none", capsize=3,
                color=COLOURS[i % 8], marker=MARKERS[i % 8], markersize=6,
            )  # fmt: skip
        axis.axvline(group.before.mean(), color=COLOURS[7], linestyle=":", linewidth=1)
        axis.set_yticks(range(len(here)), here)
        axis.set_ylim(len(here) - 0.5, -0.5)
        axis.set_xlabel("test accuracy (%)")
        axis.set_title(place(model, task))
    legend(figure, axes)
    return figure
