"""Validation accuracy over the lr and eps that were tried."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures import COLOURS, DASHES, MARKERS, legend, panels, place
from zotune.bench.frame import GROUP, label

NAME, TITLE = "sensitivity", "How sensitive the result is to lr and eps"
ABOUT = "Validation accuracy, mean over seeds, a line for each eps. The choice is made here; test decides nothing."


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    done = runs[(runs.status == "done") & runs.validation.notna()]
    done = done[done.search | ~done.groupby(GROUP).search.transform("any")]  # a search has a budget of its own
    searched = [
        (names, rows)
        for names, rows in done.groupby(GROUP, sort=False)
        if len(rows[["lr", "eps"]].drop_duplicates()) > 1
    ]
    if not searched:
        return None
    figure, axes = panels(len(searched))
    for axis, (_, rows) in zip(axes, searched, strict=True):
        first = next(rows.itertuples())
        for i, (eps, line) in enumerate(rows.groupby("eps", dropna=False)):
            means = line.groupby("lr").validation.mean()
            axis.plot(
                means.index, means.values, label=f"eps {eps:g}", color=COLOURS[i % 8], marker=MARKERS[i % 8],
                linestyle=DASHES[i % 8],
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("lr")
        axis.set_ylabel("validation accuracy (%)")
        axis.set_title(f"{place(first.model, first.task)}, {label(first)} {first.scheme}")
    legend(figure, axes)
    return figure
