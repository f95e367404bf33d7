"""Block-wise descent, hybrid training and gradient sparsity beside the plain method."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures.drawing import place
from zotune.bench.figures.pairs import bars
from zotune.bench.frame import metric_of

NAME, TITLE = "enhancements", "Block-wise, hybrid and sparse"
ABOUT = "Test accuracy at equal forward passes; bars are one standard deviation over seeds."
LABELS = {"blocks", "hybrid", "fo_lr", "sparsity", "mask"}


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    scored = groups[groups["mean"].notna() & groups.labels.map(lambda given: set(given) <= LABELS)]
    titles, panels = [], []
    for (model, task), group in scored.groupby(["model", "task"], sort=False):
        clusters = [
            (f"{method} {scheme}", [(row.variant or "plain", row.mean, row.sd) for row in rows.itertuples()])
            for (method, scheme), rows in group.groupby(["method", "scheme"], sort=False)
            if (rows.variant != "").any()
        ]
        if clusters:
            titles.append(place(str(model), str(task)))
            panels.append(clusters)
    return bars(titles, metric_of(scored), panels) if titles else None
