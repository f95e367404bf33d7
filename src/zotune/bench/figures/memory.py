"""Peak memory and seconds a step, a bar a configuration."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures.drawing import COLOURS, place, rows_of
from zotune.bench.frame import label

NAME, TITLE = "memory", "Memory and time of a step"
ABOUT = "Peak memory of a step, and its median time. A cross is a configuration that did not fit."


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    swept = groups.labels.map(lambda given: "tokens" in given)
    measured = groups[(groups.peak_bytes.notna() | (groups.oom > 0)) & ~swept]
    if not len(measured):
        return None
    measured = measured.drop_duplicates(["model", "method", "scheme", "variant"])
    models = [(str(model), rows) for model, rows in measured.groupby("model", sort=False)]
    figure, axes = rows_of([len(rows) for _, rows in models], 2)
    for (model, rows), pair in zip(models, axes, strict=True):
        names = [f"{label(row)} {row.scheme}" for row in rows.itertuples()]
        values = (rows.peak_bytes / 2**30, rows.step_seconds * 1000)
        for axis, value, unit in zip(pair, values, ("peak memory (GiB)", "ms a step"), strict=True):
            axis.barh(range(len(names)), value.fillna(0), color=COLOURS[0], height=0.62)
            for i, (v, row) in enumerate(zip(value, rows.itertuples(), strict=True)):
                text = "× does not fit" if row.oom and v != v else "" if v != v else _short(v)
                at = (0 if v != v else v, i)
                axis.annotate(text, at, xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
            axis.set_yticks(range(len(names)), names if axis is pair[0] else [""] * len(names), fontsize=8)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_xlabel(unit)
            axis.margins(x=0.18)
            axis.grid(axis="y", visible=False)
        pair[0].set_title(place(model, ""), loc="left")
    figure.tight_layout()
    return figure


def _short(value: float) -> str:
    """
    >>> _short(13.4321), _short(3491.2)
    ('13.4', '3,491')
    """
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
