"""Validation accuracy over the lr and eps that were tried."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.ticker import NullFormatter

from zotune.bench.figures.drawing import COLOURS, DASHES, MARKERS, legend, panels, percent, place
from zotune.bench.frame import GROUP, label, metric_of, unit

NAME, TITLE = "sensitivity", "How sensitive the result is to lr and eps"
ABOUT = (
    "Validation accuracy, mean over seeds, a line for each configuration, and for each eps where several were tried. "
    "The choice is made here; test decides nothing."
)


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    done = runs[(runs.status == "done") & runs.validation.notna()]
    done = done[done.search | ~done.groupby(GROUP).search.transform("any")]  # a search has a budget of its own
    places: dict[tuple[str, str, str], list[tuple[str, pd.Series]]] = {}
    for _, rows in done.groupby(GROUP, sort=False):
        if len(rows[["lr", "eps"]].drop_duplicates()) < 2:
            continue
        first = next(rows.itertuples())
        several = rows.eps.nunique() > 1
        for eps, line in rows.groupby("eps", dropna=False):
            name = label(first) + (f", eps {eps:g}" if several else "")
            means = line.groupby("lr").validation.mean()
            places.setdefault((first.model, first.task, first.scheme), []).append((name, means))
    if not places:
        return None
    names = list(dict.fromkeys(name for lines in places.values() for name, _ in lines))
    figure, axes = panels(len(places))
    for axis, ((model, task, scheme), lines) in zip(axes, places.items(), strict=True):
        for name, means in lines:
            i = names.index(name)
            axis.plot(
                means.index, means.to_numpy(), label=name, color=COLOURS[i % 8], marker=MARKERS[i % 8],
                linestyle=DASHES[(i + i // 8) % 8], markersize=5,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        shown = done[(done.model == model) & (done.task == task)]
        axis.set_xlabel("lr")
        axis.set_ylabel(f"validation {unit(metric_of(shown))}")
        percent(axis, shown)
        axis.set_title(f"{place(model, task)}, {scheme}")
    legend(figure, axes)
    return figure
