"""Peak memory and seconds a step, a bar a configuration."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures import COLOURS, panels
from zotune.bench.frame import label

NAME, TITLE = "memory", "Memory and time of a step"
ABOUT = "Peak memory of training, and the median time of a step. A cross is a configuration that did not fit."


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    swept = groups.labels.map(lambda given: "tokens" in given)
    measured = groups[(groups.peak_bytes.notna() | (groups.oom > 0)) & ~swept]
    if not len(measured):
        return None
    measured = measured.drop_duplicates(["model", "method", "scheme", "variant"])
    models = list(dict.fromkeys(measured.model))
    names = [
        f"{row.model.rsplit('/', 1)[-1]} · " * (len(models) > 1) + f"{label(row)} {row.scheme}"
        for row in measured.itertuples()
    ]
    figure, axes = panels(2, height=0.9 + 0.3 * len(names))
    values = (measured.peak_bytes / 2**30, measured.step_seconds * 1000)
    for axis, value, unit in zip(axes, values, ("peak memory (GiB)", "ms a step"), strict=True):
        colours = [COLOURS[models.index(model) % 8] for model in measured.model]
        axis.barh(range(len(names)), value.fillna(0), color=colours, height=0.62)
        for i, (v, row) in enumerate(zip(value, measured.itertuples(), strict=True)):
            text = "× does not fit" if row.oom and v != v else "" if v != v else f"{v:.3g}"
            at = (0 if v != v else v, i)
            axis.annotate(text, at, xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names), fontsize=8)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(unit)
        axis.margins(x=0.18)
        axis.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure
