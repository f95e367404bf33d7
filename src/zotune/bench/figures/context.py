"""Peak memory against the tokens of a row."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures.drawing import COLOURS, DASHES, MARKERS, legend, panels, place
from zotune.bench.frame import said

NAME, TITLE = "context", "Memory against context length"
ABOUT = "Peak memory of a step. A line ends where the next length did not fit, or was not run."


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    rows = groups[groups.tokens.notna()].copy()
    rows["line"] = [
        " ".join([row.method, row.scheme, *(said(k, v) for k, v in row.labels.items() if k != "tokens")]).strip()
        for row in rows.itertuples()
    ]
    rows = rows[rows.groupby(["model", "line", "batch_size"], dropna=False).tokens.transform("nunique") > 1]
    if not len(rows):
        return None
    if rows.batch_size.nunique() > 1:
        rows["line"] += [f", {size:g} rows" for size in rows.batch_size]
    names = list(dict.fromkeys(rows.line))
    places = list(rows.groupby("model", sort=False))
    figure, axes = panels(len(places))
    for axis, (model, group) in zip(axes, places, strict=True):
        for i, name in enumerate(names):
            line = group[(group.line == name) & group.peak_bytes.notna()].sort_values("tokens")
            if len(line):
                axis.plot(
                    line.tokens, line.peak_bytes / 2**30, label=name, color=COLOURS[i % 8], marker=MARKERS[i % 8],
                    linestyle=DASHES[(i + i // 8) % 8], markersize=5,
                )  # fmt: skip
        axis.set_xlabel("tokens a row")
        axis.set_ylabel("peak memory (GiB)")
        axis.set_ylim(bottom=0)
        axis.set_title(place(str(model), ""))
    legend(figure, axes)
    return figure
