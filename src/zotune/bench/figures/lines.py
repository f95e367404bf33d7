"""A value of metrics.jsonl against what was spent, a panel a scheme, a line a method: what three figures share."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from zotune.bench.figures.drawing import COLOURS, DASHES, legend, panels, percent, place
from zotune.bench.frame import label, metric_of, unit


def lines(runs: pd.DataFrame, groups: pd.DataFrame, what: str, bins: int | None = None, along: str = "passes") -> Any:
    """The mean over a configuration's seeds; the band from their least to their greatest.

    what: "loss" of training, or "validation", in the run's metric. bins: so many means a line. along: "passes", or "seconds", which
    are so many times the median of a step's in the configuration.
    """
    places: dict[tuple[str, str, str], list[tuple[str, pd.DataFrame]]] = {}
    by_key = runs.set_index("key")
    for row in groups[groups.kind == "train"].itertuples():
        points, key = [], "loss" if what == "loss" else f"validation_{row.metric or 'accuracy'}"
        for run in by_key.loc[row.chosen].itertuples():
            points += [
                {"passes": spent, "value": m[key]}
                for m in run.metrics
                if m.get(key) is not None and (spent := _spent(m, along, row.step_seconds)) is not None
            ]
        if points:
            frame = pd.DataFrame(points)
            if bins is not None and frame.passes.nunique() > bins:
                width = frame.passes.max() / bins
                frame["passes"] = ((frame.passes - 1) // width + 0.5) * width
            line = frame.groupby("passes").value.agg(["mean", "min", "max"]).reset_index()
            places.setdefault((row.model, row.task, row.scheme), []).append((label(row), line))
    if not places:
        return None
    names = list(dict.fromkeys(name for group in places.values() for name, _ in group))
    figure, axes = panels(len(places))
    for axis, ((model, task, scheme), group) in zip(axes, places.items(), strict=True):
        for name, line in group:
            i = names.index(name)
            axis.plot(line.passes, line["mean"], label=name, color=COLOURS[i % 8], linestyle=DASHES[(i + i // 8) % 8])
            if (line["max"] > line["min"]).any():
                axis.fill_between(line.passes, line["min"], line["max"], color=COLOURS[i % 8], alpha=0.15, linewidth=0)
        axis.set_xlabel("forward passes" if along == "passes" else "seconds")
        shown = groups[(groups.model == model) & (groups.task == task)]
        if what == "loss":
            axis.set_ylabel("training loss (nats)")
        else:
            axis.set_ylabel(f"validation {unit(metric_of(shown))}")
            percent(axis, shown)
        axis.set_title(f"{place(model, task)}, {scheme}")
    legend(figure, axes)
    return figure


def _spent(line: dict[str, Any], along: str, step_seconds: float) -> float | None:
    """Forward passes, or seconds, up to a line of metrics; None where it does not tell."""
    if along == "passes":
        return line.get("forward_passes")
    return None if line.get("step") is None or math.isnan(step_seconds) else line["step"] * step_seconds
