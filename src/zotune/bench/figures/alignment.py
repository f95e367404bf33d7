"""The same task with its template and without: tasks NAME and NAME-plain."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures.drawing import place
from zotune.bench.figures.pairs import bars
from zotune.bench.frame import metric_of

NAME, TITLE = "alignment", "Task alignment: with and without the template"
ABOUT = (
    "Test accuracy of the same rows asked through the task's template, and plainly. Bars are one standard deviation."
)
PLAIN = "-plain"


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    scored = groups[groups["mean"].notna() & (groups.variant == "")]
    tasks = set(scored.task)
    titles, panels = [], []
    for (model, task), group in scored.groupby(["model", "task"], sort=False):
        if task + PLAIN not in tasks:
            continue
        plain = scored[(scored.model == model) & (scored.task == task + PLAIN)]
        both = group.merge(plain, on=["method", "scheme"], suffixes=("", "_plain"))
        clusters = [
            (
                f"{row.method} {row.scheme}",
                [("with template", row.mean, row.sd), ("without", row.mean_plain, row.sd_plain)],
            )
            for row in both.itertuples()
        ]
        if clusters:
            titles.append(place(str(model), str(task)))
            panels.append(clusters)
    return bars(titles, metric_of(scored), panels) if titles else None
