"""Validation accuracy against seconds of steps."""

from __future__ import annotations

from typing import Any

import pandas as pd

from zotune.bench.figures.lines import lines

NAME, TITLE = "seconds", "Accuracy against seconds"
ABOUT = (
    "Validation accuracy while training, mean over seeds; the band is from the least to the greatest. Seconds are so many of the "
    "run's own steps, evaluation and start-up left out."
)


def draw(runs: pd.DataFrame, groups: pd.DataFrame) -> Any:
    return lines(runs, groups, "validation", along="seconds")
